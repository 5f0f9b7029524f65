"""Launches of the Triton passes."""

from typing import Any

import torch
from torch import Tensor

from kernels.block_importance.passes import log_sum_exps, spread_weights
from kernels.block_importance.tuning import importance_launch
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)


def rate(
    q: Tensor, k: Tensor, first_key: Tensor, position: Tensor, alibi_slopes: Tensor | None, compress_length: int,
    compress_stride: int, block_size: int, n_blocks: int, select_local: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Arguments and result as of `block_importance_scores`, where they are checked."""
    sizes = dict(LENGTH=compress_length, STRIDE=compress_stride)
    blocks = dict(SIZE=block_size, LOCAL=select_local or 0, n_blocks=n_blocks)
    return _rate(q, k, first_key, position, alibi_slopes, scale, sizes, blocks)[0]


@bfloat16_as_float32(n_outputs=0)
def _rate(
    q: Tensor, k: Tensor, first_key: Tensor, position: Tensor, alibi_slopes: Tensor | None, scale: float,
    sizes: dict[str, int], blocks: dict[str, int],
) -> tuple[Tensor]:  # fmt: skip
    q, k, first_key, position = map(unit_stride, (q, k, first_key, position))
    (batch, heads, n_queries, head_dim), groups, device = q.shape, k.shape[1], q.device
    found = torch.empty(batch, groups, n_queries, blocks["n_blocks"], dtype=torch.float32, device=device)
    if found.numel() == 0:
        return (found,)
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=device)
    padded_dim = padded_head_dim(head_dim)
    shared: dict[str, Any] = dict(
        p_q=q, p_k=k, p_first=first_key, p_position=position, p_lse=lse,
        p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        stride_first=_row_stride(first_key), stride_position=_row_stride(position),
        scale=scale, n_queries=n_queries, n_keys=k.shape[2], REPEAT=heads // groups, D=head_dim, BD=padded_dim,
        SLOPES=alibi_slopes is not None, PRECISION=dot_precision(head_dim, q.dtype, device),
        **strides("q", q), **strides("k", k), **sizes,
    )  # fmt: skip
    first, second = (importance_launch(name, padded_dim, q.dtype, device) for name in ("log_sum_exp", "spread"))
    with on_device(q):
        log_sum_exps[(ceil_div(n_queries, first.rows), batch * heads)](
            heads=heads, BM=first.rows, BN=first.keys, STAGES=first.stages, num_warps=first.warps, **shared
        )
        tiles = ceil_div(n_queries, second.rows)
        spread_weights[(ceil_div(blocks["n_blocks"], second.keys), tiles, batch * groups)](
            p_out=found, groups=groups, BM=second.rows, BN=second.keys, STAGES=second.stages, num_warps=second.warps,
            **blocks, **shared,
        )  # fmt: skip
    return (found,)


def _row_stride(x: Tensor) -> int:
    return 0 if len(x) == 1 else x.stride(0)
