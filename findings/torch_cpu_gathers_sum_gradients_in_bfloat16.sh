#!/usr/bin/env bash
# torch 2.13.0, CPU. Guess: what reads one bfloat16 value many times sums its gradients alike, in float32 with one rounding
# at the end, as reductions do. Seen: x[index], index_select, take and embedding add in bfloat16, so that 4,096 gradients of
# 1 make 256, where 256 + 1 rounds to 256; gather, expand and repeat_interleave of the same values make 4,096.
# Output seen:
#   x[index] 256, index_select 256, take 256, embedding 256, gather 4096, expand 4096, repeat_interleave 4096
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch

N = 4096
index = torch.zeros(N, dtype=torch.int64)
ways = {
    "x[index]": lambda x: x[index],
    "index_select": lambda x: x.index_select(0, index),
    "take": lambda x: x.take(index),
    "embedding": lambda x: torch.nn.functional.embedding(index, x[:, None]),
    "gather": lambda x: x.gather(0, index),
    "expand": lambda x: x.expand(N),
    "repeat_interleave": lambda x: x.repeat_interleave(N, 0),
}
found = {}
for name, read in ways.items():
    x = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    out = read(x)
    out.backward(torch.ones_like(out))
    found[name] = int(x.grad.item())
print(", ".join(f"{name} {total}" for name, total in found.items()))
exact = {"gather", "expand", "repeat_interleave"}
assert found == {name: N if name in exact else 256 for name in ways}, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py"
