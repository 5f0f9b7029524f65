"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): ranks share a sequence, attention exchanges it for heads.

Outside attention each of the S ranks of a group holds n = N / S neighbouring tokens of a packed micro-batch and all
heads. Before attention an all-to-all turns that into all N tokens of H / S heads, after attention back. Rows of scores
stay whole on one rank, which entmax's threshold needs (parts of a row cannot be merged as softmax's can).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from model.config import ModelConfig


# An operator: torch 2.11's compiler loses the gradient of a torch.autograd.Function that holds a collective, and keeps
# what checkpointed blocks compute; torch's functional collectives return a tensor subclass.
@torch.library.custom_op("longsplash::all_to_all", mutates_args=())
def all_to_all(x: Tensor, group: str) -> Tensor:
    """x (S, ...), any dtype: entry i goes to rank i; entry j of the result, of x's shape, is from rank j. Its own
    inverse, and so its own backward. A collective call. group: the name of the process group of S ranks."""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    members = _resolve_process_group(group)  # type: ignore[arg-type]  # a str with a name of its own
    torch.distributed.all_to_all_single(received, x.contiguous(), group=members)
    return received


@all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_to_all(grad, ctx.group), None


all_to_all.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class SequenceShards:
    """The ranks that share a sequence, and this rank's place among them. Rank r holds the r-th slice of the tokens."""

    group: ProcessGroup
    rank: int
    size: int

    def local_tokens(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's slice of x, whose dimension `dim` counts the N tokens of all ranks."""
        return x.chunk(self.size, dim)[self.rank]


@dataclass(frozen=True)
class HeadExchange:
    """Which heads each rank attends with, and the exchange itself.

    KV heads are dealt to ranks in turn (rank r of S has r, r + S, ...), so that neighbouring heads, such as nape's
    ALiBi heads, land on different ranks. With fewer KV heads than ranks, S / G ranks share a KV head, each with a share
    of its query heads. So ranks are (A, C): A = min(G, S) different KV heads at a time, C = S / A ranks a KV head;
    query heads are (M, A, H / (M A C), C) with M = G / A KV heads on a rank.
    """

    shards: SequenceShards
    n_heads: int
    n_kv_heads: int

    @property
    def _sizes(self) -> tuple[int, int, int]:
        distinct = min(self.n_kv_heads, self.shards.size)
        return self.n_kv_heads // distinct, distinct, self.shards.size // distinct  # M, A, C

    def local_heads(self, x: Tensor) -> Tensor:
        """The entries of x (H, ...), one a query head, of this rank's heads: (H / S, ...)."""
        m, a, c = self._sizes
        index_a, index_c = divmod(self.shards.rank, c)
        return x.unflatten(0, (m, a, -1, c))[:, index_a, :, index_c].flatten(0, 1)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (1, H, n, D), k and v (1, G, n, D) -> (1, H / S, N, D) and twice (1, max(1, G / S), N, D)."""
        m, a, c = self._sizes
        # one exchange for all three: [S, n, heads, D]
        parts = [q[0].unflatten(0, (m, a, -1, c)).permute(1, 3, 4, 0, 2, 5).flatten(3, 4).flatten(0, 1)]
        for x in (k, v):
            by_rank = x[0].unflatten(0, (m, a)).permute(1, 2, 0, 3)[:, None]  # [A, 1, n, M, D]
            parts.append(by_rank.expand(-1, c, -1, -1, -1).flatten(0, 1))
        received = self._all_to_all(torch.cat(parts, dim=2)).flatten(0, 1)  # [N, H / S + 2 M, D]
        q, k, v = received.transpose(0, 1)[None].split([part.shape[2] for part in parts], dim=1)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """(1, H / S, N, D) -> (1, H, n, D)."""
        m, a, c = self._sizes
        by_rank = out[0].transpose(0, 1).unflatten(0, (self.shards.size, -1))  # [S, n, H / S, D]
        received = self._all_to_all(by_rank).unflatten(2, (m, -1)).unflatten(0, (a, c))
        return received.permute(2, 3, 0, 4, 1, 5).flatten(1, 4).transpose(0, 1)[None]  # from [A, C, n, M, R, D]

    def _all_to_all(self, x: Tensor) -> Tensor:
        result: Tensor = all_to_all(x, self.shards.group.group_name)
        return result


def check_heads(config: ModelConfig, size: int) -> None:
    """Raises ValueError if the heads of a model cannot be divided among `size` ranks."""
    if size > 1 and config.attention.is_trained_sparse:
        raise ValueError(
            f"parallel.sequence_parallel is {size}: expected 1, since attention.kind {config.attention.kind} does not "
            "run where ranks share sequences"
        )
    if config.n_heads % size:
        raise ValueError(
            f"model.network.n_heads is {config.n_heads}: expected a multiple of parallel.sequence_parallel = {size}, "
            "because each rank attends with its share of the heads"
        )
    heads = config.n_kv_heads
    if heads % size and size % heads:
        raise ValueError(
            f"model.network.n_kv_heads is {heads}: expected a multiple or a divisor of parallel.sequence_parallel = "
            f"{size}"
        )
