"""The three branches against loops, on the path with masks and on FlexAttention's, and what they are as a layer."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import model.nsa.attention as model_nsa
import model.nsa.selection
import model.visible_attention
from kernels import selected_block_attention
from model.config import ModelConfig, NSAConfig
from model.inference.incremental import extend, make_cache, prefill
from model.nsa.attention import NativeSparseAttention, NSAMetadata, block_masks
from model.nsa.selection import block_scores, select_blocks
from model.transformer import Transformer
from tests.model.nsa.looped import SIZES, branches, module, network
from tests.model.sparse_inputs import draw, graphs_of_flex, with_large_weights

CPU = torch.device("cpu")
# one of no tokens, some too short for a compressed block, ends inside of blocks
DOCUMENTS = torch.tensor([0, 5, 5, 6, 12, 53, 110], dtype=torch.int32)
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0])
# float64 sums of at most 110 terms in another order, through phi: a few hundred units in the last place
EXACT = dict(atol=1e-12, rtol=1e-12)


def metadata(config: ModelConfig, n_tokens: int, cu_seqlens: Tensor | None = None, longest: int = 57) -> NSAMetadata:
    longest = n_tokens if cu_seqlens is None else longest
    return NativeSparseAttention.metadata(config, n_tokens, cu_seqlens, longest, CPU)


def flex_metadata(*args) -> NSAMetadata:
    """As on CUDA, but for the kernel, whose reference runs in its place."""
    blocks = metadata(*args).blocks
    return NSAMetadata(blocks, *block_masks(blocks))


@pytest.fixture(params=["masks", "masks in blocks of rows", "flex"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What makes the metadata of a path."""
    if request.param == "flex":  # computes all scores, under the same mask and with the same tiles left out
        monkeypatch.setattr(
            model.visible_attention, "compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention
        )
        monkeypatch.setattr(model_nsa, "runs_on_triton", lambda q: True)
        return flex_metadata
    if request.param != "masks":
        monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 4 * 16)
        monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", 1000)
    return metadata


@torch.no_grad()
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_branches_equal_loops(slopes: Tensor | None, made) -> None:
    config = network()
    sparse, (_, q, k, v) = module(config), draw(75, config, rows=2)
    ours = sparse.attend(q, k, v, made(config, 75), slopes)
    for row in range(2):
        for found, expected in zip(ours, branches(sparse, q[row], k[row], v[row], slopes), strict=True):
            torch.testing.assert_close(found[row], expected, **EXACT)


@torch.no_grad()
def test_packed_documents_have_the_blocks_that_each_has_alone(made) -> None:
    config = network()
    sparse, (_, q, k, v) = module(config), draw(110, config)
    ours = sparse.attend(q, k, v, made(config, 110, DOCUMENTS), SLOPES)
    bounds = DOCUMENTS.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        alone = branches(sparse, q[0, :, a:b], k[0, :, a:b], v[0, :, a:b], SLOPES)
        for found, expected in zip(ours, alone, strict=True):
            torch.testing.assert_close(found[0, :, a:b], expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        NSAConfig(4, 4, None, 4, 3, 1, 1),  # blocks of one size, as of fla's kernels
        NSAConfig(8, 2, 5, 4, 2, 1, 200),  # compressed blocks longer than selected ones
        NSAConfig(32, 16, None, 64, 16, 2, 512),  # the paper's
    ],
    ids=["equal", "long", "paper"],
)
def test_other_sizes(sizes: NSAConfig, made) -> None:
    config = network(sizes)
    sparse, (_, q, k, v) = module(config), draw(70, config)
    for found, expected in zip(
        sparse.attend(q, k, v, made(config, 70), None), branches(sparse, q[0], k[0], v[0], None), strict=True
    ):
        torch.testing.assert_close(found[0], expected, **EXACT)


def test_first_own_and_the_block_before_are_always_selected() -> None:
    config = network()
    sparse, (_, q, k, _) = module(config), draw(110, config)
    blocks = metadata(config, 110, DOCUMENTS).blocks
    chosen = select_blocks(q, sparse.compress_k(k[:, :2], blocks.compressed_tokens()), blocks, None)
    own = blocks.position[0] // SIZES.select_block
    first_keys, bounds = blocks.selected_first_keys(chosen), DOCUMENTS.tolist()
    for t in range(110):
        document = max(start for start in bounds if start <= t)
        for group in range(2):
            those = set(chosen[0, group, t].tolist()) - {-1}
            assert {document + 8 * j for j in those} == set(first_keys[0, group, t].tolist()) - {-1}
            assert {0, int(own[t]), max(0, int(own[t]) - 1)} <= those and max(those) == own[t]
            assert len(those) == min(SIZES.select_count, int(own[t]) + 1)


def test_scores_are_the_compression_branchs_weights() -> None:
    """Of each group, summed: they are as many as the heads, times the strides of a block that lies within one."""
    config = network(NSAConfig(4, 2, None, 4, 3, 1, 1))
    sparse, (_, q, k, _) = module(config), draw(40, config)
    blocks = metadata(config, 40).blocks
    compressed = sparse.compress_k(k[:, :2], blocks.compressed_tokens())
    scores = block_scores(q, compressed, blocks, slice(0, 40), None)
    assert scores[:, :, :3].abs().max() == 0  # no compressed block has ended
    torch.testing.assert_close(scores[:, :, 3:].sum(-1), torch.full((1, 2, 37), 2 * 2.0, dtype=torch.float64))


@torch.no_grad()
def test_cached_tokens_read_the_selected_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths in chunks, then single tokens: by the kernel's reference as by masks."""
    model = Transformer(network(positions="nape")).double()
    with_large_weights(model)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(61, (length,), generator=generator).tolist() for length in (75, 60, 9)]

    def run() -> list[Tensor]:
        cache = make_cache(model, 3, 80)
        found = [prefill(model, prompts, cache, chunk_tokens=60)]
        found += [extend(model, torch.tensor([[i], [i + 1], [i + 2]]), cache) for i in range(3)]
        return found

    calls = []

    def counted(*inputs, **options) -> Tensor:
        calls.append(inputs[4].shape)
        return selected_block_attention(*inputs, **options)

    masked = run()
    monkeypatch.setattr(model_nsa, "runs_on_triton", lambda q: True)
    monkeypatch.setattr(model_nsa, "selected_block_attention", counted)
    for ours, expected in zip(run(), masked, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    assert calls[-3:] == [(3, 1)] * 3 and len(calls) > 5


def test_rows_in_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    config = network()
    sparse, inputs = module(config), [x.requires_grad_() for x in draw(75, config, rows=2)]
    cotangent = torch.randn(2, 4, 75, 8, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        out = sparse(*inputs, metadata(config, 75), SLOPES)
        return torch.autograd.grad((out * cotangent).sum(), [*inputs, *sparse.parameters()])

    whole = gradients()
    monkeypatch.setattr(model.visible_attention, "MASK_ELEMENTS", 8 * 75 * 20)
    for ours, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_gradients_are_those_of_differences() -> None:
    """Away from where another block is chosen the whole is smooth: selecting has no gradient."""
    config = network(NSAConfig(4, 2, None, 4, 3, 1, 5), head_dim=4)
    sparse, inputs = module(config), [x.requires_grad_() for x in draw(14, config)]
    assert torch.autograd.gradcheck(lambda *x: sparse(*x, metadata(config, 14), SLOPES), inputs, fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("branch", range(3))
def test_one_gate_open_gives_its_branch(branch: int) -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(40, config)
    sparse.gate.weight.zero_()
    sparse.gate.bias.copy_(torch.full((3, 4), -800.0).index_fill_(0, torch.tensor([branch]), 800.0).flatten())
    ours = sparse(x, q, k, v, metadata(config, 40), None)
    assert torch.equal(ours, sparse.attend(q, k, v, metadata(config, 40), None)[branch])


@torch.no_grad()
def test_gates_are_of_each_head_branch_and_token() -> None:
    config = network()
    sparse, (x, q, k, v) = module(config), draw(20, config, rows=2)
    parts = sparse.attend(q, k, v, metadata(config, 20), None)
    ours = sparse(x, q, k, v, metadata(config, 20), None)
    for row, head, t in ((0, 0, 3), (1, 3, 19), (1, 2, 0)):
        gates = [
            torch.sigmoid(sparse.gate.weight[4 * c + head] @ x[row, t] + sparse.gate.bias[4 * c + head])
            for c in range(3)
        ]
        expected = sum(gate * part[row, head, t] for gate, part in zip(gates, parts, strict=True))
        torch.testing.assert_close(ours[row, head, t], expected, **EXACT)


@torch.no_grad()
def test_all_blocks_selected_is_dense_attention() -> None:
    config = network(NSAConfig(6, 2, None, 8, 10, 2, 11))
    sparse, (_, q, k, v) = module(config), draw(80, config)
    ours = sparse.attend(q, k, v, metadata(config, 80), None)[1]
    dense = scaled_dot_product_attention(q, k[:, 2:4], v[:, 2:4], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, dense, **EXACT)


def test_phi_learns_from_the_compression_branch_alone() -> None:
    config = network()
    sparse, (_, q, k, v) = module(config), draw(60, config)
    parameters = [*sparse.compress_k.parameters(), *sparse.compress_v.parameters()]
    parts = sparse.attend(q, k.requires_grad_(), v, metadata(config, 60), None)
    for part in parts[1:]:
        assert (
            torch.autograd.grad(part.sum(), [k, *parameters], retain_graph=True, allow_unused=True)[1:] == (None,) * 6
        )
        assert torch.autograd.grad(part.square().sum(), k, retain_graph=True)[0][:, :2].abs().max() == 0
    found = torch.autograd.grad(parts[0].square().sum(), parameters)
    assert all(one.abs().max() > 1e-6 for one in found)


def test_phi_has_zero_gradients_where_no_block_is_full() -> None:
    """Not none, which data-parallel training would wait for; and numbers, for queries that see nothing."""
    config = network()
    sparse, (x, q, k, v) = module(config), draw(5, config)
    sparse(x, q, k, v, metadata(config, 5), None).sum().backward()
    for phi in (sparse.compress_k, sparse.compress_v):
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in phi.parameters())


def test_compiled_blocks_attend_alike() -> None:
    """What is compiled around NSA leaves it as it is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Transformer(network(positions="rope"))
    compiled = copy.deepcopy(eager)
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    tokens = torch.randint(61, (2, 40))
    for one in (eager, compiled):
        one(tokens).square().mean().backward()
    for (name, p), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_flex_attention_is_compiled_once_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that end elsewhere are values, not code: no later step compiles again. Selected blocks have a kernel of
    their own."""
    graphs = graphs_of_flex(monkeypatch)
    config = network()
    sparse = module(config)
    for seed, ends in enumerate(([40, 110], [7, 110], [20, 30, 110])):
        _, q, k, v = draw(110, config, seed=seed)
        documents = torch.tensor([0, *ends], dtype=torch.int32)
        with monkeypatch.context() as as_on_cuda:
            as_on_cuda.setattr(model_nsa, "runs_on_triton", lambda q: True)
            ours = sparse.attend(q, k, v, flex_metadata(config, 110, documents, 110), SLOPES)
        masked = sparse.attend(q, k, v, metadata(config, 110, documents, 110), SLOPES)
        for found, expected in zip(ours, masked, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)
        assert len(graphs) == 2


def test_what_is_compiled_within_is_compiled() -> None:
    """FlexAttention, in the part that torch.compile leaves out of a block: else it would compute all scores."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compiled.append(str(graph.code))
        return graph

    inner = torch.compile(lambda x: x.sin(), backend=backend, fullgraph=True)

    @torch.compiler.disable
    def apart(x: Tensor) -> Tensor:
        return inner(x)

    torch._dynamo.reset()
    torch.compile(lambda x: apart(x + 1) * 2, backend=backend)(torch.ones(2))
    assert sum("sin" in code for code in compiled) == 1
