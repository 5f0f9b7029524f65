"""Sketch-and-Walk against its definition, written out in loops; chunks, the kernel, and what it counts."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.inference.incremental import extend, make_cache, prefill
from model.policies.block_attention import BlockPolicy
from model.policies.blocks import mean_scores
from model.policies.policy import SequenceView, use_policy
from model.policies.selection import BlockSelection
from model.policies.sketch_walk import SketchWalk, sketch_of
from tests.kernels.helpers import DEVICE, needs_triton
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of
from tests.model.policies.test_block_policies import by_kernel, check
from tests.model.test_transformer import DOCUMENTS, make, tiny, tokens

N_LAYERS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def passes(policy: SketchWalk, inputs: list[tuple[Tensor, Tensor]], bounds: list[int], view: SequenceView) -> Any:
    """Forward passes over the tokens between bounds, in all layers: the masks of each pass and layer, and the layers'
    memories. A pass of one token behind others is decoding."""
    memories: list[dict[str, Any]] = [{} for _ in inputs]
    found = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        for layer, (q, k) in enumerate(inputs):
            below = memories[layer - 1] if layer else {}
            facts = dict(layer=layer, n_layers=len(inputs), memory=memories[layer], below=below)
            one = replace(view, query_start=start, decoding=start > 0 and stop == start + 1, **facts)
            found.append(mask_of(policy, q[:, start:stop], k[:, :stop], one)[0])
    return [found[i : i + len(inputs)] for i in range(0, len(found), len(inputs))], memories


class Loops:
    """The definition of one layer. q, k: float64 (H, T, D) and (G, T, D)."""

    def __init__(self, policy: SketchWalk, layer: int, q: Tensor, k: Tensor, view: SequenceView) -> None:
        self.policy, self.q, self.k, self.view = policy, q.double(), k.double(), view
        self.sketch = sketch_of(q.shape[2], policy.channels, f"{policy.seed} {layer}", q.device).double()
        self.rows: list[list[float]] = []

    def sees(self, queries: range, keys: range) -> bool:
        window = self.view.window or 10**9
        return any(0 <= t - s < window for t in queries for s in keys)

    def row(self, queries: range, vectors: list[list[Tensor]], n_keys: int) -> list[float]:
        """Of A: the mean over heads and vectors (of each head). queries: the positions that they stand for."""
        size, n_blocks = self.policy.block, -(-n_keys // self.policy.block)
        blocks = [range(j * size, min((j + 1) * size, n_keys)) for j in range(n_blocks)]
        total = [0.0] * n_blocks
        for head, of_head in enumerate(vectors):
            for vector in of_head:
                scores = []
                for keys in blocks:
                    mean = sum(self.k[head // 2, s] for s in keys) / len(keys)
                    score = float((vector @ self.sketch) @ (mean @ self.sketch)) * self.view.scale
                    if self.view.alibi_slopes is not None:
                        distance = sum(queries) / len(queries) - sum(keys) / len(keys)
                        score -= float(self.view.alibi_slopes[head]) * max(0.0, distance)
                    scores.append(math.exp(score) if self.sees(queries, keys) else 0.0)
                for j, score in enumerate(scores):
                    total[j] += score / sum(scores) / len(vectors) / len(of_head)
        return total

    def prompt(self, n: int) -> None:
        for start in range(0, n, self.policy.block):
            queries = range(start, min(start + self.policy.block, n))
            means = [[sum(q[t] for t in queries) / len(queries)] for q in self.q]
            self.rows.append(self.row(queries, means, n))

    def token(self, t: int) -> list[float]:
        """The row of the token at t; A's row of its block is the mean over the block so far."""
        recent = range(max(0, t + 1 - self.policy.observed), t + 1)
        row = self.row(range(t, t + 1), [[q[s] for s in recent] for q in self.q], t + 1)
        before = t % self.policy.block
        if before:
            self.rows[-1] = [(old * before + new) / (before + 1) for old, new in zip(self.rows[-1], row, strict=True)]
        else:
            self.rows = [[*old, 0.0] for old in self.rows] + [row]
        return row

    def walk(self, row: list[float], state: list[float]) -> list[float]:
        beta = self.policy.beta
        for _ in range(self.policy.steps):
            hop = [sum(state[i] * self.rows[i][j] for i in range(len(row))) for j in range(len(row))]
            state = [(1 - beta) * direct + beta * further for direct, further in zip(row, hop, strict=True)]
        return state

    def kept(self, block: int, scores: list[float], n_keys: int) -> set[int]:
        size = self.policy.block
        queries = range(block * size, min((block + 1) * size, n_keys))
        seen = [j for j in range(block + 1) if self.sees(queries, range(j * size, min((j + 1) * size, n_keys)))]
        near, first = (math.ceil(share * len(seen)) for share in (self.policy.window, self.policy.sinks))
        sure = {j for j in seen if block - j < near or j < first}
        rest = sorted(scores[j] for j in seen if j not in sure)
        if not rest:
            return sure
        below, part = divmod((len(rest) - 1) * (1 - self.policy.top), 1)
        quantile = rest[int(below)] + (part * (rest[int(below) + 1] - rest[int(below)]) if part else 0)
        return sure | {j for j in seen if scores[j] > quantile}


def as_mask(blocks: list[set[int]], queries: range, n_keys: int, view: SequenceView, size: int) -> Tensor:
    window = view.window or 10**9
    kept = [[0 <= t - s < window and s // size in blocks[t // size] for s in range(n_keys)] for t in queries]
    return torch.tensor(kept)


CASES = [
    (SketchWalk(0.4, 0.1, 0.05, 4, 8, dense_layers=1, observed=3), 44, None, None),
    (SketchWalk(0.3, 0.2, 0.2, 4, 4, beta=0.6, steps=2, dense_layers=0, observed=9, seed=5), 43, SLOPES, None),
    (SketchWalk(0.5, 0.1, 0.1, 3, 5, beta=0.0, dense_layers=2), 38, None, None),
    (SketchWalk(0.4, 0.1, 0.1, 4, 8, beta=0.9, dense_layers=0, observed=4), 41, SLOPES, 23),
]


@pytest.mark.parametrize(("policy", "n_prompt", "slopes", "window"), CASES, ids=range(len(CASES)))
def test_it_is_its_definition(policy: SketchWalk, n_prompt: int, slopes: Tensor | None, window: int | None) -> None:
    """A prompt and tokens behind it, across an edge of a block, through layers that hand the walk on."""
    n, size = n_prompt + 6, policy.block
    inputs = [draw(n, n, seed)[:2] for seed in range(N_LAYERS)]
    view = view_of(n, n, slopes, window=window)
    found, memories = passes(policy, inputs, [0, *range(n_prompt, n + 1)], view)
    layers = [Loops(policy, i, *one, view) for i, one in enumerate(inputs)]
    below: list[list[float]] = []
    for layer, one in enumerate(layers):
        assert layer >= policy.dense_layers or found[0][layer].sum() == view.visible(slice(0, n_prompt), n, "cpu").sum()
        one.prompt(n_prompt)
        if layer < policy.dense_layers:
            continue
        below = [one.walk(row, below[i] if below else row) for i, row in enumerate(one.rows)]
        kept = [one.kept(i, scores, n_prompt) for i, scores in enumerate(below)]
        assert torch.equal(found[0][layer], as_mask(kept, range(n_prompt), n_prompt, view, size))
    for t in range(n_prompt, n):
        state: list[float] = []
        for layer, one in enumerate(layers[policy.dense_layers :], policy.dense_layers):
            row = one.token(t)
            state = one.walk(row, state or row)
            kept = {t // size: one.kept(t // size, state, t + 1)}
            expected = as_mask(kept, range(t, t + 1), t + 1, view, size)
            assert torch.equal(found[1 + t - n_prompt][layer], expected)
    for one, memory in list(zip(layers, memories, strict=True))[policy.dense_layers :]:
        expected = torch.tensor(one.rows).double()
        torch.testing.assert_close(memory["attention"].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_walk_comes_from_the_layer_below() -> None:
    """Far keys that only the layer below looks at are kept; with beta 0 each layer chooses for itself."""
    inputs = [draw(96, 96, seed, 3.0)[:2] for seed in (0, 1)]
    for beta, alike in ((0.95, False), (0.0, True)):
        policy = SketchWalk(0.2, 0.1, 0.05, 4, beta=beta, steps=1, dense_layers=0)
        both = passes(policy, inputs, [0, 96], view_of(96, 96))[0][0][1]
        alone = mask_of(policy, *inputs[1], view_of(96, 96, layer=1))[0]
        assert torch.equal(both, alone) == alike


def test_rows_of_a_are_shares_of_what_came_before() -> None:
    policy = SketchWalk(0.3, block=4, dense_layers=0, channels=4)
    bounds = [0, 13, 14, 31, 32, 33, 40]
    for window in (None, 9):
        memory = passes(policy, [draw(40, 40)[:2]], bounds, view_of(40, 40, SLOPES, window=window))[1][0]
        assert memory["attention"].shape == (10, 10) and (memory["attention"].triu(1) == 0).all()
        torch.testing.assert_close(memory["attention"].sum(1), torch.ones(10), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [8, 6])
def test_all_channels_give_exact_scores(size: int) -> None:
    """And with beta 0 the choice is of blocks by their own attention."""
    q, k, _ = (x[..., :size] for x in draw(80, 80, 3))
    view, policy = view_of(80, 80, SLOPES), SketchWalk(0.3, 0.05, 0.05, 8, 8, beta=0.0, dense_layers=0)
    rows = policy.attention_rows(q, k, view)
    exact = mean_scores(q, k, view, (8, 8)).softmax(-1).mean(0)
    torch.testing.assert_close(rows, exact, atol=1e-6, rtol=1e-5)
    kept = policy.select(q, k, view_of(80, 80, SLOPES)).blocks[0]
    for i in range(10):  # one block nearest, one first, and of the i - 1 others as many as exceed the quantile
        others = exact[i, 1:i]
        n_best = math.ceil(0.3 * max(0, i - 2))
        assert kept[i].nonzero().flatten().tolist() == sorted({0, i, *(1 + others.topk(n_best).indices).tolist()})


def test_sketches_are_right_on_average() -> None:
    """Fewer channels: products of sketches are those of the vectors over seeds, each a rotation's part."""
    x, y = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).double()
    products = torch.tensor([
        float((x @ s) @ (y @ s)) for s in (sketch_of(12, 4, str(i), x.device).double() for i in range(4000))
    ])  # fmt: skip
    error = products.std() / 4000**0.5
    assert abs(products.mean() - x @ y) < 4 * error and error > 0
    full = sketch_of(12, 99, "0", x.device)
    assert full.shape == (12, 16) and sketch_of(12, 4, "0", x.device).shape == (12, 4)
    torch.testing.assert_close(full @ full.T, torch.eye(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(full.abs(), torch.full((12, 16), 0.25))
    assert not (full > 0).all(0).any()  # the constant channel has random signs too
    assert not torch.equal(full, sketch_of(12, 99, "1", x.device))


def test_chunks_of_whole_blocks_are_one_prompt() -> None:
    policy = SketchWalk(0.3, 0.1, 0.05, 4, 4, dense_layers=1)
    inputs = [draw(70, 70, seed)[:2] for seed in range(N_LAYERS)]
    whole = passes(policy, inputs, [0, 70, 71], view_of(70, 70, SLOPES))
    chunks, memories = passes(policy, inputs, [0, 4, 36, 64, 70, 71], view_of(70, 70, SLOPES))
    for layer in range(N_LAYERS):
        parts = [torch.nn.functional.pad(one[layer], (0, 70 - one[layer].shape[1])) for one in chunks[:-1]]
        assert torch.equal(torch.cat(parts), whole[0][0][layer])
        assert torch.equal(chunks[-1][layer], whole[0][1][layer])
    # and where they end within blocks, all is as it was once the blocks are whole
    other = passes(policy, inputs, [0, 5, 7, 38, 63, 70], view_of(70, 70, SLOPES))[1]
    for one, memory in zip(other[1:], memories[1:], strict=True):
        expected = memory["attention"][:17]
        torch.testing.assert_close(one["attention"][:17], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("phases", [None, {"decode"}])
def test_a_model_reads_its_prompt_in_chunks(phases: Any) -> None:
    model = make(tiny("softmax", "nape", n_layers=N_LAYERS))
    policy = SketchWalk(0.3, 0.1, 0.05, block=8, channels=4, dense_layers=1)

    def answer(chunk: int) -> tuple[Tensor, Tensor]:
        cache = make_cache(model, 1, 80)
        with use_policy(model, policy, phases) as record:
            prefill(model, tokens()[:, :70].tolist(), cache, chunk)
            out = torch.cat([extend(model, tokens()[:, i : i + 1], cache)[0] for i in range(70, 80)])
        return out, record.density("decode")

    (one, density), (many, others) = answer(70), answer(24)
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)
    assert torch.equal(density, others) and (density[0] == 1).all() and (density[1:] < 0.9).all()


def test_packed_documents_are_those_alone() -> None:
    """Each document's walk goes on from its own in the layer below."""
    model = make(tiny("softmax", "nape", n_layers=N_LAYERS))
    policy = SketchWalk(0.2, 0.1, 0.05, block=8, channels=4, dense_layers=1)
    bounds = DOCUMENTS.tolist()
    with use_policy(model, policy), torch.no_grad():
        packed = model(tokens(), DOCUMENTS)
        alone = [model(tokens()[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        rows = model(tokens().view(2, 64))
        one_by_one = [model(tokens()[:, a : a + 64]) for a in (0, 64)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


def test_what_choosing_reads_is_counted() -> None:
    """Mean keys in 4 channels of 2 x 8 numbers a pair, and A, which four heads share."""
    policy = SketchWalk(0.3, 0.1, 0.1, block=4, channels=4, dense_layers=1)
    q, k, v = draw(42, 42)
    memory: dict[str, Any] = {}
    facts = dict(layer=1, memory=memory)
    attended = policy.attend(q[:, :41], k[:, :41], v[:, :41], view_of(41, 41, **facts))
    assert (attended.read - attended.kept).tolist() == [math.ceil((66 * 4 + 66 // 4) / 16)] * 4
    token = policy.attend(q[:, 41:], k, v, view_of(1, 42, **facts))
    assert (token.read - token.kept).tolist() == [math.ceil((11 * 4 + 66 // 4) / 16)] * 4
    assert (token.kept < 42).all()
    dense = policy.attend(q[:, 41:], k, v, view_of(1, 42))
    assert dense.read.tolist() == [42] * 4


@dataclass(frozen=True)
class Chosen(BlockPolicy):
    selection: BlockSelection

    @property
    def sizes(self) -> tuple[int, int]:
        return self.selection.query_block, self.selection.key_block

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        return self.selection


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])
def test_the_kernel_takes_chunks_anywhere(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks lie on the grid of positions: a whole text, a chunk within a block, and a token."""
    by_kernel(monkeypatch)
    policy = SketchWalk(0.2, 0.05, 0.05, dense_layers=0)
    q, k, v = (x.to(DEVICE) for x in draw(460, 460))
    memory: dict[str, Any] = {}
    for start, stop in ((0, 300), (300, 459), (459, 460)):
        view = view_of(stop - start, stop, SLOPES.to(DEVICE), memory=memory)
        one = (q[:, start:stop], k[:, :stop], v[:, :stop])
        chosen = policy.select(*one[:2], replace(view, memory=dict(memory)))
        expected, found = check(Chosen(chosen), *one, view), policy.attend(*one, view)
        assert torch.equal(found.out, expected.out) and torch.equal(found.kept, expected.kept)
        assert (found.kept < found.visible).all()


def test_a_dense_setting_keeps_nothing_in_memory() -> None:
    memory: dict[str, Any] = {}
    q, k, _ = draw(20, 20)
    assert mask_of(SketchWalk(1.0, dense_layers=0), q, k, view_of(20, 20, memory=memory)).sum() == 210 and not memory


def test_what_it_cannot_do_is_an_error() -> None:
    assert SketchWalk() == SketchWalk(0.125, 0.05, 0.025, 64, 128, 0.25, 3, 32, 2, 0)
    for wrong, said in (
        (lambda: SketchWalk(0), "top is 0: expected a share"),
        (lambda: SketchWalk(window=1.5), "window is 1.5: expected a share"),
        (lambda: SketchWalk(beta=1), r"beta is 1: expected the walk's share in \[0, 1\)"),
        (lambda: SketchWalk(block=0), "block is 0: expected at least 1"),
        (lambda: SketchWalk(steps=0), "steps is 0: expected at least 1"),
        (lambda: SketchWalk(dense_layers=-1), "dense_layers is -1: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    q, k, _ = draw(4, 9)
    for layer, options, said in (
        (2, {}, "sketch_walk has seen no prompt"),
        (0, dict(key_start=3), "sketch_walk chooses from whole prompts: not from a cache that a window has cut"),
    ):
        view = view_of(1, 9, layer=layer, **options)
        for call in (SketchWalk().select, SketchWalk().observe):
            with pytest.raises(ValueError, match=said):
                call(q[:, :1], k, view)
