"""Launches of the forward kernels: what they allocate, and how each pass is called."""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.refine import entmax_refine
from kernels.alpha_entmax.results import (
    Thresholds,
    WeightedSum,
    empty_sum,
    empty_thresholds,
    entry_dtype,
    kept_triangular,
    listed_entries,
    tile_words,
)
from kernels.alpha_entmax.scan import entmax_scan
from kernels.alpha_entmax.sum import entmax_sum
from kernels.alpha_entmax.threshold import MAX_STEPS, TOLERANCE
from kernels.alpha_entmax.tuning import PassLaunch, pass_launch, scan_launch
from kernels.common.key_lists import MARK_WORDS
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)
from kernels.common.tiles import BLOCK_FIELDS, LIST_CHUNK, Intervals, write_intervals
from kernels.common.tuning import Launch, program_count
from kernels.common.visibility import TILE


def shared_arguments(
    q: Tensor,
    k: Tensor,
    alpha: Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
    tau: Tensor,
    bits: Tensor,
    intervals: Intervals,
    power: str,
) -> dict[str, Any]:
    """Arguments of every pass, forward and backward."""
    head_dim = q.shape[3]
    return dict(
        p_q=q,
        p_k=k,
        p_alpha=alpha.contiguous(),
        p_tau=tau,
        p_bits=bits,
        scale=scale,
        n_words=tile_words(k.shape[2]),
        heads=q.shape[1],
        repeat=q.shape[1] // k.shape[1],
        n_queries=q.shape[2],
        n_keys=k.shape[2],
        n_blocks=intervals.blocks.shape[1],
        batch_step=int(intervals.rows.shape[1] > 1),
        stride_rows=intervals.rows.stride(0),
        p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        p_rows=intervals.rows,
        p_blocks=intervals.blocks,
        D=head_dim,
        BD=padded_head_dim(head_dim),
        LIST_CHUNK=LIST_CHUNK,
        FIELDS=BLOCK_FIELDS,
        BIAS=alibi_slopes is not None,
        POWER=power,
        PRECISION=dot_precision(head_dim, q.dtype, q.device),
        **strides("q", q),
        **strides("k", k),
    )


def launch_of(q: Tensor, name: str) -> PassLaunch:
    return pass_launch(name, padded_head_dim(q.shape[3]), q.dtype, q.device)


class _Forward:
    """The three passes of a forward: scan, refine and sum run one after another. shared: arguments of all of them."""

    def __init__(self, q: Tensor, k: Tensor, found: Thresholds, stats: bool, shared: dict[str, Any]) -> None:
        self.q, self.k, self.found, self.stats, self.shared = q, k, found, stats, shared
        self.keys = found.sparse.numel() > 0
        self.capacity = ceil_div(ceil_div(k.shape[2], TILE), 32) * 32  # tiles of a list
        self.counters = torch.zeros(3, dtype=torch.int32, device=q.device)

    def _programs(self, launch: Launch, tiles: int) -> tuple[int, int]:
        """Programs, and tasks of `tiles` query tiles."""
        n_tasks = ceil_div(self.shared["n_blocks"], tiles) * self.q.shape[0] * self.q.shape[1]
        return program_count(launch, self.q.device, n_tasks), n_tasks

    def _empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def _flags(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.uint8, device=self.q.device)

    def scan(self, skip_far: bool) -> None:
        launch = scan_launch(self.shared["BD"], self.q.dtype, self.q.device)
        n_programs, n_tasks = self._programs(launch, launch.tiles)
        norms = torch.linalg.vector_norm(self.k, dim=-1, dtype=torch.float32).amax(-1) if skip_far else None
        entmax_scan[(n_programs,)](
            p_key_norms=norms,
            p_flags=self._flags(n_programs * launch.tiles * self.capacity),
            p_counter=self.counters,
            n_tasks=n_tasks,
            capacity=self.capacity,
            TILE=TILE,
            ROWS=launch.tiles * TILE,
            SPAN=launch.span,
            FOLD=launch.fold,
            CHUNK=32 // launch.span,
            SKIP_FAR=skip_far,
            STAGES=launch.stages,
            **launch.options,
            **self.shared,
        )

    def _over_lists(self, launch: PassLaunch, counter: Tensor) -> tuple[int, dict[str, Any]]:
        """Programs and arguments of a pass over what the scan marked."""
        n_programs, n_tasks = self._programs(launch, 1)
        entries = listed_entries(self.capacity)
        return n_programs, dict(
            p_list=self._empty(n_programs, self.capacity),
            p_keys=self._empty(n_programs * entries if self.keys else 0, dtype=entry_dtype(self.capacity)),
            key_capacity=entries,
            stride_key_bits=self.found.key_bits.stride(1) if self.keys else 0,
            triangular=int(kept_triangular(self.found.key_bits, self.q.shape[2], self.k.shape[2])),
            p_counter=counter,
            p_key_bits=self.found.key_bits,
            p_sparse=self.found.sparse,
            p_last=self.found.last,
            stride_last=self.found.last.stride(0),
            n_tasks=n_tasks,
            n_key_words=ceil_div(self.k.shape[2], TILE) * (TILE // 32),
            capacity=self.capacity,
            BM=TILE,
            STATS=self.stats,
            KEYS=self.keys,
            STAGES=launch.stages,
            **launch.options,
            **self.shared,
        )

    def refine(self, tolerance: float) -> None:
        n_programs, arguments = self._over_lists(launch_of(self.q, "refine"), self.counters[1:])
        rows = self.found.row_bits.numel() > 0
        marks = (self.capacity // 2 + 1) * MARK_WORDS.value if self.keys else self.capacity // 32 + 2
        entmax_refine[(n_programs,)](
            p_flags=self._flags(n_programs * self.capacity),
            p_marks=self._empty(n_programs, marks),
            p_row_bits=self.found.row_bits,
            stride_row_bits=self.found.row_bits.stride(1) if rows else 0,
            p_passes=self.found.passes,
            tolerance=tolerance,
            MAX_STEPS=MAX_STEPS,
            ROWS=rows,
            **arguments,
        )

    def sum(self, v: Tensor, result: WeightedSum) -> None:
        launch = launch_of(self.q, "sum")
        n_programs, arguments = self._over_lists(launch, self.counters[2:])
        entmax_sum[(n_programs,)](
            p_v=v,
            p_flags=self._flags(n_programs * self.capacity if self.stats else 0),
            p_marks=self._empty(n_programs, self.capacity // 32 + 2 if self.stats else 0),
            p_out=result.out,
            p_final_tau=result.tau,
            p_support=result.support,
            p_live=result.live,
            STEP=launch.step,
            **strides("v", v),
            **strides("o", result.out),
            **arguments,
        )


def _passes(
    q: Tensor, k: Tensor, alpha: Tensor, scale: float, power: str, alibi_slopes: Tensor | None, found: Thresholds,
    stats: bool,
) -> _Forward | None:  # fmt: skip
    """None where no query sees a key."""
    if q.numel() == 0 or k.shape[2] == 0:
        return None
    intervals = Intervals(found.rows, found.blocks)
    return _Forward(
        q, k, found, stats, shared_arguments(q, k, alpha, scale, alibi_slopes, found.tau, found.bits, intervals, power)
    )


def _find(
    q: Tensor, k: Tensor, alpha: Tensor, scale: float, power: str, causal: bool, cu_seqlens: Tensor | None,
    kv_lens: Tensor | None, alibi_slopes: Tensor | None, window: int | None, gradient: bool, stats: bool,
    skip_far: bool,
) -> tuple[_Forward | None, Thresholds]:  # fmt: skip
    found = empty_thresholds(q, k, causal, cu_seqlens, kv_lens, gradient, stats)
    passes = _passes(q, k, alpha, scale, power, alibi_slopes, found, stats)
    if passes is None:
        found.tau.fill_(torch.inf)
        found.passes.zero_()
        return passes, found
    exact = stats or q.dtype == torch.float32
    with on_device(q):
        write_intervals(Intervals(found.rows, found.blocks), k.shape[2], causal, cu_seqlens, kv_lens, window)
        passes.scan(skip_far and alibi_slopes is not None)
        passes.refine(TOLERANCE["float32" if exact else "16 bits"])
    return passes, found


def _sum(passes: _Forward | None, q: Tensor, v: Tensor, stats: bool) -> WeightedSum:
    result = empty_sum(q, stats)
    if passes is None:
        result.out.zero_()
        result.support.zero_()
        result.tau.fill_(torch.inf)
    else:
        with on_device(q):
            passes.sum(v, result)
    return result


@bfloat16_as_float32(n_outputs=0)
def find_thresholds(
    q: Tensor, k: Tensor, alpha: Tensor, scale: float, power: str, causal: bool, cu_seqlens: Tensor | None,
    kv_lens: Tensor | None, alibi_slopes: Tensor | None, window: int | None, gradient: bool, stats: bool,
    skip_far: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as in `kernels.entmax_attention`; alpha float32 (H,). Returns Thresholds.

    power: from `power_of`. gradient: keep what backward needs. skip_far: leave out tiles that position bias rules out.
    """
    q, k = unit_stride(q), unit_stride(k)
    return _find(
        q, k, alpha, scale, power, causal, cu_seqlens, kv_lens, alibi_slopes, window, gradient, stats, skip_far
    )[1]


@bfloat16_as_float32(n_outputs=1)
def weighted_sum(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, tau: Tensor, last: Tensor, bits: Tensor, key_bits: Tensor,
    row_bits: Tensor, sparse: Tensor, passes: Tensor, rows: Tensor, blocks: Tensor, scale: float, power: str,
    alibi_slopes: Tensor | None, gradient: bool, stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The pass after find_thresholds, whose results it takes and leaves as they are. Returns WeightedSum."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    bits = bits.clone() if stats else bits  # counting unmarks tiles
    found = Thresholds(tau, last, bits, key_bits, row_bits, sparse, passes, rows, blocks)
    return _sum(_passes(q, k, alpha, scale, power, alibi_slopes, found, stats), q, v, stats)


@bfloat16_as_float32(n_outputs=1)
def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """find_thresholds and weighted_sum, with v behind k. Returns WeightedSum and Thresholds, one behind the other."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    passes, found = _find(q, k, *arguments)
    return *_sum(passes, q, v, stats=arguments[9]), *found
