"""Launches of the Triton passes. Running means are computed again in backward."""

from typing import Any

import torch
from torch import Tensor

from kernels.block_means.passes import running_means, score_means, score_means_dmeans, score_means_dq
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)

# by reasoning, not measured. Queries and keys of a tile; blocks: few of them are many programs' work where sums go over
# queries. Heads past 64 have smaller tiles, since products of float32 hold their operands twice
ROWS, KEYS, BLOCKS, SUMMED_BLOCKS = 64, 64, 32, 16
WIDE_ROWS, WIDE_KEYS = 32, 32
CHUNK = 1024  # queries that are looked at at once


def score(
    q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor, block_start: Tensor, block_ends: Tensor,
    alibi_slopes: Tensor | None, block_size: int, n_blocks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Arguments and result as of `block_mean_scores`, where they are checked."""
    return _score(q, k, first_key, own_key, block_start, alibi_slopes, block_size, n_blocks, scale)[0]


@bfloat16_as_float32(n_outputs=0)
def _score(
    q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor, block_start: Tensor, alibi_slopes: Tensor | None,
    block_size: int, n_blocks: int, scale: float,
) -> tuple[Tensor]:  # fmt: skip
    q, k = unit_stride(q), unit_stride(k)
    scores = torch.full((*q.shape[:3], n_blocks), -torch.inf, dtype=torch.float32, device=q.device)
    if scores.numel() == 0 or k.shape[2] == 0:
        return (scores,)
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    call = _Call(q, k, first_key, own_key, block_size, n_blocks, scale)
    with on_device(q):
        score_means[call.grid](
            p_means=call.means(block_start), p_slopes=slopes, p_scores=scores, SLOPES=slopes is not None,
            repeat=call.repeat, BN=BLOCKS, **call.queries(),
        )  # fmt: skip
    return (scores,)


@bfloat16_as_float32(n_outputs=2)
def differentiate(
    grad: Tensor, q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor, block_start: Tensor, block_ends: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk, from what `score` took and the gradient of its result."""
    grad, q, k = grad.contiguous(), unit_stride(q), unit_stride(k)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    if grad.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_()
    call, n_ends = _Call(q, k, first_key, own_key, block_size, grad.shape[3], scale), len(block_ends)
    shares = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    parts = torch.empty(*q.shape[:2], n_ends, q.shape[3], dtype=torch.float32, device=q.device)
    of_means = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    with on_device(q):
        score_means_dq[call.grid](
            p_grad=grad, p_means=call.means(block_start), p_dq=dq, p_shares=shares, repeat=call.repeat, BN=BLOCKS,
            **strides("o", dq), **call.queries(),
        )  # fmt: skip
        if n_ends:
            score_means_dmeans[(ceil_div(n_ends, SUMMED_BLOCKS), call.grid[1])](
                p_grad=grad, p_ends=block_ends, p_parts=parts, n_ends=n_ends, BN=SUMMED_BLOCKS, CHUNK=CHUNK,
                **call.queries(),
            )  # fmt: skip
        # every index holds one that is not 0: in whichever order they are added, sums are the same
        own = call.own_key.clamp(min=0).long()[:, None, :, None]
        shares, parts = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (shares, parts))  # over a group's heads
        of_means.scatter_add_(2, own.expand_as(shares), shares)
        of_means.index_add_(2, block_ends.clamp(min=0), parts)
        call.run_means(of_means, block_start, dk, backward=True)
    return dq, dk


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor, block_size: int, n_blocks: int, scale: float
    ) -> None:
        self.q, self.k, self.block_size, self.n_blocks, self.scale = q, k, block_size, n_blocks, scale
        self.first_key, self.own_key = (x.int().contiguous() for x in torch.broadcast_tensors(first_key, own_key))
        self.repeat, self.head_dim = q.shape[1] // k.shape[1], q.shape[3]
        self.wide = padded_head_dim(self.head_dim) > 64
        self.rows = WIDE_ROWS if self.wide else ROWS
        self.grid = (ceil_div(q.shape[2], self.rows), q.shape[0] * q.shape[1])
        self.shared: dict[str, Any] = dict(
            SIZE=block_size,
            D=self.head_dim,
            BD=padded_head_dim(self.head_dim),
            PRECISION=dot_precision(self.head_dim, torch.float32, q.device, enlarged=q.dtype == torch.float32),
            num_warps=8 if self.wide else 4,
        )

    def queries(self) -> dict[str, Any]:
        """Arguments of the passes with queries."""
        return self.shared | dict(
            p_q=self.q,
            p_first=self.first_key,
            p_own=self.own_key,
            stride_row=0 if len(self.own_key) == 1 else self.own_key.stride(0),
            scale=self.scale,
            heads=self.q.shape[1],
            n_queries=self.q.shape[2],
            n_keys=self.k.shape[2],
            n_blocks=self.n_blocks,
            BM=self.rows,
            **strides("q", self.q),
        )

    def means(self, block_start: Tensor) -> Tensor:
        """float32 (B, G, keys, D)."""
        means = torch.empty(self.k.shape, dtype=torch.float32, device=self.k.device)
        self.run_means(self.k, block_start, means, backward=False)
        return means

    def run_means(self, x: Tensor, block_start: Tensor, out: Tensor, backward: bool) -> None:
        tile = WIDE_KEYS if self.wide else KEYS
        running_means[(ceil_div(x.shape[2], tile), x.shape[0] * x.shape[1])](
            p_x=x, p_start=block_start, p_out=out, groups=x.shape[1], n_keys=x.shape[2], BN=tile, BACKWARD=backward,
            **strides("x", x), **strides("o", out), **self.shared,
        )  # fmt: skip
