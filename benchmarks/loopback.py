"""One rank of a group that shares sequences, alone on its device: memory and computing of S GPUs measured with one."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from model.config import ModelConfig
from model.sequence_parallel import SequenceShards
from training.distributed.config import ParallelConfig
from training.distributed.sequence_parallel import check_sequence_parallel

BACKEND = "loopback"


class LoopbackGroup(dist.ProcessGroup):
    """A process group of which only rank 0 exists: what it sends to the others comes back to it.

    Shapes, memory and computing are those of a real group's rank; the values are not, and exchanges take no time.
    """

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def alltoall_base(self, output: Tensor, sent: Tensor, *splits_and_options: Any) -> dist.Work:
        output.copy_(sent)
        done: Future[Tensor] = Future()
        done.set_result(output)
        return _create_work_from_future(done)

    all_to_all_single = alltoall_base  # its name from torch 2.13 on


def first_rank(network: ModelConfig, size: int, tokens: int) -> SequenceShards | None:
    """Rank 0 of `size` ranks that share micro-batches of `tokens` tokens; None for one rank.

    Makes the default process group, of that size: torch.compile needs one that torch knows by name.

    Raises:
        ValueError: heads or tokens cannot be divided among so many ranks.
    """
    check_sequence_parallel(ParallelConfig(sequence_parallel=size), network, tokens, size)
    if size == 1:
        return None
    if dist.is_initialized() and dist.get_world_size() != size:
        dist.destroy_process_group()
    if not dist.is_initialized():
        if BACKEND not in dist.Backend.backend_list:
            create = lambda store, rank, world_size, timeout: LoopbackGroup(rank, world_size)  # noqa: E731
            dist.Backend.register_backend(BACKEND, create, devices=["cpu", "cuda"])
        dist.init_process_group(BACKEND, rank=0, world_size=size, store=dist.HashStore())
    return SequenceShards(dist.group.WORLD, 0, size)
