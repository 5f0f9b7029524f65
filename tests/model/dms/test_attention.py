"""What is evicted and attended to against loops, on the path with masks and on FlexAttention's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import model.dms.attention
import model.visible_attention
from model.config import AttentionConfig, DMSConfig, ModelConfig
from model.dms.attention import DynamicMemorySparsification
from model.dms.eviction import logistic_noise
from model.dms.tokens import DelayedKeys
from model.sparse_attention import collected_auxiliary
from model.transformer import Transformer
from model.visible_attention import mask_and_bias
from tests.model.dms.looped import SIZES, attended, cached, evicted, logits, module, network, noise, softened
from tests.model.sparse_inputs import draw, graphs_of_flex, longest

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([0, 5, 5, 6, 12, 53, 110], dtype=torch.int32)  # one of no tokens, some of few
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0])
NUMBERS = torch.arange(110) * 7 + 2**33  # beyond 32 bits
# float64 sums of at most 110 terms in another order: a few hundred units in the last place
EXACT = dict(atol=1e-12, rtol=1e-12)


def metadata(
    config: ModelConfig, n_tokens: int, cu_seqlens: Tensor | None = None, number: Tensor | None = None
) -> DelayedKeys:
    return DynamicMemorySparsification.metadata(
        config, n_tokens, cu_seqlens, longest(n_tokens, cu_seqlens), CPU, number
    )


@pytest.fixture(params=["masks", "masks in blocks of rows", "flex"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "flex":  # as on CUDA, but that it computes all scores, under the same mask
        monkeypatch.setattr(model.dms.attention, "uses_flex", lambda *_: True)
        monkeypatch.setattr(model.visible_attention, "compiled_flex", lambda: flex_attention)
    elif request.param != "masks":
        monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 4 * 16)
    return str(request.param)


@pytest.fixture
def flex_backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch's, which torch refuses since it has no compiled one there."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)


def hidden(rows: list[list[bool]]) -> list[list[float]]:
    return [[-torch.inf if one else 0.0 for one in row] for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_decisions_equal_loops_and_the_cache_that_forgets(slopes: Tensor | None, path: str) -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(75, config, rows=2)
    ours = sparse(x, q, k, v, metadata(config, 75), slopes)
    for row in range(2):
        gone = evicted(sparse, x[row])
        assert 0.2 < sum(map(sum, gone)) / (2 * 75) < 0.8
        expected = attended(q[row], k[row], v[row], hidden(gone), SIZES.window, slopes)
        torch.testing.assert_close(ours[row], expected, **EXACT)
        by_cache, left = cached(q[row], k[row], v[row], logits(sparse, x[row]), SIZES.window, slopes)
        torch.testing.assert_close(ours[row], by_cache, **EXACT)
        kept = (74 - torch.arange(75) <= SIZES.window) | ~torch.tensor(gone)
        assert left == [one.nonzero().flatten().tolist() for one in kept]


@pytest.mark.usefixtures("flex_backward_on_cpu")
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_training_equals_loops(slopes: Tensor | None, path: str) -> None:
    """And gives the loss what it evicts; noise is that of the tokens' numbers."""
    config = network()
    sparse, (x, q, k, v) = module(config).train(), draw(75, config, rows=2)
    numbers = torch.stack([NUMBERS[:75], NUMBERS[:75] + 600])
    with collected_auxiliary(sparse) as shares:
        ours = sparse(x, q, k, v, metadata(config, 75, None, numbers), slopes)
    total = 0
    for row in range(2):
        log_kept, hard = softened(sparse, x[row], numbers[row].tolist())
        total += sum(map(sum, hard))
        torch.testing.assert_close(ours[row], attended(q[row], k[row], v[row], log_kept, SIZES.window, slopes), **EXACT)
    assert len(shares) == 1 and shares[0].item() == pytest.approx(total / 2) and total  # the mean over two heads


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.usefixtures("flex_backward_on_cpu")
def test_packed_documents_are_as_each_alone(training: bool, path: str) -> None:
    """No token decides on one of another document."""
    config = network()
    sparse, (x, q, k, v) = module(config).train(training), draw(110, config)
    bounds = DOCUMENTS.tolist()

    def run(part: slice, documents: Tensor | None) -> tuple[Tensor, float]:
        parts = (q[:, :, part], k[:, :, part], v[:, :, part])
        length = part.stop - part.start
        with collected_auxiliary(sparse) as shares:
            out = sparse(x[:, part], *parts, metadata(config, length, documents, NUMBERS[None, part]), SLOPES)
        return out.detach(), shares[0].item() if shares else 0.0

    whole, share = run(slice(0, 110), DOCUMENTS)
    each = [run(slice(a, b), None) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    torch.testing.assert_close(whole, torch.cat([out for out, _ in each], dim=2), **EXACT)
    assert share == pytest.approx(sum(one for _, one in each)) and (share > 0) == training


@pytest.mark.parametrize("training", [False, True])
def test_nothing_evicted_is_dense_attention(training: bool, path: str, flex_backward_on_cpu: None) -> None:
    """a = 0: a far negative logit, which noise does not lift; or a window that holds all."""
    for sizes in (DMSConfig(window=0, offset=-1e3, scale=1.0), DMSConfig(window=80, offset=1e3)):
        config = network(sizes)
        sparse, (x, q, k, v) = module(config).train(training), draw(80, config)
        dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(sparse(x, q, k, v, metadata(config, 80), None), dense, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 1, 20])
def test_all_evicted_is_a_sliding_window(window: int, path: str) -> None:
    config = network(DMSConfig(window=window, scale=1e-3, offset=100.0))
    sparse, (x, q, k, v) = module(config), draw(60, config)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    near = (distance >= 0) & (distance <= window)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
    torch.testing.assert_close(sparse(x, q, k, v, metadata(config, 60), None), expected, **EXACT)


@torch.no_grad()
def test_there_is_noise_in_training_alone() -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(75, config)
    here, there = (metadata(config, 75, None, numbers[None, :75]) for numbers in (NUMBERS, NUMBERS + 1))
    assert torch.equal(sparse(x, q, k, v, here, None), sparse(x, q, k, v, there, None))
    sparse.train()
    assert torch.equal(sparse(x, q, k, v, here, None), sparse(x, q, k, v, there, None))  # no gradients, no training
    with torch.enable_grad():
        assert not torch.equal(sparse(x, q, k, v, here, None), sparse(x, q, k, v, there, None))
        assert torch.equal(sparse(x, q, k, v, here, None), sparse(x, q, k, v, here, None))


def test_noise_is_logistic_and_its_own_for_each_token_layer_and_head() -> None:
    found = logistic_noise(NUMBERS[None], 3, 2)
    expected = [[noise(number, 3, head) for number in NUMBERS.tolist()] for head in range(2)]
    # -log u and -log(1 - u) near u = 1 / 2 against their difference: a few units in the last place of 1
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    many = torch.cat([logistic_noise(torch.arange(20_000)[None], layer, 4)[0] for layer in range(3)])  # [12, 20,000]
    ranks = many.flatten().sort().values.sigmoid()
    uniform = (torch.arange(len(ranks)) + 0.5) / len(ranks)
    assert (ranks - uniform).abs().max() < 1.95 / len(ranks) ** 0.5  # Kolmogorov and Smirnov, one in a thousand
    for one in (many, torch.stack([many[0, :-1], many[0, 1:]])):  # heads and layers, neighbours
        correlation = one.corrcoef().fill_diagonal_(0).abs().max()
        assert correlation < 4.5 / one.shape[1] ** 0.5


def test_w_learns_from_what_is_lost_and_from_the_share() -> None:
    """Through log(1 - a) and straight through, each by itself; the latter with the gradient of the mean of a."""
    config = network()
    sparse, (x, q, k, v) = module(config).train(), draw(75, config)
    made = metadata(config, 75, None, NUMBERS[None, :75])
    with collected_auxiliary(sparse) as shares:
        out = sparse(x, q, k, v, made, None)
    (by_scores,) = torch.autograd.grad(out.square().sum(), sparse.eviction.weight, retain_graph=True)
    (by_share,) = torch.autograd.grad(shares[0], sparse.eviction.weight)
    assert by_scores.isfinite().all() and by_scores.abs().max() > 1e-6
    weight = sparse.eviction.weight.detach().clone().requires_grad_()
    z = SIZES.scale * x[0] @ weight.T + SIZES.offset  # [T, G]
    drawn = [[noise(number, 0, head) for head in range(2)] for number in NUMBERS[:75].tolist()]
    a = ((z + torch.tensor(drawn, dtype=torch.float64)) / 0.1).sigmoid()[1:]
    (expected,) = torch.autograd.grad(a.mean(1).sum(), weight)
    torch.testing.assert_close(by_share, expected, atol=1e-12, rtol=1e-9)


def test_gradients_through_the_scores_are_those_of_dense_products(path: str, flex_backward_on_cpu: None) -> None:
    config = network()
    sparse, inputs = module(config).train(), [one.requires_grad_() for one in draw(75, config, rows=2)]
    cotangent = torch.randn(2, 4, 75, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    made, leaves = metadata(config, 75), [*inputs, sparse.eviction.weight]
    x, q, k, v = inputs

    def dense() -> Tensor:
        z = (SIZES.scale * x @ sparse.eviction.weight.T + SIZES.offset).mT
        y = ((z + logistic_noise(torch.arange(75)[None], 0, 2)) / 0.1)[..., 1:]
        log_kept = torch.nn.functional.pad(-torch.nn.functional.softplus(y), (0, 1)).repeat_interleave(2, 1)
        distance = torch.arange(75)[:, None] - torch.arange(75)
        bias = torch.where(distance > SIZES.window, log_kept[:, :, None], 0.0) - SLOPES[:, None, None] * distance
        scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + bias
        return scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)

    found = torch.autograd.grad((sparse(x, q, k, v, made, SLOPES) * cotangent).sum(), leaves)
    expected = torch.autograd.grad((dense() * cotangent).sum(), leaves)
    for one, other in zip(found, expected, strict=True):  # y is divided by 0.1, and softplus has two forms
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_new_model_is_its_softmax_twin() -> None:
    """W = 0 and a negative offset evict nothing."""
    for positions in ("rope", "nape", "nope"):
        config = network(DMSConfig(window=0), positions)
        torch.manual_seed(0)
        ours = Transformer(config).double().eval()
        twin = Transformer(ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})).double()
        twin.load_state_dict(ours.state_dict(), strict=False)
        tokens = torch.randint(61, (2, 64))
        torch.testing.assert_close(ours(tokens), twin(tokens), atol=1e-6, rtol=1e-6)  # rope rotates in float32
        documents = torch.tensor([0, 7, 64], dtype=torch.int32)
        torch.testing.assert_close(ours(tokens[:1], documents), twin(tokens[:1], documents), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("tile", [4, 16, 64, 128])
def test_tiles_are_those_with_keys_that_are_read(documents: Tensor | None, tile: int) -> None:
    config = network()
    sparse, (x, *_) = module(config), draw(110, config)
    made, token, size = metadata(config, 110, documents), torch.arange(110), -(-110 // tile)
    gone = sparse.evicted(x, made)
    read, _ = mask_and_bias(made.kept_view(gone, None), (1, 2), token, token)
    padded = torch.nn.functional.pad(read, (0, size * tile - 110, 0, size * tile - 110))
    tiles = padded.unflatten(2, (size, tile)).unflatten(4, (size, tile)).any(5).any(3)
    assert torch.equal(made.tiles(gone, tile), tiles)
    assert torch.equal(made.keys_read(gone), read.sum((2, 3)))


def test_flex_is_compiled_once(monkeypatch: pytest.MonkeyPatch, flex_backward_on_cpu: None) -> None:
    """In training and outside of it: documents that end elsewhere and other evictions are values, not code."""
    config = network()
    for training in (True, False):
        graphs, sparse = graphs_of_flex(monkeypatch), module(config).train(training)
        for seed, ends in enumerate(([40, 110], [7, 110], [20, 30, 110])):
            inputs = [one.requires_grad_() for one in draw(110, config, seed=seed)]
            documents = torch.tensor([0, *ends], dtype=torch.int32)
            found: list[list[Tensor]] = []
            for flex in (True, False):
                monkeypatch.setattr(model.dms.attention, "uses_flex", lambda *_, flex=flex: flex)
                run: Callable[[], Tensor] = lambda: sparse(*inputs, metadata(config, 110, documents), SLOPES)  # noqa: B023, E731
                with torch.set_grad_enabled(training):
                    out = run()
                found.append([out, *(torch.autograd.grad(out.square().sum(), inputs) if training else ())])
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
        assert len(graphs) == 1
