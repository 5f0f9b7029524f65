"""torch.compile's worker processes, which compile kernels of blocks and of FlexAttention."""

import os

MOST = 8  # a block has some twenty kernels: more processes cost memory and their start


def compile_workers(ranks: int, cores: int, node_cores: int) -> int:
    """Worker processes of each of a node's ranks. cores: that this process may use; fewer than the node's where it has
    been given its share already, as by Slurm."""
    return min(MOST, max(1, cores // ranks if cores == node_cores else cores))


def share_cores(ranks: int) -> int:
    """Let the ranks of this node compile beside each other: TorchInductor starts up to 32 processes a rank. Without
    effect where TORCHINDUCTOR_COMPILE_THREADS says how many, or fewer are set already. Returns how many it will
    start."""
    import torch._inductor.config as inductor

    most = inductor.compile_threads or 1
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # never more: training tells the ranks first, the model, which compiles FlexAttention, knows of one
        most = min(most, compile_workers(ranks, len(os.sched_getaffinity(0)), os.cpu_count() or 1))
        inductor.compile_threads = most
    return most
