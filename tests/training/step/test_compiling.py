"""How many processes compile."""

import os

import pytest
import torch._inductor.config as inductor

from training.step.compiling import MOST, compile_workers, share_cores


@pytest.mark.parametrize(
    ("ranks", "cores", "node_cores", "workers"),
    [(1, 64, 64, MOST), (8, 128, 128, MOST), (8, 32, 32, 4), (8, 4, 32, 4), (8, 2, 2, 1), (1, 2, 2, 2)],
)
def test_ranks_share_the_cores_of_a_node(ranks: int, cores: int, node_cores: int, workers: int) -> None:
    assert compile_workers(ranks, cores, node_cores) == workers


def test_the_environment_decides_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_threads", 32)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    assert share_cores(1) == inductor.compile_threads == 32
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    assert share_cores(1) == inductor.compile_threads == min(MOST, len(os.sched_getaffinity(0)))
    assert share_cores(1000) == inductor.compile_threads == 1
