"""Which ranks share a sequence in training; how they do is in model/sequence_parallel.py."""

import torch.distributed
from lightning.pytorch.strategies import Strategy

from model.config import ModelConfig
from model.sequence_parallel import SequenceShards, check_heads
from training.distributed.config import ParallelConfig


def join_sequence_group(strategy: Strategy) -> SequenceShards | None:
    """This rank's place among those that share its sequences; None where none do.

    A collective call: every rank makes it at the same point, after the strategy has started the process group. Ranks
    share sequences where the strategy's samplers give them the same data, whatever the strategy.
    """
    share = getattr(strategy, "distributed_sampler_kwargs", None)  # one device has no such method
    size = torch.distributed.get_world_size() // share["num_replicas"] if share else 1
    if size == 1:
        return None
    group, _ = torch.distributed.new_subgroups(group_size=size)
    return SequenceShards(group, torch.distributed.get_rank(group), size)


def check_sequence_parallel(config: ParallelConfig, network: ModelConfig, tokens: int, processes: int) -> None:
    """Raises ValueError unless `processes` ranks can be divided into groups, and each group can share the heads of the
    model and the `tokens` tokens of a micro-batch."""
    if processes % config.sequence_parallel:
        raise ValueError(
            f"parallel.sequence_parallel is {config.sequence_parallel}: expected a divisor of the {processes} ranks "
            "that trainer.devices x trainer.num_nodes give"
        )
    check_heads(network, config.sequence_parallel)
    if tokens % config.sequence_parallel:
        raise ValueError(
            f"data.micro_batch_size x data.sequence_length is {tokens} tokens: expected a multiple of "
            f"parallel.sequence_parallel = {config.sequence_parallel}, so that each rank holds an equal slice"
        )
