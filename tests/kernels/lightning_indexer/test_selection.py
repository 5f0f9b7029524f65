"""Which keys the indexer's kernels choose, against loops over scores that float32 holds exactly.

The Triton kernels run on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, at small sizes).
"""

from math import frexp, isnan, ldexp
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.lightning_indexer import launches
from kernels.lightning_indexer.indexer import select_keys
from kernels.lightning_indexer.operator import select_operator
from model.dsa.indexer import IndexInputs, select_tokens
from model.dsa.tokens import packed_tokens
from tests.kernels.helpers import CUDA, DEVICE, needs_cuda, needs_triton
from tests.kernels.lightning_indexer.inputs import LARGE_SHAPES, Shape

pytestmark = needs_triton
SHAPES = {
    "causal": Shape(40, 40, batch=2),
    "documents": Shape(70, 70, documents=(3, 30, 1, 36)),
    "chunk": Shape(12, 83),
    "rows of several lengths": Shape(9, 60, batch=2, ragged=True),
}


def whole_numbers(shape: Shape, largest: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """index_q, index_k and weights, of up to `largest`: products and their sums are exact, in TF32 too."""
    generator = torch.Generator().manual_seed(largest)
    sizes = [x.shape for x in shape.tensors(dtype)[:3]]
    drawn = (torch.randint(-largest, largest + 1, size, generator=generator) for size in sizes)
    return [x.to(DEVICE, dtype) for x in drawn]


def scores(index_q: Tensor, index_k: Tensor, weights: Tensor) -> Tensor:
    """I, float64 (B, n, keys)."""
    products = (index_q.double() @ index_k.double()[:, None].mT).relu()
    return (products * weights.double()[..., None]).sum(1)


def expected(shape: Shape, index: list[Tensor], count: int, bits: int = 12) -> list[list[list[int]]]:
    """Sorted keys of each batch row and query."""
    first, own = (x.cpu().expand(shape.batch, -1) for x in shape.rows())

    def rounded(x: float) -> float:
        mantissa, exponent = frexp(x)
        return ldexp(round(mantissa * 2**bits), exponent - bits)  # ties to even

    def best(row: list[float], lo: int, hi: int) -> list[int]:
        return sorted(sorted(range(lo, hi), key=lambda s: (rounded(row[s]), s))[-count:])

    found = scores(*index).tolist()
    return [
        [best(found[b][i], int(first[b, i]), int(own[b, i]) + 1) for i in range(shape.n_queries)]
        for b in range(shape.batch)
    ]


def keys_of(bits: Tensor) -> list[list[list[int]]]:
    marks = (bits.cpu()[..., None].int() >> torch.arange(8) & 1).flatten(2)
    return [[one.nonzero().flatten().tolist() for one in rows] for rows in marks]


@pytest.mark.parametrize("largest", [1, 40])
@pytest.mark.parametrize("count", [1, 9, 60])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_loops(shape: Shape, count: int, largest: int) -> None:
    """Numbers up to 1 tie often, those up to 40 give scores that 12 bits do not hold."""
    index = whole_numbers(shape, largest)
    assert largest == 1 or float(scores(*index).abs().max()) > 2**13
    assert keys_of(select_keys(*index, *shape.rows(), count=count)) == expected(shape, index, count)


@pytest.mark.parametrize("bits", [8, 23])
def test_scores_are_compared_with_as_many_bits_as_asked(bits: int) -> None:
    shape = Shape(12, 200)
    index = whole_numbers(shape, 40)
    found = keys_of(select_keys(*index, *shape.rows(), count=60, score_bits=bits))
    assert found == expected(shape, index, 60, bits) != expected(shape, index, 60, 31 - bits)


@pytest.mark.parametrize("at_once", [1, 64 * 128 + 1])
def test_queries_choose_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "SCORES_AT_ONCE", at_once)
    shape = SHAPES["documents"]
    index = whole_numbers(shape, 2)
    for reach in (None, 36):
        assert keys_of(select_keys(*index, *shape.rows(), count=5, reach=reach)) == expected(shape, index, 5)


@pytest.mark.skipif(CUDA, reason="chunks on CUDA are those of tuning.py")
@pytest.mark.parametrize("chunk", [8, 256])
def test_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "CHUNK", chunk)
    shape = Shape(20, 90, documents=(75, 15))
    index = whole_numbers(shape, 1)
    assert keys_of(select_keys(*index, *shape.rows(), count=11)) == expected(shape, index, 11)


def test_zeros_of_both_signs_tie() -> None:
    """Negative weights make -0 of products that ReLU has left out."""
    shape = Shape(20, 20)
    index_q, index_k, weights = (x.abs() + 1 for x in whole_numbers(shape, 2))
    weights[:, :, ::2] *= -1
    found = keys_of(select_keys(index_q, -index_k, weights, *shape.rows(), count=3))
    assert found[0] == [list(range(max(0, t - 2), t + 1)) for t in range(20)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact(dtype: torch.dtype) -> None:
    shape = SHAPES["documents"]
    index = whole_numbers(shape, 40, dtype)
    assert keys_of(select_keys(*index, *shape.rows(), count=7)) == expected(shape, index, 7)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000], ids=["positive", "negative"])
def test_nan_is_chosen_first(bits: int, backend: str) -> None:
    """Of either sign, as torch.topk has it; then infinity, which 4 times 3e38 is, finite scores, and -infinity."""
    score = torch.randint(-3, 4, (30,), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    score[[5, 20]], score[[0, 1, 2, 4, 6, 29]] = 3e38, -3e38
    index_k = torch.stack([score, -score], -1)[None]
    index_k[:, [3, 12, 13]] = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    index_q = 4 * torch.eye(2, device=DEVICE)[None, :, None].expand(1, 2, 30, 2)
    weights = torch.tensor([1.0, -1.0], device=DEVICE)[None, :, None].expand(1, 2, 30)  # score * 4: one head a sign
    tokens = packed_tokens(30, None, 30, index_k.device)
    for count in (1, 2, 4, 7):
        found = keys_of(select_tokens(IndexInputs(index_q, index_k, weights), tokens, count, backend))[0]
        order = [(isnan(x), 0.0 if isnan(x) else x, s) for s, x in enumerate(index_k[0, :, 0].tolist())]
        assert found == [sorted(s for *_, s in sorted(order[: t + 1])[-count:]) for t in range(30)]


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 5), (5, 0)])
def test_nothing_to_choose_from(n_queries: int, n_keys: int) -> None:
    rows = torch.zeros(2, 1, n_queries, dtype=torch.int64, device=DEVICE)
    rows[1] = min(0, n_keys - 1)  # the last key that is seen: none without keys
    bits = select_keys(*Shape(n_queries, n_keys).tensors(torch.float32)[:3], *rows, count=2)
    assert bits.shape == (1, n_queries, -(-n_keys // 8))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["30m", "many heads"])
def test_at_length(name: str, dtype: torch.dtype) -> None:
    """Against a sort of exact scores, of which later keys come first."""
    shape = LARGE_SHAPES[name]
    index, (first, own) = whole_numbers(shape, 3, dtype), shape.rows()
    key = torch.arange(shape.n_keys, device=DEVICE)
    seen = (key >= first[..., None]) & (key <= own[..., None])
    exact = scores(*index)
    mantissa, exponent = torch.frexp(exact)
    coarse = torch.ldexp((mantissa * 2**12).round(), exponent - 12).masked_fill(~seen, -torch.inf)
    order = coarse.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :500]
    mask = torch.zeros_like(coarse, dtype=torch.bool).scatter_(-1, shape.n_keys - 1 - order, True) & seen
    bits = select_keys(*index, first, own, count=500, reach=max(shape.documents or (shape.n_keys,)))
    ours = (bits[..., None].int() >> torch.arange(8, device=DEVICE) & 1).flatten(2)[..., : shape.n_keys].bool()
    assert torch.equal(ours, mask)


def test_registered_operator_is_sound() -> None:
    shape = Shape(5, 9)
    index = whole_numbers(shape, 2)
    torch.library.opcheck(select_operator, (*index, *shape.rows(), 3, None, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(count=0), "count must lie in 1 ... 2147483647, got 0"),
        (dict(score_bits=24), "score_bits must lie in 8 ... 23, got 24"),
        (dict(reach=-1), "reach must be None or at least 0, got -1"),
        (dict(own_key=torch.zeros(1, 5).int()), r"own_key must be \(1, 6\), got \(1, 5\)"),
        (dict(index_q=torch.zeros(1, 3, 6, 12).double()), "use model.dsa.indexer with backend='torch'"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    shape = Shape(6, 6)
    names = ("index_q", "index_k", "weights", "first_key", "own_key")
    given = dict(zip(names, (*whole_numbers(shape, 1), *shape.rows()), strict=True)) | dict(count=2) | changes
    with pytest.raises(ValueError, match=message):
        select_keys(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()})
