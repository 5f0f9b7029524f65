"""One rank of a group that shares sequences, alone on its device: memory and computing of S GPUs measured with one."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from model.config import ModelConfig
from model.sequence_parallel import SequenceShards
from training.parallel import ParallelConfig
from training.sequence_parallel import check_sequence_parallel


class LoopbackGroup(ProcessGroup):
    """A process group of `size` ranks of which only rank 0 exists: what it sends to the others comes back to it.

    Shapes, memory and computing are those of a real group's rank; the values are not, and exchanges take no time.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def alltoall_base(self, output: Tensor, sent: Tensor, *splits_and_options: Any) -> None:
        output.copy_(sent)

    all_to_all_single = alltoall_base  # its name from torch 2.13 on


def first_rank(network: ModelConfig, size: int, tokens: int) -> SequenceShards | None:
    """Rank 0 of `size` ranks that share micro-batches of `tokens` tokens; None for one rank.

    Raises:
        ValueError: heads or tokens cannot be divided among so many ranks.
    """
    check_sequence_parallel(ParallelConfig(sequence_parallel=size), network, tokens, size)
    return None if size == 1 else SequenceShards(LoopbackGroup(size), 0, size)
