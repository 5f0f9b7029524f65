"""All Triton kernels compile for a Hopper GPU and fit on it: on any machine, without launching them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 227 * 1024  # bytes that one program can have on an H100
WHAT = ("64-bfloat16", "128-bfloat16", "64-float32", "rows")
KERNELS = {
    "key_intervals",
    "entmax_scan",
    "entmax_refine",
    "entmax_sum",
    "entmax_backward_queries",
    "entmax_backward_keys",
    "decode_scores",
    "decode_threshold",
    "decode_values",
    "block_sparse_softmax",
    "entmax_rows_forward",
    "entmax_rows_backward",
}


def test_kernels_compile_for_hopper() -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_for", "9.0", *WHAT]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = [line.split()[1:] for line in done.stdout.splitlines()]
    assert {name for name, _ in memory} == KERNELS
    assert max(int(size) for _, size in memory) <= SHARED_MEMORY
