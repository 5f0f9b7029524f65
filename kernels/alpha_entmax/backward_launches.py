"""Launches of the backward kernels: what they allocate, and how each pass is called."""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.backward_keys import entmax_backward_keys
from kernels.alpha_entmax.backward_queries import entmax_backward_queries
from kernels.alpha_entmax.column_plan import CUT_FIELDS, PLAN_FIELDS, add_parts, count_columns, plan_columns
from kernels.alpha_entmax.launches import launch_of, shared_arguments
from kernels.alpha_entmax.results import ListBits, entry_dtype, kept_triangular, listed_entries, tile_words
from kernels.alpha_entmax.tuning import PassLaunch
from kernels.common.launching import bfloat16_as_float32, ceil_div, on_device, strides, unit_stride
from kernels.common.tiles import Intervals
from kernels.common.tuning import program_count
from kernels.common.visibility import TILE

# The pass over keys is planned (column_plan.py) past so many queries, and where it follows single ones; shorter ones,
# where three more launches weigh more, have not been timed with a plan
SHORTEST_PLAN = 8192
SHARES_PER_PROGRAM = 2  # of all steps
LEAST_STEPS = 16  # of a share: each part lists its queries anew
ITEMS_PER_PART = 16  # at least, so that sums of parts take a fourth of k's memory in 16 bits
COUNTING_PARTS = 8  # programs that share the queries of 32 key tiles
PLANNED_ITEMS = 1024  # at once
ADDED_ROWS, ADDED_PARTS = 8, 8  # of sums, at once


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
            triangular=int(kept_triangular(lists.key_bits, q.shape[2], k.shape[2])),
            KEYS=self.listed,
            BM=TILE,
            **strides("v", v),
            **strides("o", grad),
        )

    def _run(self, kernel: Any, launch: PassLaunch, n_programs: int, tiles: int, **arguments: Any) -> None:
        """Programs with lists of so many tiles each."""
        entries, dtype = listed_entries(tiles), entry_dtype(tiles)
        kernel[(n_programs,)](
            p_list=torch.empty(n_programs * tiles, dtype=torch.int32, device=self.q.device),
            p_entries=torch.empty(n_programs * entries if self.listed else 0, dtype=dtype, device=self.q.device),
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
        n_tasks, launch = batch * heads * n_blocks, launch_of(self.q, "backward_queries")
        dq, key_bits = torch.empty_like(self.q), self.lists.key_bits
        dalpha = torch.empty((batch, heads, n_blocks) if with_dalpha else 0, dtype=torch.float32, device=self.q.device)
        self._run(
            entmax_backward_queries,
            launch,
            program_count(launch, self.q.device, n_tasks),
            self.n_key_blocks,
            p_counter=self.counters,
            p_out=out,
            p_key_bits=key_bits,
            p_sparse=self.lists.sparse,
            stride_key_bits=key_bits.stride(1) if self.listed else 0,
            n_key_words=self.n_key_blocks * (TILE // 32),
            n_tasks=n_tasks,
            p_dq=dq,
            p_dalpha=dalpha,
            DALPHA=with_dalpha,
            **strides("s", out),
            **strides("d", dq),
        )
        return dq, dalpha

    def _plan(self, launch: PassLaunch, n_programs: int, n_items: int) -> dict[str, Any]:
        """Which items of the pass over keys are cut into which parts; arguments of that pass."""
        heads, words = self.q.shape[0] * self.q.shape[1], tile_words(self.k.shape[2])
        aligned = ceil_div(heads * self.n_key_blocks, 4) * 4  # Triton compiles anew for addresses of no whole 16 bytes
        counts = torch.zeros(2, aligned, dtype=torch.int32, device=self.q.device)
        counted = dict(p_tile_counts=counts[0], p_query_counts=counts[1])
        count_columns[(heads, words, COUNTING_PARTS)](
            p_bits=self.shared["p_bits"],
            p_row_bits=self.lists.row_bits,
            stride_row_bits=self.lists.row_bits.stride(1) if self.listed else 0,
            **counted,
            **{name: self.shared[name] for name in ("n_queries", "n_blocks", "n_words", "triangular", "KEYS")},
            n_key_blocks=self.n_key_blocks,
        )
        max_parts = ceil_div(n_items, ITEMS_PER_PART)
        plan = dict(
            p_parts=torch.empty(max_parts, PLAN_FIELDS.value, dtype=torch.int32, device=self.q.device),
            p_cuts=torch.empty(n_items, CUT_FIELDS.value, dtype=torch.int32, device=self.q.device),
            p_n_parts=torch.empty(1, dtype=torch.int32, device=self.q.device),
        )
        plan_columns[(1,)](
            n_items=n_items,
            n_key_blocks=self.n_key_blocks,
            repeat=self.shared["repeat"],
            max_parts=max_parts,
            shares=SHARES_PER_PROGRAM * n_programs,
            LEAST=LEAST_STEPS,
            BM=TILE,
            STEP=launch.step,
            KEYS=self.listed,
            SIZE=PLANNED_ITEMS,
            **counted,
            **plan,
        )
        sums = torch.empty(max_parts, 2, TILE, self.shared["BD"], dtype=torch.float32, device=self.q.device)
        return counted | plan | dict(p_sums=sums)

    def keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv, in memory that the lists of the pass over queries had, where they fit."""
        dk, dv, row_bits = torch.empty_like(self.k), torch.empty_like(self.v), self.lists.row_bits
        n_items, launch = self.k.shape[0] * self.k.shape[1] * self.n_key_blocks, launch_of(self.q, "backward_keys")
        planned = self.listed or (self.q.shape[2] > SHORTEST_PLAN and n_items > ITEMS_PER_PART)  # else nothing is cut
        n_programs = program_count(launch, self.q.device, 2 * n_items if planned else n_items)  # items may be cut
        plan = dict.fromkeys(("p_tile_counts", "p_query_counts", "p_parts", "p_cuts", "p_n_parts", "p_sums"))
        if planned:
            plan = self._plan(launch, n_programs, n_items)
        self._run(
            entmax_backward_keys,
            launch,
            n_programs,
            self.shared["n_blocks"],
            p_counter=self.counters[1:],
            p_row_bits=row_bits,
            stride_row_bits=row_bits.stride(1) if self.listed else 0,
            p_dk=dk,
            p_dv=dv,
            n_items=n_items,
            n_key_blocks=self.n_key_blocks,
            TRANSPOSED=launch.transposed,
            PLANNED=planned,
            **strides("d", dk),
            **strides("e", dv),
            **plan,
        )
        if planned:
            add_parts[(n_items, TILE // ADDED_ROWS)](
                p_sums=plan["p_sums"],
                p_cuts=plan["p_cuts"],
                p_dk=dk,
                p_dv=dv,
                groups=self.k.shape[1],
                n_keys=self.k.shape[2],
                n_key_blocks=self.n_key_blocks,
                ROWS=ADDED_ROWS,
                AT_ONCE=ADDED_PARTS,
                **{name: self.shared[name] for name in ("D", "BD", "BM")},
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
    shared = shared_arguments(q, k, alpha, scale, alibi_slopes, tau, bits, Intervals(rows, blocks), power)
    passes = _Backward(q, k, v, grad, tau, keys, shared)
    dalpha = torch.zeros_like(alpha)
    with on_device(q):
        dq, parts = passes.queries(out, with_dalpha)
        if with_dalpha:
            dalpha = parts.sum((0, 2))
        return dq, *passes.keys(), dalpha
