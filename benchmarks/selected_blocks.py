"""The suite "selected": attention over blocks that each query selects, against FlexAttention and dense peers.

Selections are as of Native Sparse Attention. FlexAttention gets the same one as a mask, and reads what any of 128
neighbouring queries selects. The dense peers attend to all keys. A row that fails says so, and the others are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import TOLERANCE, CheckFailed, measure_extra_bytes, measure_time, relative_error
from benchmarks.peers import PEERS
from benchmarks.workloads import Workload, gaussian
from kernels import selected_block_attention
from kernels.selected_blocks import tuning
from model.block_masks import TILE, block_mask_of_tiles
from model.visible_attention import View, attend_flex

if TYPE_CHECKING:
    from benchmarks.suites import Bench

Forward = Callable[[], Tensor]
BLOCK, COUNT = 64, 16  # the paper's
# tokens, head dim, query heads, key heads
SHAPES = (
    (4096, 64, 8, 4),
    (8192, 64, 8, 4),
    (16384, 64, 8, 4),
    (32768, 64, 8, 4),
    (65536, 64, 8, 4),
    (131072, 64, 8, 4),
    (32768, 128, 8, 2),
)
FLEX_LENGTHS = (4096, 32768)  # each compiles two forwards and a backward
DECODING = (4096, 32768, 131072)  # cached tokens
DECODED_ROWS = 8
SELECTIONS = ("alike", "scattered")
RIVALS = ("flash", "cudnn")  # of all peers
TAIL = 64  # queries whose results are compared with float64
AT_ONCE = 2**28  # scores of blocks drawn at once
COLUMNS = {"T": 6, "D": 3, "H": 2, "G": 2, "selection": 9, "implementation": 14, "forward ms": 10, "ms": 8,
           "ours / it": 9, "MiB": 7, "note": 1}  # fmt: skip


def select(n_tokens: int, groups: int, kind: str, *, seed: int, device: str, queries: int | None = None) -> Tensor:
    """int32 (1, groups, queries, COUNT), first keys of the blocks that the last `queries` (None: all) of n_tokens
    select: the first, its own, the one before and random others, -1 where there are no more. alike: 64 neighbours
    choose nearly the same ones; scattered: each query by itself."""
    generator = torch.Generator(device).manual_seed(seed)
    n_blocks = -(-n_tokens // BLOCK)
    block = torch.arange(n_blocks, device=device)
    found = []
    rows = max(64, AT_ONCE // (groups * n_blocks) // 64 * 64)
    for query in torch.arange(n_tokens - (queries or n_tokens), n_tokens, device=device).split(rows):
        scores = torch.rand(groups, len(query), n_blocks, generator=generator, device=device)
        if kind == "alike":
            shared = torch.rand(groups, -(-len(query) // 64), n_blocks, generator=generator, device=device)
            scores = shared.repeat_interleave(64, 1)[:, : len(query)] + 0.05 * scores
        own = (query // BLOCK)[:, None]
        always = (block == 0) | (block == own) | (block == own - 1)
        best = scores.masked_fill_(always, torch.inf).masked_fill_(block > own, -torch.inf)
        top = best.topk(min(COUNT, n_blocks))
        found.append((top.indices * BLOCK).where(top.values > -torch.inf, -1).int())
    return torch.cat(found, 1)[None]


def ours(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, few: int, backend: str = "auto"
) -> Tensor:
    """few: queries up to which they are taken one by one."""
    before, tuning.FEW_QUERIES = tuning.FEW_QUERIES, few
    try:
        return selected_block_attention(q, k, v, first_key, own_key, block_size=BLOCK, backend=backend)
    finally:
        tuning.FEW_QUERIES = before


def flex(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor) -> Forward:
    """FlexAttention under the mask of the selection, and over the tiles that hold what any of their queries selects."""
    (_, heads, n_queries, _), (groups, n_keys) = q.shape, k.shape[1:3]
    blocks = -(-n_keys // BLOCK)
    selected = torch.zeros(1, groups, n_queries, blocks + 1, dtype=torch.bool, device=q.device)
    selected.scatter_(-1, (first_key // BLOCK).where(first_key >= 0, blocks).long(), True)
    tiles, key_tiles = -(-n_queries // TILE), -(-n_keys // TILE)
    padded = torch.nn.functional.pad(selected[..., :-1], (0, key_tiles * TILE // BLOCK - blocks))
    padded = torch.nn.functional.pad(padded, (0, 0, 0, tiles * TILE - n_queries))
    live = padded.view(1, groups, tiles, TILE, key_tiles, -1).any(-1).any(3).repeat_interleave(heads // groups, 1)
    repeat = heads // groups

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & selected[b, h // repeat, i, j // BLOCK]

    mask, view = block_mask_of_tiles(live, visible, n_queries, n_keys), View(visible, None, own_key, own_key)
    return lambda: attend_flex(q, k, v, view, mask)


def check(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, own_key: Tensor, forward: Forward, gradients: bool = True
) -> None:
    """Raises CheckFailed unless the last queries have what the definition gives in float64, and q, k and v the
    gradients of these queries alone."""
    tail = min(TAIL, q.shape[2])
    exact = [x.detach().double().requires_grad_() for x in (q[:, :, -tail:], k, v)]
    truth = selected_block_attention(
        *exact, first_key[:, :, -tail:], own_key[:, -tail:], block_size=BLOCK, backend="torch"
    )
    out = forward()
    errors = {"out": relative_error(out[:, :, -tail:].detach(), truth.detach())}
    if gradients:
        cotangent = torch.zeros_like(out)
        cotangent[:, :, -tail:] = torch.randn_like(cotangent[:, :, -tail:])
        dq, *of_keys = torch.autograd.grad(out, (q, k, v), cotangent)
        true = torch.autograd.grad(truth, exact, cotangent[:, :, -tail:].double())
        found = (dq[:, :, -tail:], *of_keys)
        errors |= {n: relative_error(a, b) for n, a, b in zip(("dq", "dk", "dv"), found, true, strict=True)}
    wrong = [f"{n} off by {e:.1e}" for n, e in errors.items() if not e <= TOLERANCE[q.dtype][n]]
    if wrong:
        raise CheckFailed(f"wrong: {', '.join(wrong)}")


def selected(bench: Bench) -> None:
    """The suite."""
    title = f"{COUNT} blocks of {BLOCK} keys a query; forward alone, forward and backward"
    bench.report.start("selected", title, COLUMNS)
    for n_tokens, head_dim, heads, groups in SHAPES:
        for kind in SELECTIONS:
            try:
                _one_selection(bench, n_tokens, head_dim, heads, groups, kind)
            except (RuntimeError, ValueError) as error:
                _add(bench, (n_tokens, head_dim, heads, groups), kind, "inputs", note=error_line(error))
    for n_tokens in DECODING:
        _decoding(bench, n_tokens)


def _one_selection(bench: Bench, n_tokens: int, head_dim: int, heads: int, groups: int, kind: str) -> None:
    fresh = bench.fresh()
    q, k, v = gaussian(n_tokens, heads, head_dim, spread=1.0, **fresh)
    q, k, v = (x.requires_grad_() for x in (q, k[:, :groups].contiguous(), v[:, :groups].contiguous()))
    first_key = select(n_tokens, groups, kind, seed=fresh["seed"], device=str(q.device))
    own_key = torch.arange(n_tokens, device=q.device)[None]
    inputs = (q, k, v, first_key, own_key)
    times: dict[str, float] = {}
    shape = (n_tokens, head_dim, heads, groups)

    def one(name: str, prepare: Callable[[], Forward], checked: bool, backward: bool = True) -> None:
        try:
            forward = prepare()
            if checked:
                check(*inputs, forward, backward)
            _add(bench, shape, kind, name, times, *timed(bench, forward, (q, k, v) if backward else ()))
        except Exception as error:  # whatever it is, the other rows count
            _add(bench, shape, kind, name, note=error_line(error))

    one("ours", lambda: lambda: ours(*inputs, few=0), True)
    one("ours by query", lambda: lambda: ours(*inputs, few=2**30), True, backward=False)
    if n_tokens in FLEX_LENGTHS:
        one("FlexAttention", lambda: flex(*inputs), True)
    for key in [key for key in RIVALS if key in bench.peers and kind == SELECTIONS[0]]:
        one(f"{PEERS[key].name}, dense", lambda key=key: PEERS[key].prepare(Workload("", q, k, v)), False)  # type: ignore[misc]


def _decoding(bench: Bench, n_tokens: int) -> None:
    """One query of each of several texts, without gradients."""
    heads, groups, head_dim = 8, 4, 64
    shape, times = (n_tokens, head_dim, heads, groups), {}
    fresh = bench.fresh()
    device, dtype = fresh["device"], fresh["dtype"]
    q = torch.randn(DECODED_ROWS, heads, 1, head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, DECODED_ROWS, groups, n_tokens, head_dim, device=device, dtype=dtype)
    first_key = torch.cat(
        [
            select(n_tokens, groups, "scattered", seed=fresh["seed"] + i, device=device, queries=1)
            for i in range(DECODED_ROWS)
        ]
    )
    own_key = torch.full((DECODED_ROWS, 1), n_tokens - 1, device=device)
    inputs = (q, k, v, first_key, own_key)

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def by_query() -> Tensor:
        return ours(*inputs, few=tuning.FEW_QUERIES)

    for name, forward in (("ours", by_query), ("SDPA, dense", dense)):
        try:
            if forward is by_query:
                check(*inputs, forward, gradients=False)
            _add(bench, shape, "decoding", name, times, *timed(bench, forward, ()))
        except Exception as error:
            _add(bench, shape, "decoding", name, note=error_line(error))


def timed(bench: Bench, forward: Forward, wanted: tuple[Tensor, ...]) -> tuple[float, float | None, int]:
    """Milliseconds of forward alone under no_grad, of forward and backward (None without `wanted`), peak bytes."""

    def alone() -> None:
        with torch.no_grad():
            forward()

    if not wanted:
        return measure_time(alone, bench.repeats).median, None, measure_extra_bytes(alone)
    cotangent = torch.randn_like(forward().detach())

    def both() -> None:
        torch.autograd.grad(forward(), wanted, cotangent)

    extra = measure_extra_bytes(both)
    return measure_time(alone, bench.repeats).median, measure_time(both, bench.repeats).median, extra


def _add(
    bench: Bench, shape: tuple[int, int, int, int], selection: str, name: str, times: dict[str, float] | None = None,
    forward: float | None = None, both: float | None = None, extra: int | None = None, note: str = "",
) -> None:  # fmt: skip
    """times: to compare with, milliseconds of ours and of ours forward alone, which its row leaves."""
    ratio = None
    if times is not None and name == "ours":
        times.update({key: ms for key, ms in (("both", both), ("forward", forward)) if ms is not None})
    elif times is not None:
        mine, its = (times.get("both"), both) if both is not None else (times.get("forward"), forward)
        ratio = mine / its if mine and its else None
    row: dict[str, Any] = dict(zip(("T", "D", "H", "G"), shape, strict=True))
    row |= {"dtype": str(bench.dtype).removeprefix("torch."), "selection": selection, "implementation": name,
            "forward ms": forward, "ms": both, "ours / it": ratio, "MiB": None if extra is None else extra / 2**20,
            "note": note}  # fmt: skip
    bench.report.add(row)


def error_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
