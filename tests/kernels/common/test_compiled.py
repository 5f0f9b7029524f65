"""All Triton kernels compile for other GPUs and fit on them: on any machine, without launching them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_for import SHARED_MEMORY
from tests.kernels.helpers import CUDA

ROOT = Path(__file__).parents[3]
ATTENTION = {
    "key_intervals",
    "entmax_scan",
    "entmax_refine",
    "entmax_sum",
    "entmax_backward_queries",
    "count_columns",
    "plan_columns",
    "entmax_backward_keys",
    "add_parts",
    "decode_scores",
    "decode_threshold",
    "decode_values",
}
UNMOVED = {"entmax_scan", "entmax_refine", "entmax_sum", "entmax_backward_queries"}
SELECTED = {"attend_by_query", "attend_by_key", "merge_slots", "row_products", "backward_by_key", "sum_parts"}
INDEXER = {"attention_log_sum_exp", "index_log_sum_exp", "loss_by_query", "gradient_by_key"}
INDEXER |= {"write_scores", "choose_keys"}
INDEXER |= {"keep_finite", "attend_chosen", "chosen_backward_queries", "chosen_backward_keys"}
BIAS = {"mark_live_blocks", "attend_live_blocks", "backward_live_queries", "backward_live_keys"}
MEANS = {"running_means", "score_means", "score_means_dq", "score_means_dmeans"}
IMPORTANCE = {"log_sum_exps", "spread_weights"}
BLOCKS = {"block_sparse_softmax"} | SELECTED | INDEXER | BIAS | MEANS | IMPORTANCE
ROWS = {"entmax_rows_forward", "entmax_rows_backward"}
# compute capability, what of it (compile_for), kernels: the widest heads that a GPU is promised ask for most. A minute
# each, so the machines that run make test-gpu, which have cores to spare, compile for the other GPUs
EVERYWHERE = [
    ("9.0", ("64-bfloat16", "rows"), ATTENTION | BLOCKS | ROWS),
    ("8.6", ("256-bfloat16",), ATTENTION),
]
WITH_GPU = [
    ("8.0", ("256-bfloat16",), ATTENTION | BLOCKS),
    ("8.6", ("64-bfloat16",), ATTENTION | BLOCKS),
    ("8.6", ("128-float32",), ATTENTION),
    ("8.9", ("128-bfloat16",), ATTENTION | BLOCKS),
    ("9.0", ("256-float32",), ATTENTION),
    ("12.0", ("256-bfloat16",), ATTENTION),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "what", "kernels"),
    [pytest.param(*case, id=f"{case[0]}-{case[1][0]}") for case in EVERYWHERE + WITH_GPU * CUDA],
)
def test_kernels_compile_and_fit(capability: str, what: tuple[str, ...], kernels: set[str]) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_for", capability, *what]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [line.split()[1:] for line in done.stdout.splitlines()]
    assert {name for name, *_ in compiled} == kernels
    assert max(int(size) for _, size, _ in compiled) <= SHARED_MEMORY[capability]
    if capability == "9.0" and what[0] == "64-bfloat16":
        moved = {name: int(count) for name, _, count in compiled}
        assert {name: moved[name] for name in UNMOVED} == dict.fromkeys(UNMOVED, 0)
        assert moved["entmax_backward_keys"] > 0  # behind its loops, to store: what is counted is still called so
