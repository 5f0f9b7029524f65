"""Launches of the Triton passes."""

from typing import Any

import torch
from torch import Tensor

from kernels.block_bias.backward import backward_live_keys, backward_live_queries
from kernels.block_bias.forward import attend_live_blocks, mark_live_blocks
from kernels.block_bias.tiles import BOUNDS
from kernels.block_bias.tuning import block_bias_launch
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)
from kernels.common.tuning import TileLaunch, key_tile
from kernels.selected_blocks.launches import row_deltas

CHUNK = 64  # blocks, or tiles of queries, that are looked at at once


@bfloat16_as_float32(n_outputs=1)
def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor, alibi_slopes: Tensor | None,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as in `block_bias_attention`, where they are checked. Returns out (B, H, n, D) and the scores'
    log-sum-exps, of base 2, float32 (B, H, n), -inf where a row reads nothing."""
    q, k, v, bias = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(bias)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0 or bias.shape[3] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    call = _Call(q, k, v, bias, first_key, own_key, block_size, scale, alibi_slopes)
    with on_device(q):
        live, _ = call.live_blocks()
        attend_live_blocks[(call.n_tiles, call.n_heads)](
            p_live=live, p_list=call.lists_of_blocks(), p_out=out, p_lse=lse, repeat=call.repeat,
            **strides("o", out), **call.attention("forward"),
        )  # fmt: skip
    return out, lse


@bfloat16_as_float32(n_outputs=3)
def differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, first_key: Tensor,
    own_key: Tensor, alibi_slopes: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias, from what `attend` took and gave and the gradient of its output."""
    grad, q, k, v, bias = (unit_stride(x) for x in (grad, q, k, v, bias))
    dq, dk, dv, dbias = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), bias.new_zeros(bias.shape)
    if q.numel() == 0 or k.numel() == 0 or bias.shape[3] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    call = _Call(q, k, v, bias, first_key, own_key, block_size, scale, alibi_slopes)
    with on_device(q):
        live, bounds = call.live_blocks()
        sums = dict(p_grad=grad, p_lse=lse, p_delta=row_deltas(grad, out), p_live=live, **strides("g", grad))
        backward_live_queries[(call.n_tiles, call.n_heads)](
            p_list=call.lists_of_blocks(), p_dq=dq, p_dbias=dbias, repeat=call.repeat,
            **sums, **strides("o", dq), **call.attention("queries"),
        )  # fmt: skip
        tile = call.key_tile("keys")
        grid = (ceil_div(k.shape[2], tile), k.shape[0] * k.shape[1])
        tiles = torch.empty(*grid, call.repeat * call.n_tiles, dtype=torch.int32, device=q.device)
        columns = (tile - 2) // block_size + 2  # of keys anywhere
        backward_live_keys[grid](
            p_bounds=bounds, p_list=tiles, p_dk=dk, p_dv=dv, repeat=call.repeat, n_tiles=call.n_tiles, COLUMNS=columns,
            BOUNDS=BOUNDS, **sums, **strides("d", dk), **strides("e", dv), **call.attention("keys"),
        )  # fmt: skip
    return dq, dk, dv, dbias


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, first_key: Tensor, own_key: Tensor, block_size: int,
        scale: float, alibi_slopes: Tensor | None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.first_key, self.own_key = (x.int().contiguous() for x in torch.broadcast_tensors(first_key, own_key))
        self.block_size, self.scale = block_size, scale
        self.slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        self.repeat, self.n_heads = q.shape[1] // k.shape[1], q.shape[0] * q.shape[1]
        self.rows = self.launch("forward").rows  # of a tile of queries, in all passes
        self.n_tiles = ceil_div(q.shape[2], self.rows)

    def launch(self, design: str) -> TileLaunch:
        n_queries, head_dim = self.q.shape[2:]
        return block_bias_launch(design, n_queries, padded_head_dim(head_dim), self.q.dtype, self.q.device)

    def key_tile(self, design: str) -> int:
        return key_tile(self.launch(design), self.block_size)

    def queries(self) -> dict[str, Any]:
        """Arguments of all passes."""
        return dict(
            p_bias=self.bias,
            p_first=self.first_key,
            p_own=self.own_key,
            stride_row=0 if len(self.own_key) == 1 else self.own_key.stride(0),
            heads=self.q.shape[1],
            n_queries=self.q.shape[2],
            n_keys=self.k.shape[2],
            n_blocks=self.bias.shape[3],
            SIZE=self.block_size,
            BM=self.rows,
            CHUNK=CHUNK,
            **strides("b", self.bias),
        )

    def attention(self, design: str) -> dict[str, Any]:
        """Arguments of the passes with scores."""
        launch, head_dim = self.launch(design), self.q.shape[3]
        return self.queries() | dict(
            p_q=self.q,
            p_k=self.k,
            p_v=self.v,
            p_slopes=self.slopes,
            scale=self.scale,
            D=head_dim,
            BD=padded_head_dim(head_dim),
            BN=self.key_tile(design),
            SLOPES=self.slopes is not None,
            PRECISION=dot_precision(head_dim, self.q.dtype, self.q.device, enlarged=True),
            STAGES=launch.stages,
            num_warps=launch.warps,
            **strides("q", self.q),
            **strides("k", self.k),
            **strides("v", self.v),
        )

    def live_blocks(self) -> tuple[Tensor, Tensor]:
        """Which blocks each tile of queries reads, bytes (B, H, tiles, C), and bounds of the tiles."""
        batch, heads = self.q.shape[:2]
        like: dict[str, Any] = dict(device=self.q.device)
        live = torch.empty(batch, heads, self.n_tiles, self.bias.shape[3], dtype=torch.uint8, **like)
        bounds = torch.empty(batch, self.n_tiles, BOUNDS, dtype=torch.int32, **like)
        mark_live_blocks[(self.n_tiles, self.n_heads)](
            p_live=live, p_bounds=bounds, BOUNDS=BOUNDS, num_warps=4, **self.queries()
        )  # fmt: skip
        return live, bounds

    def lists_of_blocks(self) -> Tensor:
        shape = (self.n_heads, self.n_tiles, self.bias.shape[3])
        return torch.empty(shape, dtype=torch.int32, device=self.q.device)
