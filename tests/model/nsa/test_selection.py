"""Which blocks the kernel selects, against the scores' definition in float64; on CUDA, or in Triton's interpreter."""

from functools import partial

import pytest
import torch
from torch import Tensor

import model.nsa.selection
import model.visible_attention
from kernels import block_importance_scores
from model.config import NSAConfig
from model.kv_cache import Extension
from model.nsa.blocks import Blocks, cached_blocks, packed_blocks
from model.nsa.selection import block_scores, select_blocks
from tests.kernels.helpers import DEVICE, draw, needs_triton
from tests.model.nsa.looped import SIZES

pytestmark = needs_triton
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0], device=DEVICE)
DOCUMENTS = torch.tensor([0, 5, 5, 6, 12, 53, 110], dtype=torch.int32, device=DEVICE)
PAPER = NSAConfig(compress_length=4, compress_stride=2, select_block=8, select_count=4)  # its ratios
CLEAR = 1e-4  # between scores of up to 8; float32 adds up weights of at most 1, and rounds the largest by 5e-7


def packed(sizes: NSAConfig, cu_seqlens: Tensor | None, longest: int = 57) -> Blocks:
    return packed_blocks(sizes, 110, cu_seqlens, 110 if cu_seqlens is None else longest, torch.device(DEVICE))


def cached(sizes: NSAConfig) -> Blocks:
    """Three rows of several lengths, whose last 7 tokens are queries."""
    position = torch.tensor([[93], [60], [2]], device=DEVICE) + torch.arange(7, device=DEVICE)
    lengths = torch.tensor([100, 67, 9], dtype=torch.int32, device=DEVICE)
    return cached_blocks(sizes, Extension(position, None, slice(0, 100), lengths))


CASES = {
    "whole": (PAPER, lambda sizes: packed(sizes, None)),
    "packed": (PAPER, lambda sizes: packed(sizes, DOCUMENTS)),
    "other overlaps": (SIZES, lambda sizes: packed(sizes, DOCUMENTS)),
    "cached": (PAPER, cached),
}


def tensors(blocks: Blocks, seed: int) -> tuple[Tensor, Tensor]:
    """Queries, and compressed keys, so large that few of them have most of the weight."""
    n, rows = blocks.n_queries, len(blocks.position)
    q = draw(rows, 4, n, 16, seed=seed, size=2)
    return q, draw(rows, 2, len(blocks.first_key), 16, seed=seed + 1)


def by_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.nsa.selection, "runs_on_triton", lambda q: True)
    kernel = partial(block_importance_scores, backend="triton")
    patch.setattr(model.nsa.selection, "block_importance_scores", kernel)


def expected(q: Tensor, compressed: Tensor, blocks: Blocks, slopes: Tensor | None) -> tuple[list[set[int]], Tensor]:
    """Blocks of each row, group and query by sorting in float64; and by how much the last one chosen is better than the
    best one left out, inf where none is."""
    scores = block_scores(q.double(), compressed.double(), blocks, slice(0, q.shape[2]), slopes)
    chosen, gaps = [], []
    own = (blocks.position // blocks.config.select_block).expand(len(q), -1).tolist()
    for b in range(len(q)):
        for row, at in ((x.tolist(), own[b][i]) for group in scores[b] for i, x in enumerate(group)):
            always = {0, *range(max(0, at - blocks.config.select_local + 1), at + 1)}
            others = sorted(set(range(at + 1)) - always, key=lambda j: -row[j])
            count = blocks.config.select_count - len(always)
            chosen.append(always | set(others[:count]))
            left_out = len(others) > count
            gaps.append(row[others[count - 1]] - row[others[count]] if left_out else torch.inf)
    return chosen, torch.tensor(gaps)


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_selects_what_the_definition_selects(
    case: str, slopes: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that is clear: nearly everywhere."""
    sizes, make = CASES[case]
    blocks = make(sizes)
    q, compressed = tensors(blocks, seed=5)
    wanted, gaps = expected(q, compressed, blocks, slopes)
    with monkeypatch.context() as patch:
        by_kernel(patch)
        found = select_blocks(q, compressed, blocks, slopes)
    clear = gaps > CLEAR
    assert clear.double().mean() > 0.9 and bool(gaps.isfinite().any())
    sets = [set(row) - {-1} for row in found.flatten(0, 2).tolist()]
    assert len(sets) == len(wanted) and found.shape[3] == sizes.select_count
    for ours, theirs, sure in zip(sets, wanted, clear.tolist(), strict=True):
        assert ours == theirs if sure else len(ours) == len(theirs)
    assert torch.equal((found == -1).sum(-1).flatten().cpu(), 4 - torch.tensor([len(one) for one in wanted]))


def test_parts_of_the_queries_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's result is held in parts too, by its own size."""
    blocks = packed(PAPER, DOCUMENTS)
    q, compressed = tensors(blocks, seed=5)
    by_kernel(monkeypatch)
    whole = select_blocks(q, compressed, blocks, SLOPES)
    monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, DEVICE, 2 * blocks.n_select * 30)
    rows = []

    def counted(q: Tensor, *arguments, **options) -> Tensor:
        rows.append(q.shape[2])
        return block_importance_scores(q, *arguments, **options, backend="triton")

    monkeypatch.setattr(model.nsa.selection, "block_importance_scores", counted)
    assert torch.equal(select_blocks(q, compressed, blocks, SLOPES), whole) and rows == [30, 30, 30, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_the_kernel_are_those_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32's rounding of scores up to 40 or so: both multiply 16 bits exactly. Some parts of packed rows see the
    keys within reach alone."""
    blocks = packed(PAPER, DOCUMENTS)
    q, compressed = (x.to(dtype) for x in tensors(blocks, seed=9))
    rows = slice(30, 80)
    monkeypatch.setattr(model.nsa.selection, "runs_on_triton", lambda q: False)
    masks = partial(block_importance_scores, backend="torch")
    monkeypatch.setattr(model.nsa.selection, "block_importance_scores", masks)
    theirs = block_scores(q[:, :, rows], compressed, blocks, rows, SLOPES)
    by_kernel(monkeypatch)
    ours = block_scores(q[:, :, rows], compressed, blocks, rows, SLOPES)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=40 * 2**-23)
