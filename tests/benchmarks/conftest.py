from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed

from common.errors import UsageError
from tests.eval.conftest import corpus, make_run

__all__ = ["corpus", "make_run"]
Refused = Callable[[Callable[[], int], list[str]], str]


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """benchmarks/loopback.py makes one that only its benchmarks can use."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line in which a benchmark, given options, ends before it has printed anything, as if torch found a CUDA
    device: refused(main, options)."""

    def said(main: Callable[[], int], options: list[str]) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("sys.argv", ["benchmark", *options])
        try:
            assert main() == 2
            captured = capsys.readouterr()
            found = captured.err
        except UsageError as error:
            captured = capsys.readouterr()
            found = str(error)
        assert len(found.splitlines()) == 1 and not captured.out
        return found

    return said
