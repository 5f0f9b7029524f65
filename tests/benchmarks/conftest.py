from collections.abc import Iterator

import pytest
import torch.distributed


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """benchmarks/loopback.py makes one that only its benchmarks can use."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
