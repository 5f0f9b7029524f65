"""The suite "biased": scoring blocks and attending to them as hierarchical entmax does, against FlexAttention and
dense peers.

Rows "scores" are those of blocks (`block_mean_scores`), the others attention under a bias for each query and block, of
which `live` is the share that is not -inf: all, as with fresh weights, or some, the same for 64 neighbouring queries.
FlexAttention gets the same bias and leaves out tiles of 128 queries without a live block. The dense peers attend to all
keys, of one document of all tokens. A row that fails says so, and the others are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import TOLERANCE, CheckFailed, relative_error
from benchmarks.peers import PEERS
from benchmarks.selected_blocks import Forward, error_line, timed
from benchmarks.workloads import Workload, gaussian
from kernels import block_bias_attention, block_mean_scores
from model.block_masks import TILE, block_mask_of_tiles
from model.config import HierarchicalConfig
from model.hierarchical.blocks import Blocks, packed_blocks
from model.visible_attention import attend_flex

if TYPE_CHECKING:
    from benchmarks.suites import Bench

BLOCK = 64
# tokens, length of documents, head dim, query heads, key heads
SHAPES = (
    (16384, 4096, 64, 8, 4),
    (16384, 16384, 64, 8, 4),
    (32768, 32768, 64, 8, 4),
    (65536, 65536, 64, 8, 4),
    (32768, 32768, 128, 8, 2),
)
FLEX_LENGTHS = (16384, 32768)  # each compiles two forwards and a backward
LIVE = (1.0, 0.25, 0.05)
RIVALS = ("flash", "cudnn")  # of all peers
TAIL = 64  # queries whose results are compared with float64
COLUMNS = {"T": 6, "document": 8, "D": 3, "H": 2, "G": 2, "live": 5, "implementation": 14, "forward ms": 10, "ms": 8,
           "ours / it": 9, "MiB": 7, "note": 1}  # fmt: skip


def biases(blocks: Blocks, heads: int, live: float, *, seed: int, device: str) -> Tensor:
    """float32 (1, heads, n, C): -inf for blocks that are not live, alike for 64 neighbours, whose own block always
    is."""
    generator = torch.Generator(device).manual_seed(seed)
    n, shape = blocks.n_queries, (1, heads, -(-blocks.n_queries // 64), blocks.n_blocks)
    dead = torch.rand(shape, generator=generator, device=device) >= live
    rows = torch.arange(n, device=device)
    dead = dead[:, :, rows // 64] & (torch.arange(blocks.n_blocks, device=device) != blocks.own_block[0, :, None])
    bias = torch.randn(1, heads, n, blocks.n_blocks, generator=generator, device=device)
    return bias.masked_fill_(dead | ~blocks.visible(rows)[:, None], -torch.inf)


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, blocks: Blocks) -> Tensor:
    return block_bias_attention(q, k, v, bias, *blocks.seen_keys, block_size=blocks.size)


def scores(q: Tensor, k: Tensor, blocks: Blocks) -> Tensor:
    return block_mean_scores(
        q, k, *blocks.seen_keys, blocks.block_start, blocks.block_ends, block_size=blocks.size, n_blocks=blocks.n_blocks
    )  # fmt: skip


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, blocks: Blocks) -> Forward:
    """FlexAttention with the same bias, over the tiles with a live block."""
    view = blocks.view(bias, None)
    live = blocks.tiles(bias.detach() != -torch.inf, TILE)
    mask = block_mask_of_tiles(live, view.visible, blocks.n_queries, blocks.n_keys)
    return lambda: attend_flex(q, k, v, view, mask)


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, blocks: Blocks, forward: Forward) -> None:
    """Raises CheckFailed unless the last queries have what the definition gives in float64, and q, k, v and the bias
    the gradients of these queries alone; that of the bias within dq's tolerance."""
    tail = min(TAIL, q.shape[2])
    exact = [x.detach().double().requires_grad_() for x in (q[:, :, -tail:], k, v, bias[:, :, -tail:])]
    seen = (x[:, -tail:] for x in blocks.seen_keys)
    truth = block_bias_attention(*exact, *seen, block_size=blocks.size, backend="torch")
    out = forward()
    cotangent = torch.zeros_like(out)
    cotangent[:, :, -tail:] = torch.randn_like(cotangent[:, :, -tail:])
    dq, dk, dv, dbias = torch.autograd.grad(out, (q, k, v, bias), cotangent)
    true = torch.autograd.grad(truth, exact, cotangent[:, :, -tail:].double())
    found = (out[:, :, -tail:].detach(), dq[:, :, -tail:], dk, dv, dbias[:, :, -tail:])
    names, limits = ("out", "dq", "dk", "dv", "dbias"), TOLERANCE[q.dtype] | {"dbias": TOLERANCE[q.dtype]["dq"]}
    errors = {n: relative_error(a, b) for n, a, b in zip(names, found, (truth.detach(), *true), strict=True)}
    wrong = [f"{n} off by {e:.1e}" for n, e in errors.items() if not e <= limits[n]]
    if wrong:
        raise CheckFailed(f"wrong: {', '.join(wrong)}")


def biased(bench: Bench) -> None:
    """The suite."""
    title = f"a bias for each block of {BLOCK} keys; forward alone, forward and backward"
    bench.report.start("biased", title, COLUMNS)
    for shape in SHAPES:
        try:
            _one_shape(bench, *shape)
        except (RuntimeError, ValueError) as error:
            _add(bench, shape, None, "inputs", note=error_line(error))


def _one_shape(bench: Bench, n_tokens: int, length: int, head_dim: int, heads: int, groups: int) -> None:
    fresh = bench.fresh()
    q, k, v = gaussian(n_tokens, heads, head_dim, spread=1.0, **fresh)
    q, k, v = (x.requires_grad_() for x in (q, k[:, :groups].contiguous(), v[:, :groups].contiguous()))
    bounds = torch.arange(0, n_tokens + 1, length, dtype=torch.int32, device=q.device)
    blocks = packed_blocks(HierarchicalConfig(BLOCK), n_tokens, bounds, length, q.device)
    shape, times = (n_tokens, length, head_dim, heads, groups), dict[str, float]()

    def one(live: float | None, name: str, prepare: Callable[[], Forward], wanted: tuple[Tensor, ...]) -> None:
        try:
            forward = prepare()
            if len(wanted) == 4:
                check(*wanted, blocks, forward)
            _add(bench, shape, live, name, times, *timed(bench, forward, wanted))
        except Exception as error:  # whatever it is, the other rows count
            _add(bench, shape, live, name, note=error_line(error))

    one(None, "scores", lambda: lambda: scores(q, k, blocks), (q, k))
    for live in LIVE:
        bias = biases(blocks, heads, live, seed=fresh["seed"], device=str(q.device)).requires_grad_()
        inputs = (q, k, v, bias)
        one(live, "ours", lambda inputs=inputs: lambda: ours(*inputs, blocks), inputs)  # type: ignore[misc]
        if n_tokens in FLEX_LENGTHS and live != LIVE[1]:
            one(live, "FlexAttention", lambda inputs=inputs: flex(*inputs, blocks), inputs)  # type: ignore[misc]
        for key in [key for key in RIVALS if key in bench.peers and live == LIVE[0] and length == n_tokens]:
            prepare = PEERS[key].prepare
            one(live, f"{PEERS[key].name}, dense", lambda p=prepare: p(Workload("", q, k, v)), (q, k, v))  # type: ignore[misc]


def _add(
    bench: Bench, shape: tuple[int, ...], live: float | None, name: str, times: dict[str, float] | None = None,
    forward: float | None = None, both: float | None = None, extra: int | None = None, note: str = "",
) -> None:  # fmt: skip
    """times: milliseconds of ours to compare with, which its row leaves."""
    if times is not None and name == "ours" and both is not None:
        times["both"] = both
    ratio = times["both"] / both if times and both and name not in ("ours", "scores") else None
    row: dict[str, Any] = dict(zip(("T", "document", "D", "H", "G"), shape, strict=True))
    row |= {"dtype": str(bench.dtype).removeprefix("torch."), "live": live, "implementation": name,
            "forward ms": forward, "ms": both, "ours / it": ratio, "MiB": None if extra is None else extra / 2**20,
            "note": note}  # fmt: skip
    bench.report.add(row)
