"""Launches of the Triton kernels: what forward and backward allocate, and how each pass is called."""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.backward_keys import entmax_backward_keys
from kernels.alpha_entmax.backward_queries import entmax_backward_queries
from kernels.alpha_entmax.refine import entmax_refine
from kernels.alpha_entmax.results import (
    ForwardResults,
    ListBits,
    forward_outputs,
    is_triangular,
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


def _shared(
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
    """Arguments of every pass."""
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


def _launch(q: Tensor, name: str) -> PassLaunch:
    return pass_launch(name, padded_head_dim(q.shape[3]), q.dtype, q.device)


class _Forward:
    """The three passes of a forward: scan, refine and sum run one after another. shared: arguments of all of them."""

    def __init__(self, q: Tensor, k: Tensor, results: ForwardResults, triangular: bool, shared: dict[str, Any]) -> None:
        self.q, self.k, self.results, self.triangular, self.shared = q, k, results, triangular, shared
        self.stats = results.passes.numel() > 0
        self.keys = results.sparse.numel() > 0
        self.capacity = ceil_div(ceil_div(k.shape[2], TILE), 32) * 32  # tiles of a list
        self.last = torch.empty(2, *results.tau.shape, dtype=torch.float32, device=q.device)
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
            p_keys=self._empty(n_programs * entries if self.keys else 0, dtype=torch.uint16),
            key_capacity=entries,
            stride_key_bits=self.results.key_bits.stride(1) if self.keys else 0,
            triangular=int(self.triangular),
            p_counter=counter,
            p_key_bits=self.results.key_bits,
            p_sparse=self.results.sparse,
            p_last=self.last,
            stride_last=self.last.stride(0),
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
        n_programs, arguments = self._over_lists(_launch(self.q, "refine"), self.counters[1:])
        rows = self.results.row_bits.numel() > 0
        marks = self.capacity * MARK_WORDS.value if self.keys else self.capacity // 32 + 2
        entmax_refine[(n_programs,)](
            p_flags=self._flags(n_programs * self.capacity),
            p_marks=self._empty(n_programs, marks),
            p_row_bits=self.results.row_bits,
            stride_row_bits=self.results.row_bits.stride(1) if rows else 0,
            p_passes=self.results.passes,
            tolerance=tolerance,
            MAX_STEPS=MAX_STEPS,
            ROWS=rows,
            **arguments,
        )

    def sum(self, v: Tensor) -> None:
        results, launch = self.results, _launch(self.q, "sum")
        n_programs, arguments = self._over_lists(launch, self.counters[2:])
        entmax_sum[(n_programs,)](
            p_v=v,
            p_flags=self._flags(n_programs * self.capacity if self.stats else 0),
            p_marks=self._empty(n_programs, self.capacity // 32 + 2 if self.stats else 0),
            p_out=results.out,
            p_support=results.support,
            p_live=results.live,
            STEP=launch.step,
            **strides("v", v),
            **strides("o", results.out),
            **arguments,
        )


@bfloat16_as_float32(n_outputs=1)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    scale: float,
    power: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    gradient: bool,
    stats: bool,
    skip_far: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in `kernels.entmax_attention`; alpha float32 (H,). Returns ForwardResults.

    power: from `power_of`. gradient: keep what backward needs. skip_far: leave out tiles that position bias rules out.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    outputs = forward_outputs(q, k, causal, cu_seqlens, kv_lens, gradient, stats)
    results = ForwardResults(*outputs)
    if results.out.numel() == 0 or k.shape[2] == 0:
        for output in (results.out, results.support, results.passes):
            output.zero_()
        results.tau.fill_(torch.inf)
        return outputs
    intervals = Intervals(results.rows, results.blocks)
    shared = _shared(q, k, alpha, scale, alibi_slopes, results.tau, results.bits, intervals, power)
    passes = _Forward(q, k, results, is_triangular(q.shape[2], k.shape[2], causal, kv_lens), shared)
    exact = stats or q.dtype == torch.float32
    with on_device(q):
        write_intervals(intervals, k.shape[2], causal, cu_seqlens, kv_lens, window)
        passes.scan(skip_far and alibi_slopes is not None)
        passes.refine(TOLERANCE["float32" if exact else "16 bits"])
        passes.sum(v)
    return outputs


class _Backward:
    """The two passes of a backward: queries, which finds delta, then keys. shared: arguments of all passes."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tau: Tensor, lists: ListBits, shared: dict[str, Any]
    ) -> None:
        self.q, self.k, self.v, self.lists, self.shared = q, k, v, lists, shared
        self.listed = lists.row_bits.numel() > 0
        self.n_key_blocks = ceil_div(k.shape[2], TILE)
        self.counters = torch.zeros(2, dtype=torch.int32, device=q.device)
        self.shared |= dict(
            p_v=v,
            p_do=grad,
            p_delta=torch.empty_like(tau),
            p_sparse=lists.sparse,
            triangular=int(kept_triangular(lists.key_bits, q.shape[2], k.shape[2])),
            KEYS=self.listed,
            BM=TILE,
            **strides("v", v),
            **strides("o", grad),
        )

    def _run(self, kernel: Any, launch: PassLaunch, n_tasks: int, tiles: int, **arguments: Any) -> None:
        """Programs with lists of so many tiles each."""
        n_programs, entries = program_count(launch, self.q.device, n_tasks), listed_entries(tiles)
        kernel[(n_programs,)](
            p_list=torch.empty(n_programs * tiles, dtype=torch.int32, device=self.q.device),
            p_entries=torch.empty(n_programs * entries if self.listed else 0, dtype=torch.uint16, device=self.q.device),
            n_tasks=n_tasks,
            capacity=tiles,
            key_capacity=entries,
            STEP=launch.step,
            STAGES=launch.stages,
            **launch.options,
            **self.shared,
            **arguments,
        )

    def queries(self, out: Tensor, with_dalpha: bool) -> tuple[Tensor, Tensor]:
        """dq, and dalpha's part of each query tile, float32 (B, H, query tiles), empty unless with_dalpha."""
        batch, heads, n_blocks = *self.q.shape[:2], self.shared["n_blocks"]
        dq, key_bits = torch.empty_like(self.q), self.lists.key_bits
        dalpha = torch.empty((batch, heads, n_blocks) if with_dalpha else 0, dtype=torch.float32, device=self.q.device)
        self._run(
            entmax_backward_queries,
            _launch(self.q, "backward_queries"),
            batch * heads * n_blocks,
            self.n_key_blocks,
            p_counter=self.counters,
            p_out=out,
            p_key_bits=key_bits,
            stride_key_bits=key_bits.stride(1) if self.listed else 0,
            n_key_words=self.n_key_blocks * (TILE // 32),
            p_dq=dq,
            p_dalpha=dalpha,
            DALPHA=with_dalpha,
            **strides("s", out),
            **strides("d", dq),
        )
        return dq, dalpha

    def keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv, in memory that the lists of the pass over queries had, where they fit."""
        dk, dv, row_bits = torch.empty_like(self.k), torch.empty_like(self.v), self.lists.row_bits
        launch = _launch(self.q, "backward_keys")
        self._run(
            entmax_backward_keys,
            launch,
            self.k.shape[0] * self.k.shape[1] * self.n_key_blocks,
            self.shared["n_blocks"],
            p_counter=self.counters[1:],
            p_row_bits=row_bits,
            stride_row_bits=row_bits.stride(1) if self.listed else 0,
            p_dk=dk,
            p_dv=dv,
            n_key_blocks=self.n_key_blocks,
            TRANSPOSED=launch.transposed,
            **strides("d", dk),
            **strides("e", dv),
        )
        return dk, dv


@bfloat16_as_float32(n_outputs=3)
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    out: Tensor,
    tau: Tensor,
    bits: Tensor,
    key_bits: Tensor,
    row_bits: Tensor,
    sparse: Tensor,
    rows: Tensor,
    blocks: Tensor,
    scale: float,
    power: str,
    alibi_slopes: Tensor | None,
    with_dalpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; dalpha float32 (H,), 0 unless with_dalpha."""
    q, k, v, grad = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(grad)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(alpha)
    keys = ListBits(key_bits, row_bits, sparse)
    shared = _shared(q, k, alpha, scale, alibi_slopes, tau, bits, Intervals(rows, blocks), power)
    passes = _Backward(q, k, v, grad, tau, keys, shared)
    dalpha = torch.zeros_like(alpha)
    with on_device(q):
        dq, parts = passes.queries(out, with_dalpha)
        if with_dalpha:
            dalpha = parts.sum((0, 2))
        return dq, *passes.keys(), dalpha
