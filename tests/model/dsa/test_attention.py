"""What is chosen and attended to against loops, on the path with masks and on FlexAttention's."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import model.block_masks
import model.dsa.indexer
import model.visible_attention
from kernels.common.backends import INTERPRETED
from model.attention import make_metadata
from model.config import DSAConfig, ModelConfig
from model.dsa.attention import DeepSeekSparseAttention, DSAMetadata
from model.dsa.indexer import IndexInputs, chosen_block_mask, coarse, index_scores, select_tokens, wide
from model.dsa.tokens import cached_tokens, packed_tokens
from model.kv_cache import Extension
from model.transformer import Transformer
from model.visible_attention import block_mask_of_view, mask_and_bias
from tests.model.dsa.looped import SIZES, WARMUP, attended, chosen, module, network, scores
from tests.model.sparse_inputs import draw, graphs_of_flex, longest

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([0, 5, 5, 6, 12, 53, 110], dtype=torch.int32)  # one of no tokens, some of few
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0])
# float64 sums of at most 110 terms in another order: a few hundred units in the last place
EXACT = dict(atol=1e-12, rtol=1e-12)
# rope's angles are float32, and the rotation computes in it
ROTATED = dict(atol=1e-4, rtol=1e-4)


def metadata(config: ModelConfig, n_tokens: int, cu_seqlens: Tensor | None = None) -> DSAMetadata:
    return DeepSeekSparseAttention.metadata(config, n_tokens, cu_seqlens, longest(n_tokens, cu_seqlens), CPU)


def flex_metadata(config: ModelConfig, n_tokens: int, cu_seqlens: Tensor | None = None) -> DSAMetadata:
    """As on CUDA."""
    made = metadata(config, n_tokens, cu_seqlens)
    dense = block_mask_of_view(made.tokens.view_of(made.tokens.visible_keys(), None), n_tokens)
    return DSAMetadata(made.tokens, made.rotary, True, dense)


@pytest.fixture(params=["masks", "masks in blocks of rows", "flex"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What makes the metadata of a path."""
    if request.param == "flex":  # computes all scores, under the same mask and with the same tiles left out
        monkeypatch.setattr(
            model.visible_attention, "compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention
        )
        return flex_metadata
    if request.param != "masks":
        monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 4 * 16)
        monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", 1000)
    return metadata


@torch.no_grad()
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_attention_equals_loops(slopes: Tensor | None, made) -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(75, config, rows=2)
    ours = sparse(x, q, k, v, made(config, 75), slopes)
    for row in range(2):
        expected, _ = attended(q[row], k[row], v[row], scores(sparse, x[row]), SIZES.select_tokens, slopes)
        torch.testing.assert_close(ours[row], expected, **EXACT)


@torch.no_grad()
def test_packed_documents_choose_as_each_does_alone(made) -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(110, config)
    ours = sparse(x, q, k, v, made(config, 110, DOCUMENTS), SLOPES)
    bounds = DOCUMENTS.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        index = scores(sparse, x[0, a:b])
        alone, _ = attended(q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], index, SIZES.select_tokens, SLOPES)
        torch.testing.assert_close(ours[0, :, a:b], alone, **EXACT)


def chosen_keys(bits: Tensor, n_keys: int) -> list[list[list[int]]]:
    mask = (bits[..., None] >> torch.arange(8)).bitwise_and(1).flatten(2)[..., :n_keys]
    return [[row.nonzero().flatten().tolist() for row in rows] for rows in mask]


@torch.no_grad()
@pytest.mark.parametrize("at_once", [2**24, 500])
def test_equal_scores_choose_the_later_key(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are all negative, or few that are not: ReLU leaves ties at 0."""
    monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 40, 8, generator=generator), torch.randn(1, 40, 8, generator=generator)
    tokens = packed_tokens(40, None, 40, CPU)
    for keys in (-k.abs(), k):
        index = IndexInputs(q.abs() if keys is not k else q, keys, torch.tensor([[[1.0], [-0.5]]]).expand(1, 2, 40))
        found = index_scores(wide(index), slice(0, 40), slice(0, 40))[0]
        assert int((found == 0).sum()) > 100
        ours = chosen_keys(select_tokens(index, tokens, 6), 40)[0]
        assert ours == [chosen(found, t, 6) for t in range(40)]
    nothing = IndexInputs(q.abs(), -k.abs(), torch.ones(1, 2, 40))
    assert chosen_keys(select_tokens(nothing, tokens, 6), 40)[0][30] == list(range(25, 31))


def whole_numbers(rows: int, n: int) -> IndexInputs:
    """Scores are exact, and often tie."""
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, 3, n, 8), (rows, n, 8), (rows, 3, n)
    return IndexInputs(*(torch.randint(-2, 3, size, generator=generator).float() for size in sizes))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("count", [7, 50])
def test_kernels_choose_what_masks_choose(count: int) -> None:
    index = whole_numbers(1, 110)
    tokens = packed_tokens(110, DOCUMENTS, 57, CPU)
    bits = [select_tokens(index, tokens, count, backend) for backend in ("triton", "torch")]
    assert torch.equal(*bits) and bits[0].any()
    cached = cached_tokens(Extension(torch.tensor([[70, 71], [108, 109]]), None, slice(0, 110), None))
    index = whole_numbers(2, 110)
    index = index._replace(q=index.q[:, :, :2], weights=index.weights[:, :, :2])
    bits = [select_tokens(index, cached, count, backend) for backend in ("triton", "torch")]
    assert torch.equal(*bits) and bits[0].any()


@torch.no_grad()
def test_scores_under_rope_equal_loops() -> None:
    config = network(positions="rope", rope_base=50.0)
    sparse, (x, *_) = module(config), draw(30, config)
    shared = metadata(config, 30)
    index = wide(sparse.indexer(x, shared.rotary, torch.float64))
    visible = torch.ones(30, 30).tril().bool()
    ours = index_scores(index, slice(0, 30), slice(0, 30))[0]
    expected = scores(sparse, x[0], 50.0)
    torch.testing.assert_close(ours[visible], expected[visible], **ROTATED)
    plain = scores(sparse, x[0])
    assert (expected - plain)[visible].abs().max() > 0.1
    unrotated = Transformer(network(positions="rope", n_layers=2, nope_layers=[1])).layers()[1].attention.sparse
    assert isinstance(unrotated, DeepSeekSparseAttention) and not unrotated.indexer.rotates


@torch.no_grad()
@pytest.mark.parametrize("sizes", [DSAConfig(3, 8, 80), WARMUP], ids=["all chosen", "warmup"])
def test_all_keys_chosen_is_dense_attention(sizes: DSAConfig, made) -> None:
    config = network(sizes)
    sparse, (x, q, k, v) = module(config), draw(80, config)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse(x, q, k, v, made(config, 80), None), dense, **EXACT)


@torch.no_grad()
def test_a_model_that_chooses_all_is_its_softmax_twin() -> None:
    from model.config import AttentionConfig

    for positions in ("rope", "nape", "nope"):
        config = network(DSAConfig(index_dim=8, select_tokens=64), positions)
        torch.manual_seed(0)
        ours = Transformer(config).double()
        twin = Transformer(ModelConfig(**{**vars(config), "attention": AttentionConfig(kind="softmax")})).double()
        twin.load_state_dict(ours.state_dict(), strict=False)
        tokens = torch.randint(61, (2, 64))
        torch.testing.assert_close(ours(tokens), twin(tokens), atol=1e-6, rtol=1e-6)  # rope rotates in float32
        documents = torch.tensor([0, 7, 64], dtype=torch.int32)
        torch.testing.assert_close(ours(tokens[:1], documents), twin(tokens[:1], documents), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_later_tokens_and_other_documents_change_nothing() -> None:
    config = network(n_layers=2)
    torch.manual_seed(0)
    whole = Transformer(config).double()
    tokens = torch.randint(61, (1, 60))
    documents = torch.tensor([0, 20, 60], dtype=torch.int32)
    expected, changed = whole(tokens, documents), tokens.clone()
    changed[:, :20], changed[:, 50:] = (changed[:, :20] + 7) % 61, (changed[:, 50:] + 7) % 61
    found = whole(changed, documents)
    assert torch.equal(found[:, 20:50], expected[:, 20:50])
    assert not torch.isclose(found[:, :20], expected[:, :20]).all(-1).any()


@torch.no_grad()
def test_tiles_of_the_block_mask_are_those_with_chosen_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (model.dsa.indexer, model.block_masks):
        monkeypatch.setattr(one, "TILE", 16)
    config = network(DSAConfig(3, 8, 2))
    sparse, (x, *_) = module(config), draw(110, config)
    tokens = metadata(config, 110, DOCUMENTS).tokens
    bits = select_tokens(sparse.indexer(x, None, torch.float64), tokens, 2)
    view, token = tokens.view(None, bits), torch.arange(110)
    explicit, _ = mask_and_bias(view, (1, 4), token, token)
    assert explicit.shape == (1, 1, 110, 110)
    tiles = torch.nn.functional.pad(explicit, (0, 2, 0, 2)).unflatten(2, (7, 16)).unflatten(4, (7, 16)).any(5).any(3)
    found = chosen_block_mask(bits, view, 110).to_dense().bool()
    assert torch.equal(found, tiles) and found.float().mean() < 0.6


def test_rows_in_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    config = network()
    sparse, (x, *inputs) = module(config), [one.requires_grad_() for one in draw(75, config, rows=2)]
    cotangent = torch.randn(2, 4, 75, 8, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        out = sparse(x, *inputs, metadata(config, 75), SLOPES)
        return torch.autograd.grad((out * cotangent).sum(), inputs)

    whole = gradients()
    monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 8 * 75 * 20)
    for ours, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


@torch.no_grad()
def test_flex_attention_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens chosen anew and documents that end elsewhere are values, not code: no later step compiles again."""
    graphs = graphs_of_flex(monkeypatch)
    config = network()
    sparse = module(config)
    for seed, ends in enumerate(([40, 110], [7, 110], [20, 30, 110])):
        x, q, k, v = draw(110, config, seed=seed)
        documents = torch.tensor([0, *ends], dtype=torch.int32)
        ours = sparse(x, q, k, v, flex_metadata(config, 110, documents), SLOPES)
        torch.testing.assert_close(ours, sparse(x, q, k, v, metadata(config, 110, documents), SLOPES), **EXACT)
    assert len(graphs) == 1


def test_documents_of_no_tokens_are_none() -> None:
    tokens = make_metadata(network(), 110, DOCUMENTS, None, CPU).sparse.tokens
    starts = [max(start for start in DOCUMENTS.tolist() if start <= t) for t in range(110)]
    assert tokens.first_key[0].tolist() == starts and tokens.position[0].tolist() == [
        t - start for t, start in enumerate(starts)
    ]


def test_rounded_scores_keep_twelve_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1000, generator=generator, dtype=dtype) * 10
        mantissa, exponent = torch.frexp(x)
        torch.testing.assert_close(coarse(x), torch.ldexp((mantissa * 2**12).round(), exponent - 12), rtol=0, atol=0)
    assert coarse(torch.zeros(1)).item() == 0
    huge = torch.tensor([torch.inf, -torch.inf, 3e38])
    assert torch.equal(coarse(huge), huge)
