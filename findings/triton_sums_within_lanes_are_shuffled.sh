#!/usr/bin/env bash
# Triton 3.7.1, compiled for compute capability 9.0 (no GPU needed). Guess: of a 64 x 64 product, where four threads
# share a row, each thread can sum its own columns without a shuffle; sums over whole rows need two a row and so more.
# Seen: the other way round. With row sums the program has 8 shuffles. With a [64, 4] tensor of the threads' own sums,
# carried through two loops inside a third, the compiler keeps the tensor in a layout of its own choice: one of the two
# loops, which do the same, moves the whole 64 x 64 product into that layout by 64 shuffles in every step.
# Output seen:
#   row sums: 8 shuffles, 0 products moved
#   sums of each thread's own: 72 shuffles, 1 products moved
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1
export TRITON_CACHE_DIR="$folder/cache"
cat >"$folder/run.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def summed(q, p_k, p_list, n, count, tau, ROWS: tl.constexpr, MASKED: tl.constexpr):
    i = n * 64 + tl.arange(0, 64)
    column = tl.arange(0, 64)[None, :]
    if MASKED:
        row = tl.load(p_list + i, mask=i < count, other=0)
        k = tl.load(p_k + row[:, None] * 64 + column, mask=(i < count)[:, None], other=0.0)
    else:
        row = tl.load(p_list + i)
        k = tl.load(p_k + row[:, None] * 64 + column)
    u = tl.maximum(tl.dot(q, tl.trans(k)) - tau[:, None], 0.0)
    if ROWS:
        return tl.sum(u, 1)
    else:  # columns 2 i and 2 i + 1 of every eight are thread i's of four
        return tl.sum(tl.sum(tl.reshape(u, (64, 8, 4, 2)), 3), 1)


@triton.jit
def kernel(p_q, p_k, p_list, p_tau, count, passes, ROWS: tl.constexpr):
    row = tl.arange(0, 64)
    q = tl.load(p_q + row[:, None] * 64 + row[None, :])
    tau = tl.load(p_tau + row)
    n_passes = 0
    while n_passes < passes:
        if ROWS:
            total = tl.zeros([64], tl.float32)
        else:
            total = tl.zeros([64, 4], tl.float32)
        for n in tl.range(0, count // 64, num_stages=2):
            total += summed(q, p_k, p_list, n, count, tau, ROWS, False)
        for n in tl.range(count // 64, tl.cdiv(count, 64), num_stages=2):
            total += summed(q, p_k, p_list, n, count, tau, ROWS, True)
        tau += total if ROWS else tl.sum(total, 1)
        n_passes += 1
    tl.store(p_tau + row, tau)


TYPES = dict(p_q="*bf16", p_k="*bf16", p_list="*i32", p_tau="*fp32", count="i32", passes="i32", ROWS="constexpr")
NAMES = {True: "row sums", False: "sums of each thread's own"}
counts = {}
for rows in (True, False):
    source = ASTSource(kernel, TYPES, {"ROWS": rows})
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
    moved = sum("convert_layout" in line and "64x64xf32" in line for line in asm["ttgir"].splitlines())
    counts[rows] = asm["ptx"].count("shfl.sync"), moved
    print(f"{NAMES[rows]}: {counts[rows][0]} shuffles, {moved} products moved")
assert counts[True][1] == 0 and counts[False][1] == 1
assert counts[False][0] > 4 * counts[True][0] > 0
PY
"$folder/venv/bin/python" "$folder/run.py"
