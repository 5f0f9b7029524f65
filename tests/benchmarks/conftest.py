from collections.abc import Iterator

import pytest
import torch.distributed

from tests.eval.conftest import corpus, make_run

__all__ = ["corpus", "make_run"]


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """benchmarks/loopback.py makes one that only its benchmarks can use."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
