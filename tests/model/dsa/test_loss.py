"""What the indexer learns from: the loss against loops, whom it reaches, and that the indexer learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import model.visible_attention
from kernels.common.backends import INTERPRETED
from model.config import DSAConfig
from model.dsa.attention import DeepSeekSparseAttention
from model.dsa.indexer import IndexInputs, index_scores, select_tokens, wide
from model.dsa.loss import index_loss
from model.dsa.tokens import cached_tokens, packed_tokens
from model.kv_cache import Extension
from model.sparse_attention import collected_auxiliary
from model.transformer import Transformer
from tests.model.dsa.looped import SIZES, WARMUP, attended, module, network, scores
from tests.model.dsa.test_attention import CPU, DOCUMENTS, EXACT, SLOPES, metadata
from tests.model.sparse_inputs import draw, relative

DOCUMENT_TOKENS = packed_tokens(110, DOCUMENTS, 110, CPU)


def loss_of(sparse: DeepSeekSparseAttention, *inputs: Tensor, slopes: Tensor | None = None, documents=None) -> Tensor:
    """Sum of a layer's losses in a forward pass that is trained with."""
    config = network(sparse.config)
    sparse.train()
    with collected_auxiliary(sparse) as losses:
        sparse(*inputs, metadata(config, inputs[0].shape[1], documents), slopes)
    (found,) = losses
    return found


@pytest.mark.parametrize("at_once", [2**24, 2000])
@pytest.mark.parametrize("sizes", [SIZES, WARMUP], ids=["sparse", "warmup"])
def test_the_loss_equals_loops(sizes: DSAConfig, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", at_once)
    sparse, inputs = module(network(sizes)), draw(110, network(sizes))
    found = loss_of(sparse, *inputs, slopes=SLOPES, documents=DOCUMENTS)
    expected, bounds = 0.0, DOCUMENTS.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        x, q, k, v = (one[0][..., a:b, :] for one in inputs)
        count = sizes.select_tokens if sizes.is_sparse else 110
        expected += attended(q, k, v, scores(sparse, x), count, SLOPES)[1]
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), **EXACT)


def drawn_index(n: int = 30, rows: int = 2) -> tuple[IndexInputs, Tensor, Tensor]:
    """Inputs of the scores, and q and k of attention."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    index = IndexInputs(normal(rows, 3, n, 8), normal(rows, n, 8), normal(rows, 3, n))
    return index, normal(rows, 4, n, 8), normal(rows, 2, n, 8)


@pytest.mark.parametrize("at_once", [2**24, 900])
def test_gradients_are_those_of_autograd(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same loss with whole matrices, times what comes from above."""
    monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", at_once)
    index, q, k = drawn_index()
    index = IndexInputs(*(x.requires_grad_() for x in index))
    tokens = packed_tokens(30, None, 30, CPU)
    ours = torch.autograd.grad(index_loss(index, q, k, tokens, SLOPES) * 3, index)
    token = torch.arange(30)
    hidden = token > token[:, None]
    bias = -SLOPES[:, None, None] * (token[:, None] - token)
    raw = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + bias
    p = raw.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    by_head = (index.q @ index.k[:, None].mT).relu()
    log_q = (by_head * index.weights[..., None]).sum(1).masked_fill(hidden, -torch.inf).log_softmax(-1)
    loss = torch.nn.functional.kl_div(log_q.masked_fill(hidden, 0), p, reduction="sum")
    torch.testing.assert_close(index_loss(index, q, k, tokens, SLOPES), loss, **EXACT)
    for found, expected in zip(ours, torch.autograd.grad(loss * 3, index), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_planted_indexer_has_no_loss() -> None:
    """Positive products in one head, of the scale of attention's: both are the same softmax."""
    index, _, _ = drawn_index()
    index = IndexInputs(index.q[:, :1].abs(), index.k.abs(), torch.full((2, 1, 30), 8**-0.5, dtype=torch.float64))
    tokens = packed_tokens(30, None, 30, CPU)
    alike = index_loss(index, index.q.expand(-1, 4, -1, -1), index.k[:, None], tokens, None)
    torch.testing.assert_close(alike, torch.zeros((), dtype=torch.float64), **EXACT)
    other = index_loss(index._replace(weights=-index.weights), index.q, index.k[:, None], tokens, None)
    assert float(other) > 1


@pytest.mark.parametrize("count", [None, 9], ids=["warmup", "sparse"])
@pytest.mark.parametrize("case", ["packed", "rows of a cache"])
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_kernels_give_the_loss_of_masks(case: str, count: int | None) -> None:
    """And its gradients, up to float32's roundings, some hundred of them: tests/kernels/lightning_indexer bounds
    them."""
    extension = Extension(torch.tensor([[78, 79], [107, 108]]), None, slice(0, 110), None)
    packed = case == "packed"
    tokens = DOCUMENT_TOKENS if packed else cached_tokens(extension)
    index, q, k = drawn_index(110, 1 if packed else 2)
    if not packed:
        index, q = index._replace(q=index.q[:, :, :2], weights=index.weights[:, :, :2]), q[:, :, :2]
    index, q, k = IndexInputs(*(x.float().requires_grad_() for x in index)), q.float(), k.float()
    chosen = None if count is None else select_tokens(index, tokens, count)
    found = []
    for backend in ("triton", "torch"):
        loss = index_loss(index, q, k, tokens, SLOPES, chosen, backend)
        found.append([loss.detach(), *torch.autograd.grad(loss, index)])
    for ours, masked in zip(*found, strict=True):
        assert relative(ours, masked.double()) < 200 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_what_rounding_loses(dtype: torch.dtype) -> None:
    """Scores are float32: the loss is that of the rounded inputs."""
    index, q, k = drawn_index()
    tokens = packed_tokens(30, None, 30, CPU)
    rounded = IndexInputs(*(x.to(dtype) for x in index))
    found = index_loss(rounded, q.to(dtype), k.to(dtype), tokens, None)
    exact = IndexInputs(*(x.double() for x in rounded))
    expected = index_loss(exact, q.to(dtype).double(), k.to(dtype).double(), tokens, None)
    assert found.dtype == torch.float32
    # 1,860 terms of up to a few nats, each rounded a few times
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "nape", "nope"])
@pytest.mark.parametrize("sizes", [SIZES, WARMUP], ids=["sparse", "warmup"])
def test_neither_loss_reaches_the_others_weights(sizes: DSAConfig, positions: str) -> None:
    torch.manual_seed(0)
    whole = Transformer(network(sizes, positions, n_layers=2)).train()
    names = [name for name, _ in whole.named_parameters()]
    with collected_auxiliary(whole) as losses:
        hidden = whole(torch.randint(61, (2, 40)))
    assert len(losses) == 2
    for loss, ours in ((whole.logits(hidden).logsumexp(-1).sum(), False), (torch.stack(losses).sum(), True)):
        found = torch.autograd.grad(loss, list(whole.parameters()), allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if (".indexer." in name) == ours:
                assert gradient is not None and gradient.abs().max() > 0, name
            else:
                assert gradient is None, name


def test_a_sequence_of_one_token_gives_zeros() -> None:
    """Not none, which data-parallel training would wait for."""
    sparse = module(network())
    loss = loss_of(sparse, *draw(1, network()))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in sparse.parameters())


def test_there_is_no_loss_where_nothing_is_trained() -> None:
    whole, tokens = Transformer(network()), torch.randint(61, (1, 20))
    with collected_auxiliary(whole) as losses:
        whole.eval()(tokens)
        with torch.no_grad():
            whole.train()(tokens)
        assert losses == []
        whole(tokens)
        assert len(losses) == 1
    whole(tokens)
    assert len(losses) == 1 and whole.layers()[0].attention.sparse.collected is None  # type: ignore[union-attr]


def recall(sparse: DeepSeekSparseAttention, x: Tensor, q: Tensor, k: Tensor, count: int) -> float:
    """Share of the `count` keys of most weight that are among the `count` of the highest scores, in later queries."""
    n = x.shape[1]
    hidden = torch.ones(n, n).triu(1).bool()
    raw = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    p = raw.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    index = wide(sparse.indexer(x, metadata(network(sparse.config), n).rotary, torch.float64))
    ours = index_scores(index, slice(0, n), slice(0, n)).masked_fill(hidden, -torch.inf)
    later = slice(n // 2, n)
    wanted, found = (one[:, later].topk(count).indices for one in (p, ours))
    return float((wanted[..., None] == found[..., None, :]).any(-1).double().mean())


def test_recall_rises_in_warmup() -> None:
    """Of attention whose queries and keys follow from the layer's input, as in a model, alike in all heads."""
    config = network(replace(WARMUP, index_heads=4))
    sparse, generator = module(config), torch.Generator().manual_seed(3)
    w_q, w_k = (torch.randn(24, 8, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))

    def inputs(seed: int) -> list[Tensor]:
        x = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q, k = ((x @ w)[:, None].expand(-1, heads, -1, -1) for w, heads in ((w_q, 4), (w_k, 2)))
        return [x, q, k, k]

    held_out = inputs(10**6)[:3]
    before = recall(sparse, *held_out, 9)
    optimizer = torch.optim.Adam(sparse.parameters(), lr=2e-2)
    losses = []
    for step in range(250):
        loss = loss_of(sparse, *inputs(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses[-10:]) < min(losses[:10])
    rows = 2 * 32  # whose recalls are between 0 and 1: three standard errors of a difference, at most
    assert recall(sparse, *held_out, 9) > before + 3 * (2 * 0.25 / rows) ** 0.5


def test_rows_of_several_lengths_see_their_own_keys() -> None:
    """Of a cache, whose rows stand at other places."""
    extension = Extension(torch.tensor([[3, 4], [7, 8]]), None, slice(0, 9), torch.tensor([5, 9], dtype=torch.int32))
    tokens = cached_tokens(extension)
    index, q, k = drawn_index(9)
    parts = IndexInputs(index.q[:, :, :2], index.k, index.weights[:, :, :2])
    both = index_loss(parts, q[:, :, :2], k, tokens, SLOPES)
    each = []
    for row in range(2):
        one = cached_tokens(replace(extension, position=extension.position[row : row + 1]))
        row_slice = slice(row, row + 1)
        alone = IndexInputs(*(x[row_slice] for x in parts))
        each.append(index_loss(alone, q[row_slice, :, :2], k[row_slice], one, SLOPES))
    torch.testing.assert_close(both, sum(each), **EXACT)
