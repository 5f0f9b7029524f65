"""Launches of the Triton passes. What is held in between is bounded: more queries are taken in several parts."""

from typing import Any

import torch
from torch import Tensor

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
from kernels.selected_blocks import tuning
from kernels.selected_blocks.backward import backward_by_key, row_products, sum_parts
from kernels.selected_blocks.forward import attend_by_key, attend_by_query, merge_slots
from kernels.selected_blocks.readers import FIELDS, list_readers
from kernels.selected_blocks.tuning import selected_launch

PART_ELEMENTS = 2**28  # float32 values of rows' shares held at once, 1 GiB


@bfloat16_as_float32(n_outputs=1)
def attend(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, alibi_slopes: Tensor | None, block_size: int,
    n_blocks: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as in `selected_block_attention`, where they are checked. Returns out (B, H, n, D) and the scores'
    log-sum-exps, of base 2, float32 (B, H, n), -inf where a row reads nothing."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0 or first_key.shape[3] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    shared = _Shared(q, k, block_size, scale, alibi_slopes)
    with on_device(q):
        if batch * n_queries <= tuning.FEW_QUERIES:
            _by_query(shared, q, k, v, first_key.contiguous(), own_key.int().contiguous(), out, lse)
            return out, lse
        for part in shared.parts("key", first_key):
            rows = first_key[:, :, part].contiguous(), own_key[:, part].int().contiguous()
            _by_key(shared, q[:, :, part], k, v, *rows, n_blocks, out[:, :, part], lse[:, :, part])
    return out, lse


@bfloat16_as_float32(n_outputs=3)
def differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first_key: Tensor, own_key: Tensor,
    alibi_slopes: Tensor | None, block_size: int, n_blocks: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, from what `attend` took and gave and the gradient of its output."""
    grad, q, k, v = unit_stride(grad), unit_stride(q), unit_stride(k), unit_stride(v)
    dq = torch.empty_like(q)
    if q.numel() == 0 or k.numel() == 0 or first_key.shape[3] == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    shared = _Shared(q, k, block_size, scale, alibi_slopes)
    parts = shared.parts("backward", first_key)
    # sums over several parts of the queries are float32
    dk, dv = (torch.empty_like(x, dtype=x.dtype if len(parts) == 1 else torch.float32) for x in (k, v))
    with on_device(q):
        delta = row_deltas(grad, out)
        for i, part in enumerate(parts):
            rows = q[:, :, part], grad[:, :, part], lse[:, :, part], delta[:, :, part]
            blocks = first_key[:, :, part].contiguous(), own_key[:, part].int().contiguous()
            _backward(shared, *rows, k, v, *blocks, n_blocks, dq[:, :, part], dk, dv, add=i > 0)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _Shared:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, block_size: int, scale: float, alibi_slopes: Tensor | None):
        self.dtype, self.device, self.head_dim = q.dtype, q.device, q.shape[3]
        self.padded_dim = padded_head_dim(self.head_dim)
        self.batch, self.groups, self.n_keys, _ = k.shape
        self.repeat = q.shape[1] // self.groups
        self.block_size, self.scale = block_size, scale
        self.slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()

    def launch(self, design: str) -> TileLaunch:
        return selected_launch(design, self.padded_dim, self.dtype, self.device)

    def key_tile(self, design: str) -> int:
        return key_tile(self.launch(design), self.block_size)

    def chunks(self, design: str) -> int:
        """Tiles of keys in a block."""
        return ceil_div(self.block_size, self.key_tile(design))

    def parts(self, design: str, first_key: Tensor) -> list[slice]:
        """Of the queries, each with no more than PART_ELEMENTS values of rows' shares."""
        batch, groups, n_queries, count = first_key.shape
        one = batch * groups * self.repeat * count * self.chunks(design) * self.head_dim
        step = max(1, PART_ELEMENTS // one)
        return [slice(start, min(start + step, n_queries)) for start in range(0, n_queries, step)]

    def attention(self, design: str, own_key: Tensor) -> dict[str, Any]:
        """Arguments of the passes with scores."""
        launch = self.launch(design)
        return dict(
            p_own=own_key,
            p_slopes=self.slopes,
            stride_own=0 if len(own_key) == 1 else own_key.stride(0),
            scale=self.scale,
            n_queries=own_key.shape[1],
            n_keys=self.n_keys,
            groups=self.groups,
            SIZE=self.block_size,
            D=self.head_dim,
            BD=self.padded_dim,
            BN=self.key_tile(design),
            REPEAT=self.repeat,
            BM=max(launch.rows, 1 << (self.repeat - 1).bit_length()) if design == "query" else launch.rows,
            BIAS=self.slopes is not None,
            PRECISION=dot_precision(self.head_dim, self.dtype, self.device),
            STAGES=launch.stages,
            num_warps=launch.warps,
        )


def _by_query(
    shared: _Shared, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, out: Tensor, lse: Tensor
) -> None:
    attend_by_query[(q.shape[2], shared.batch * shared.groups)](
        p_q=q, p_k=k, p_v=v, p_first=first_key, p_out=out, p_lse=lse, count=first_key.shape[3],
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("o", out),
        **shared.attention("query", own_key),
    )  # fmt: skip


def _by_key(
    shared: _Shared, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, n_blocks: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Fills out (B, H, n, D) and lse (B, H, n)."""
    readers, chunks = list_readers(first_key, shared.n_keys, n_blocks), shared.chunks("key")
    part_lse = torch.empty(*first_key.shape, chunks, shared.repeat, dtype=torch.float32, device=q.device)
    part_out = torch.empty(*part_lse.shape, shared.head_dim, dtype=torch.float32, device=q.device)
    attend_by_key[(len(readers.parts), chunks)](
        p_q=q, p_k=k, p_v=v, p_order=readers.order, p_parts=readers.parts, p_part_out=part_out, p_part_lse=part_lse,
        count=first_key.shape[3], FIELDS=FIELDS,
        **strides("q", q), **strides("k", k), **strides("v", v), **shared.attention("key", own_key),
    )  # fmt: skip
    _merge(shared, part_out, part_lse, first_key, out, lse, 1.0)


def _merge(
    shared: _Shared, parts: Tensor, part_lse: Tensor | None, first_key: Tensor, out: Tensor, lse: Tensor | None,
    factor: float,
) -> None:  # fmt: skip
    """part_lse, lse: of softmax averages, None for sums."""
    launch, slots = shared.launch("merge"), first_key.shape[3] * parts.shape[4]
    n_rows = shared.batch * shared.groups * first_key.shape[2] * shared.repeat
    merge_slots[(ceil_div(n_rows, launch.rows),)](
        p_parts=parts, p_part_lse=part_lse, p_first=first_key, p_out=out, p_lse=lse, factor=factor, n_rows=n_rows,
        n_queries=first_key.shape[2], n_keys=shared.n_keys, groups=shared.groups, count=first_key.shape[3],
        CHUNKS=parts.shape[4], D=shared.head_dim, BD=shared.padded_dim, REPEAT=shared.repeat, BM=launch.rows,
        BS=1 << (slots - 1).bit_length(), SOFTMAX=part_lse is not None, num_warps=launch.warps,
        **strides("o", out), **strides("l", out if lse is None else lse),
    )  # fmt: skip


def row_deltas(grad: Tensor, out: Tensor) -> Tensor:
    """float32 (B, H, n): the mean of dP with weights p, from the gradient of the output, (B, H, n, D), and it."""
    delta = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    padded_dim = padded_head_dim(grad.shape[3])
    launch = selected_launch("merge", padded_dim, grad.dtype, grad.device)
    row_products[(ceil_div(delta.numel(), launch.rows),)](
        p_a=grad, p_b=out, p_sums=delta, n_rows=delta.numel(), n_queries=grad.shape[2], heads=grad.shape[1],
        D=grad.shape[3], BD=padded_dim, BM=launch.rows, num_warps=launch.warps,
        **strides("a", grad), **strides("b", out),
    )  # fmt: skip
    return delta


def _backward(
    shared: _Shared, q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, first_key: Tensor,
    own_key: Tensor, n_blocks: int, dq: Tensor, dk: Tensor, dv: Tensor, add: bool,
) -> None:  # fmt: skip
    """Fills dq, and fills dk and dv or adds to them. lse, delta: with one set of strides."""
    readers = list_readers(first_key, shared.n_keys, n_blocks)
    chunks, tile = shared.chunks("backward"), shared.key_tile("backward")
    of_rows = (*first_key.shape, chunks, shared.repeat, shared.head_dim)
    of_keys = (2, len(readers.parts), chunks * tile, shared.head_dim)
    part_dq = torch.empty(of_rows, dtype=torch.float32, device=q.device)
    part_dk, part_dv = torch.empty(of_keys, dtype=torch.float32, device=q.device).unbind()
    backward_by_key[(len(readers.parts), chunks)](
        p_q=q, p_k=k, p_v=v, p_grad=grad, p_lse=lse, p_delta=delta, p_order=readers.order, p_parts=readers.parts,
        p_part_dq=part_dq, p_part_dk=part_dk, p_part_dv=part_dv, count=first_key.shape[3], FIELDS=FIELDS,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("g", grad), **strides("s", lse),
        **shared.attention("backward", own_key),
    )  # fmt: skip
    _merge(shared, part_dq, None, first_key, dq, None, shared.scale)
    sum_parts[(ceil_div(shared.n_keys, tile), shared.batch * shared.groups)](
        p_part_dk=part_dk, p_part_dv=part_dv, p_parts=readers.parts, p_starts=readers.starts, p_dk=dk, p_dv=dv,
        n_keys=shared.n_keys, groups=shared.groups, SIZE=shared.block_size, SPAN=chunks * tile, D=shared.head_dim,
        BD=shared.padded_dim, BN=tile, FIELDS=FIELDS, ADD=add, num_warps=4, **strides("k", dk), **strides("v", dv),
    )  # fmt: skip
