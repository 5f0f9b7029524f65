"""Hierarchical entmax against loops, on the path with masks and on that of the kernels, by their PyTorch references."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import model.hierarchical.attention
import model.visible_attention
from kernels.common.stats import count_live_tiles
from model.hierarchical.attention import HierarchicalEntmax
from model.hierarchical.blocks import Blocks
from model.visible_attention import mask_and_bias
from tests.kernels.helpers import needs_triton
from tests.model.hierarchical.looped import BLOCK, attend, block_weights, dense, draw, network
from tests.model.sparse_inputs import longest

# one of no tokens, some shorter than a block, ends inside of blocks
DOCUMENTS = torch.tensor([0, 5, 5, 6, 12, 53, 110], dtype=torch.int32)
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0])
ALPHA = torch.tensor([1.1, 1.5, 1.75, 2.0], dtype=torch.float64)
# float64 sums of at most 110 terms in another order, and thresholds that two ways find: hundreds of units in the last
# place
EXACT = dict(atol=1e-12, rtol=1e-12)


def blocks_of(n_tokens: int, cu_seqlens: Tensor | None = None, block: int = BLOCK) -> Blocks:
    most = longest(n_tokens, cu_seqlens)
    return HierarchicalEntmax.metadata(network(block), n_tokens, cu_seqlens, most, torch.device("cpu"))


def ours(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, alpha: Tensor = ALPHA, slopes: Tensor | None = None
) -> Tensor:
    layer = HierarchicalEntmax(network(), 0)
    return layer(torch.empty(0), q, k, v, blocks, slopes, alpha=alpha)


@pytest.fixture(params=["masks", "masks in blocks of rows", "kernels", "kernels in blocks of rows"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "kernels" in request.param:  # as on CUDA, but that the kernels' references run
        monkeypatch.setattr(model.hierarchical.attention, "runs_on_triton", lambda _: True)
    if "rows" in request.param:
        monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 4 * 16)
        monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", 1000)
    return str(request.param)


@torch.no_grad()
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_equals_loops(slopes: Tensor | None, path: str) -> None:
    q, k, v = draw(75, rows=2)
    found = ours(q, k, v, blocks_of(75), slopes=slopes)
    for row in range(2):
        torch.testing.assert_close(found[row], attend(q[row], k[row], v[row], ALPHA, slopes), **EXACT)


@torch.no_grad()
def test_packed_documents_have_the_blocks_that_each_has_alone(path: str) -> None:
    q, k, v = draw(110)
    found = ours(q, k, v, blocks_of(110, DOCUMENTS), slopes=SLOPES)
    bounds = DOCUMENTS.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        alone = attend(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], ALPHA, SLOPES)
        torch.testing.assert_close(found[0, :, a:b], alone, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 3, 64, 100])
def test_other_sizes_of_blocks(block: int, path: str) -> None:
    """Of one token: entmax chooses keys; of more than there are: plain softmax attention."""
    q, k, v = draw(70)
    found = ours(q, k, v, blocks_of(70, block=block))
    torch.testing.assert_close(found[0], attend(q[0], k[0], v[0], ALPHA, None, block), **EXACT)
    if block == 100:
        dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found, dense, **EXACT)


@torch.no_grad()
def test_log_p_is_that_of_the_loops() -> None:
    """Most blocks are dead, and some are for every query that has several."""
    q, k, _ = draw(75)
    log_p = HierarchicalEntmax(network(), 0).choose(q, k, blocks_of(75), SLOPES, ALPHA)[0]
    for h in range(4):
        for t in range(75):
            p = block_weights(q[0, h, t], k[0, h // 2, : t + 1], float(ALPHA[h]), float(SLOPES[h]), BLOCK)
            expected = torch.tensor(p + [0.0] * (10 - len(p)), dtype=torch.float64)
            torch.testing.assert_close(log_p[h, t].exp(), expected, **EXACT)
    live = (log_p[1:, 40:] > -torch.inf).sum(-1)
    assert live.min() == 1 and 1 < live.float().mean() < 4 and live.max() <= 10


@torch.no_grad()
def test_one_live_block_is_read_and_no_other(path: str) -> None:
    """However large values of dead blocks are."""
    q, k, v = draw(40)
    q[:], k[:, :, 8:16] = 1.0, k[:, :, 8:16] + 40  # its summary is far above the others
    v[:, :, :8], v[:, :, 16:] = -1e300, 1e300
    found = ours(q, k, v, blocks_of(40), slopes=None)[:, :, 16:]
    inside = scaled_dot_product_attention(q[:, :, 16:], k[:, :, 8:16], v[:, :, 8:16], enable_gqa=True)
    torch.testing.assert_close(found, inside, **EXACT)


@torch.no_grad()
def test_equal_summaries_and_alpha_near_1_are_plain_softmax() -> None:
    q, k, v = draw(64)
    pairs = k.unflatten(2, (-1, 2))
    pairs[..., 1, :] = -pairs[..., 0, :]  # every full block's mean is zero
    t = torch.arange(7, 64, BLOCK)  # whose own block is full
    for alpha in (1.01, 1.5):
        found = ours(q, k, v, blocks_of(64), torch.full((4,), alpha, dtype=torch.float64))[:, :, t]
        dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, t]
        torch.testing.assert_close(found, dense, **EXACT)


def test_gradients_are_those_of_differences(path: str) -> None:
    """In q, k, v and alpha, with dead blocks, away from where one comes to life."""
    q, k, v = draw(21)
    alpha = torch.tensor([1.2, 1.5, 1.7, 1.9], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, alpha)]
    documents = torch.tensor([0, 3, 21], dtype=torch.int32)
    blocks = blocks_of(21, documents, block=4)
    log_p = HierarchicalEntmax(network(), 0).choose(q, k, blocks, SLOPES, alpha)
    visible = blocks.visible(torch.arange(21))[:, None]
    dead = visible & (log_p == -torch.inf)
    assert 0.2 < float(dead.sum() / (visible.sum() * 4)) < 0.8

    def attended(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return ours(q, k, v, blocks, alpha, SLOPES)

    assert torch.autograd.gradcheck(attended, inputs, fast_mode=True)
    gradients = torch.autograd.grad(attended(*inputs).square().sum(), inputs)
    assert all(one.abs().max() > 1e-3 for one in gradients) and gradients[3].abs().min() > 1e-6


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_dense_products(dtype: torch.dtype, slopes: Tensor | None, path: str) -> None:
    """Of outputs at most twice, of gradients three times what dense products in that dtype lose against float64, as
    flash-attention's tests have it: root mean squares of four draws, since alpha's gradient is four numbers."""
    alpha = torch.tensor([1.1, 1.5, 1.75, 1.9], dtype=torch.float64)
    cotangent = torch.randn(2, 4, 75, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(attention: Callable[..., Tensor], dtype: torch.dtype, seed: int) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in draw(75, rows=2, seed=seed)]
        inputs.append(alpha.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        out = attention(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(dtype))]

    def explicit(*x: Tensor) -> Tensor:
        return dense(*x, slopes)

    def ours_of(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return ours(q, k, v, blocks_of(75), alpha, slopes)

    errors = []  # of ours and of dense products, of each tensor
    for seed in (1, 2, 3, 4):
        runs = ((explicit, torch.float64), (ours_of, dtype), (explicit, dtype))
        truth, found, plain = (run(*one, seed) for one in runs)
        errors.append([[relative(x, exact) for x, exact in zip(one, truth, strict=True)] for one in (found, plain)])
    for i, (found, plain) in enumerate(torch.tensor(errors).square().mean(0).sqrt().T.tolist()):
        assert found <= max((3 if i else 2) * plain, 1e3 * torch.finfo(torch.float64).eps), i


@torch.no_grad()
def test_not_a_number_is_seen(path: str) -> None:
    """In the heads that read its key: no block is dead by it."""
    q, k, v = draw(40)
    k[0, 0, 20] = torch.nan
    found = ours(q, k, v, blocks_of(40))
    assert found[:, :2, 20:].isnan().all() and found[:, 2:].isfinite().all()


def test_the_choice_learns() -> None:
    """Where all tokens of a block are alike, its summary's score reaches the output through log p alone."""
    q, k, v = (x.requires_grad_() for x in draw(32, scale=1.0))
    alpha = ALPHA.clone().clamp(max=1.9).requires_grad_()
    blocks = blocks_of(32)
    log_p = HierarchicalEntmax(network(), 0).choose(q, k, blocks, None, alpha)
    leaf = log_p.detach().requires_grad_()
    out = HierarchicalEntmax(network(), 0).attend(q.detach(), k.detach(), v.detach(), leaf, blocks, None)
    (through,) = torch.autograd.grad(out.square().sum(), leaf)
    assert through[leaf == -torch.inf].abs().max() == 0 and through[leaf > -torch.inf].abs().max() > 1e-3
    found = torch.autograd.grad(log_p, (q, k, alpha), through, allow_unused=True)
    assert all(one.isfinite().all() and one.abs().max() > 1e-3 for one in found)


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(path: str) -> None:
    """Of the own block too."""
    q, k, v = draw(64)
    before = ours(q, k, v, blocks_of(64), slopes=SLOPES)
    for t in (1, 21, 24, 63):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] += 5
        assert torch.equal(ours(*changed, blocks_of(64), slopes=SLOPES)[:, :, :t], before[:, :, :t])


@torch.no_grad()
def test_other_documents_change_nothing(path: str) -> None:
    q, k, v = draw(110)
    before = ours(q, k, v, blocks_of(110, DOCUMENTS))
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 12:53] += 5
    after = ours(*changed, blocks_of(110, DOCUMENTS))
    assert torch.equal(after[:, :, :12], before[:, :, :12]) and torch.equal(after[:, :, 53:], before[:, :, 53:])


@torch.no_grad()
@pytest.mark.parametrize("tile", [4, 16, 64, 128])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_tiles_are_those_with_keys_that_are_read(documents: Tensor | None, tile: int) -> None:
    q, k, _ = draw(110)
    blocks = blocks_of(110, documents)
    log_p = HierarchicalEntmax(network(), 0).choose(q, k, blocks, None, ALPHA)
    token, size = torch.arange(110), -(-110 // tile)
    read, _ = mask_and_bias(blocks.view(log_p, None), (1, 4), token, token)
    padded = torch.nn.functional.pad(read, (0, size * tile - 110, 0, size * tile - 110))
    expected = padded.unflatten(2, (size, tile)).unflatten(4, (size, tile)).any(5).any(3)
    assert torch.equal(blocks.tiles(log_p > -torch.inf, tile), expected)
    assert torch.equal(blocks.tokens_read(log_p > -torch.inf), read.sum(-1))
    if tile == 64:
        assert torch.equal(expected.sum((2, 3)), count_live_tiles(read, 0))


def test_one_bound_of_lengths_for_documents_that_end_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training has it. The kernel's path, forward and backward, gives what masks give."""
    alpha = ALPHA.clone().clamp(max=1.9).requires_grad_()
    for seed, ends in enumerate(([40, 110], [7, 110], [30, 110])):
        inputs = [*(x.requires_grad_() for x in draw(110, seed=seed)), alpha]
        bounds = torch.tensor([0, *ends], dtype=torch.int32)
        blocks = HierarchicalEntmax.metadata(network(), 110, bounds, 104, torch.device("cpu"))
        found = []
        for kernel in (True, False):
            monkeypatch.setattr(model.hierarchical.attention, "runs_on_triton", lambda _, kernel=kernel: kernel)
            out = ours(*inputs[:3], blocks, alpha, SLOPES)
            found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)  # gradients pass log p, up to 1 / p


@pytest.mark.parametrize("at_once", [pytest.param(n, marks=needs_triton) for n in (2**22, 1000)])
def test_kernels_lose_what_masks_lose(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, in float32: outputs at most twice, gradients at most three times, or a few roundings."""
    monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", at_once)
    alpha = torch.tensor([1.1, 1.5, 1.75, 1.9], dtype=torch.float64)
    inputs, blocks = [*draw(110), alpha], blocks_of(110, DOCUMENTS)
    cotangent = torch.randn(1, 4, 110, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = ours(*leaves[:3], blocks, leaves[3], SLOPES)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    truth, masks = run(torch.float64), run(torch.float32)
    module = model.hierarchical.attention
    monkeypatch.setattr(module, "runs_on_triton", lambda _: True)
    for name in ("block_bias_attention", "block_mean_scores", "entmax"):
        monkeypatch.setattr(module, name, partial(getattr(module, name), backend="triton"))
    for i, (found, plain, exact) in enumerate(zip(run(torch.float32), masks, truth, strict=True)):
        limit = max((3 if i else 2) * relative(plain, exact), 4 * torch.finfo(torch.float32).eps)
        assert relative(found, exact) <= limit, i
