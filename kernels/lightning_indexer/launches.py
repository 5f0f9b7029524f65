"""Launches of the Triton passes."""

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
from kernels.lightning_indexer.gradients import gradient_by_key, loss_by_query
from kernels.lightning_indexer.log_sum_exp import attention_log_sum_exp, index_log_sum_exp
from kernels.lightning_indexer.selection import choose_keys, write_scores
from kernels.lightning_indexer.tuning import CHUNK, DIGIT_BITS, IndexerLaunch, indexer_launch

SCORES_AT_ONCE = 2**26  # float32 scores of queries that choose together, 256 MiB


@bfloat16_as_float32(n_outputs=0)
def differentiate_loss(
    index_q: Tensor, index_k: Tensor, weights: Tensor, q: Tensor, k: Tensor, first_key: Tensor, own_key: Tensor,
    chosen: Tensor | None, alibi_slopes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as in `indexer_loss`, where they are checked. Returns the loss, float32 (), and its gradients with
    respect to index_q, index_k and weights, float32."""
    batch, heads, n_queries, _ = q.shape
    dq = torch.zeros(index_q.shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.shape[2] == 0:
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        return loss, dq, torch.zeros_like(index_k, dtype=torch.float32), torch.zeros_like(weights, dtype=torch.float32)
    dk = torch.empty(index_k.shape, dtype=torch.float32, device=q.device)
    dw = torch.empty(weights.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
    index_lse, loss = torch.empty(2, batch, n_queries, dtype=torch.float32, device=q.device).unbind()
    index, attention = _Index(index_q, index_k, weights), AttentionOperands(q, k, alibi_slopes, scale)
    rows = Rows(first_key, own_key, chosen)
    head_dim, dtype = max(index.padded_dim, attention.padded_dim), torch.promote_types(index.dtype, attention.dtype)
    with on_device(q):
        launch = indexer_launch("log_sum_exp", head_dim, dtype, q.device)
        attention_log_sum_exp[(ceil_div(n_queries, launch.rows), batch * heads)](
            p_lse=lse, **attention.arguments, **rows.arguments, **options(launch)
        )
        launch = indexer_launch("query", head_dim, dtype, q.device)
        index_log_sum_exp[(ceil_div(n_queries, launch.rows), batch)](
            p_index_lse=index_lse, n_keys=k.shape[2], **index.arguments, **rows.arguments, **options(launch)
        )
        shared: dict[str, Any] = dict(p_lse=lse, p_index_lse=index_lse)
        shared |= index.arguments | attention.arguments | rows.arguments
        loss_by_query[(ceil_div(n_queries, launch.rows), batch)](
            p_loss=loss, p_dq=dq, p_dw=dw, BH=1 << (index_q.shape[1] - 1).bit_length(), **shared, **options(launch)
        )
        launch = indexer_launch("key", head_dim, dtype, q.device)
        gradient_by_key[(ceil_div(k.shape[2], launch.keys), batch)](
            p_dk=dk, search_steps=n_queries.bit_length(), **shared, **options(launch)
        )
    return loss.sum(), dq, dk, dw


def select(
    index_q: Tensor, index_k: Tensor, weights: Tensor, first_key: Tensor, own_key: Tensor, count: int,
    reach: int | None, score_bits: int,
) -> Tensor:  # fmt: skip
    """Arguments as in `select_keys`, where they are checked, and what it returns."""
    shape = (len(index_q), index_q.shape[2], ceil_div(index_k.shape[1], 8))
    bits = torch.zeros(shape, dtype=torch.uint8, device=index_q.device)
    if bits.numel() > 0:
        with on_device(index_q):
            _fill_bits(index_q, index_k, weights, first_key, own_key, bits, count, reach, score_bits)
    return bits


@bfloat16_as_float32(n_outputs=0)
def _fill_bits(
    index_q: Tensor, index_k: Tensor, weights: Tensor, first_key: Tensor, own_key: Tensor, bits: Tensor, count: int,
    reach: int | None, score_bits: int,
) -> tuple[()]:  # fmt: skip
    (batch, n_queries, n_bytes), n_keys = bits.shape, index_k.shape[1]
    index, rows = _Index(index_q, index_k, weights), Rows(first_key, own_key, None).intervals
    launch = indexer_launch("scores", index.padded_dim, index.dtype, bits.device)
    # columns of a tile of queries begin at its first key, in whole bytes, and end at its last query
    width = ceil_div(7 + (n_keys if reach is None else min(n_keys, reach + launch.rows)), launch.keys) * launch.keys
    step = max(1, SCORES_AT_ONCE // (batch * width * launch.rows)) * launch.rows
    scores = torch.empty(batch * min(step, n_queries) * width, dtype=torch.float32, device=bits.device)
    for start in range(0, n_queries, step):
        stop = min(start + step, n_queries)
        part: dict[str, Any] = dict(p_scores=scores, start_row=start, stop_row=stop, width=width, count=count)
        write_scores[(width // launch.keys, ceil_div(stop - start, launch.rows), batch)](
            n_keys=n_keys, **index.arguments, **rows, **part, **options(launch)
        )
        choose_keys[(stop - start, batch)](
            p_bits=bits, stride_bits=n_bytes, SCORE_BITS=score_bits, DIGIT_BITS=DIGIT_BITS, BM=launch.rows,
            CHUNK=CHUNK, num_warps=4, **rows, **part,
        )  # fmt: skip
    return ()


def options(launch: IndexerLaunch) -> dict[str, int]:
    return dict(BM=launch.rows, BN=launch.keys, STAGES=launch.stages, num_warps=launch.warps)


class _Index:
    """The indexer's operands. In bfloat16 products are exact, and what multiplies them in the gradients is rounded to
    it, as in attention's backward; float16 would lose small differences of weights, so it goes as float32."""

    def __init__(self, q: Tensor, k: Tensor, weights: Tensor):
        half = torch.float16 in (q.dtype, k.dtype)
        self.dtype = torch.bfloat16 if q.dtype == k.dtype == torch.bfloat16 else torch.float32
        q, k = (unit_stride(x.to(self.dtype)) for x in (q, k[:, None]))
        self.padded_dim = padded_head_dim(q.shape[3])
        key = strides("j", k)
        self.arguments: dict[str, Any] = dict(
            p_index_q=q, p_index_k=k, p_weights=weights, stride_jb=key["stride_jb"], stride_jt=key["stride_jt"],
            INDEX_HEADS=q.shape[1], ID=q.shape[3], BID=self.padded_dim,
            INDEX_PRECISION=dot_precision(self.padded_dim, self.dtype, q.device, enlarged=not half),
            **strides("i", q), **strides("w", weights),
        )  # fmt: skip


class AttentionOperands:
    def __init__(self, q: Tensor, k: Tensor, alibi_slopes: Tensor | None, scale: float):
        q, k = unit_stride(q), unit_stride(k)
        self.dtype, self.padded_dim = q.dtype, padded_head_dim(q.shape[3])
        self.arguments: dict[str, Any] = dict(
            p_q=q, p_k=k, p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(), scale=scale,
            n_keys=k.shape[2], HEADS=q.shape[1], REPEAT=q.shape[1] // k.shape[1], D=q.shape[3], BD=self.padded_dim,
            BIAS=alibi_slopes is not None, PRECISION=dot_precision(self.padded_dim, q.dtype, q.device, enlarged=True),
            **strides("q", q), **strides("k", k),
        )  # fmt: skip


class Rows:
    def __init__(self, first_key: Tensor, own_key: Tensor, chosen: Tensor | None):
        self.intervals: dict[str, Any] = dict(
            p_first=first_key.contiguous(), p_own=own_key.contiguous(), n_queries=own_key.shape[1],
            stride_rows=0 if len(own_key) == 1 else own_key.shape[1],
        )  # fmt: skip
        self.arguments: dict[str, Any] = self.intervals | dict(
            p_bits=None if chosen is None else chosen.contiguous(), CHOSEN=chosen is not None,
            stride_bits=0 if chosen is None else chosen.shape[2],
        )  # fmt: skip
