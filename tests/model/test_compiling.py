"""How many processes compile."""

import os
from collections.abc import Iterator

import pytest
import torch._inductor.config as inductor

from model import softmax
from model.compiling import MOST, compile_workers, share_cores
from tests.model.test_transformer import make, tiny


@pytest.fixture(autouse=True)
def as_torch_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a node of 64 cores. monkeypatch would delete the setting afterwards."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with inductor.patch(compile_threads=32):
        yield


@pytest.mark.parametrize(
    ("ranks", "cores", "node_cores", "workers"),
    [(1, 64, 64, MOST), (8, 128, 128, MOST), (8, 32, 32, 4), (8, 4, 32, 4), (8, 2, 2, 1), (1, 2, 2, 2)],
)
def test_ranks_share_the_cores_of_a_node(ranks: int, cores: int, node_cores: int, workers: int) -> None:
    assert compile_workers(ranks, cores, node_cores) == workers


def test_the_environment_decides_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    assert share_cores(1) == inductor.compile_threads == 32
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    assert share_cores(1) == inductor.compile_threads == min(MOST, len(os.sched_getaffinity(0)))
    assert share_cores(1000) == inductor.compile_threads == 1


def test_the_fewest_of_several_calls_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training tells its ranks, the model below it does not know of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert [share_cores(ranks) for ranks in (1, 32, 1)] == [MOST, 2, 2]


def flex_attention() -> None:
    softmax.compiled_flex.__wrapped__()


@pytest.mark.parametrize("compiled", [flex_attention, make(tiny()).compile_blocks])
def test_what_is_compiled_without_training_takes_few_workers(compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = []
    monkeypatch.setattr(softmax, "flex_attention", lambda *_, **__: workers.append(inductor.compile_threads))
    for name in ("torch.compile", "torch.nn.Module.compile"):
        monkeypatch.setattr(name, lambda *_, **__: workers.append(inductor.compile_threads))
    compiled()
    assert workers and max(workers) <= MOST
