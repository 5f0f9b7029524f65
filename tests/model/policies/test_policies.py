"""Sparse-attention policies: dense at full density, causal, within documents, and what each one selects."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eval.sparse_frontier.names import NAMES
from model.config import AttentionKind, Positions
from model.inference.incremental import extend, make_cache, prefill
from model.policies.double_p import DoubleP
from model.policies.families import FAMILIES, policy_at
from model.policies.flexprefill import FlexPrefill
from model.policies.h2o import H2O
from model.policies.head_patterns import Candidate, HeadPatterns
from model.policies.lm_infinite import LMInfinite
from model.policies.minference import BlockSparse, VerticalSlash
from model.policies.patterns import Fixed, Longformer, Strided
from model.policies.policy import Attended, SequenceView, SparsePolicy, use_policy
from model.policies.quest import Quest
from model.policies.selection import Selection
from model.policies.sketch_walk import SketchWalk
from model.policies.snapkv import AdaSnapKV, PyramidKV, SnapKV
from model.policies.sparge import SpargeAttention
from model.policies.sparq import SparQ
from model.policies.topk import OracleTopK
from model.policies.twilight import Twilight
from model.policies.vattention import VAttention
from model.policies.window import SlidingWindow, StreamingLLM
from tests.model.test_transformer import DOCUMENTS, make, tiny, tokens

TOLERANCE = dict(atol=1e-4, rtol=1e-4)
LONG = 10**6
SET_DENSE: list[SparsePolicy] = [
    SlidingWindow(LONG), StreamingLLM(4, LONG), OracleTopK(LONG), Quest(LONG), VerticalSlash(1, LONG),
    BlockSparse(LONG), FlexPrefill(1.0), SnapKV(LONG), PyramidKV(LONG), AdaSnapKV(LONG), H2O(LONG, LONG),
    DoubleP(1.0, 1.0), SpargeAttention(1.0), SparQ(LONG), Twilight(Quest(LONG), 1.0),
    VAttention(Quest(1, 4, dense_layers=0), sinks=1, local=2, rate=1.0),
    Strided(LONG), Fixed(LONG, 1), LMInfinite(128), Longformer(LONG, LONG, gap=1),
    HeadPatterns.everywhere(Candidate(1, (1, LONG)), 2, 4), SketchWalk(1.0), SketchWalk(dense_layers=2),
]  # fmt: skip
SET_SPARSE: list[SparsePolicy] = [
    SlidingWindow(9), StreamingLLM(4, 9), OracleTopK(2, 16), Quest(2, 4, dense_layers=0), VerticalSlash(5, 6, 9),
    BlockSparse(2, 16), FlexPrefill(0.4, 0.2, 8, 8), SnapKV(20, 6), PyramidKV(20, 6), AdaSnapKV(20, 6), H2O(9, 8),
    DoubleP(0.7, 0.4, 4), SpargeAttention(0.3, -2.0, 0.05, 16, 8, 16), SparQ(9, 2, 3),
    Twilight(Quest(3, 4, dense_layers=0), 0.6, dense_layers=0),
    VAttention(Quest(1, 4, dense_layers=0), 0.7, 0.3, sinks=2, local=3),
    Strided(9), Fixed(12, 3), LMInfinite(9, 4), Longformer(5, 12, 1, 3),
    HeadPatterns("mixed", torch.tensor([[0, 1, 2, 1]]).expand(2, 4), torch.tensor([[3, 9], [33, 8], [1, 0], [5, 31]])
                 .expand(2, 4, 2)),
    SketchWalk(0.3, 0.1, 0.05, block=8, channels=4, observed=5, dense_layers=0),
]  # fmt: skip
DENSE = [*SET_DENSE, *(policy_at(name, 1.0, 128) for name in FAMILIES)]
SPARSE = [*SET_SPARSE, *(policy_at(name, 0.2, 128) for name in FAMILIES)]


def named(policy: SparsePolicy) -> str:
    return policy.name


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def view_of(n_queries: int, n_keys: int, slopes: Tensor | None = None, window: int | None = None) -> SequenceView:
    return SequenceView(0, 2, n_queries == 1 < n_keys, n_keys - n_queries, 0, 8**-0.5, window, slopes, {})


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("policy", [p for p in SET_DENSE if not p.remembers], ids=named)
def test_rows_of_different_lengths_equal_dense_ones(policy: SparsePolicy, window: int | None) -> None:
    model = make(tiny("softmax", "nape", window=window))
    prompts = [tokens()[0, :n].tolist() for n in (60, 33, 1)]

    def answer() -> Tensor:
        cache = make_cache(model, 3, 62)
        first = prefill(model, prompts, cache, 50)
        return torch.stack([first, *(extend(model, torch.tensor([[5], [6], [7]]), cache)[:, 0] for _ in range(2))])

    dense = answer()
    with use_policy(model, policy):
        torch.testing.assert_close(answer(), dense, **TOLERANCE)


CASES = [("softmax", "nape", None), ("softmax", "nape", 40), ("ssmax", "rope", 40), ("softmax", "nope", None)]


@pytest.mark.parametrize(("kind", "positions", "window"), CASES)
@pytest.mark.parametrize("policy", DENSE, ids=named)
def test_full_density_equals_dense_attention(
    policy: SparsePolicy, kind: AttentionKind, positions: Positions, window: int | None
) -> None:
    """Packed documents in one pass, and a prompt in chunks that is continued token by token."""
    model = make(tiny(kind, positions, window=window))
    with torch.no_grad():
        dense = model.logits(model(tokens(), DOCUMENTS, 128))
        whole = model.logits(model(tokens()))[0]
    refused = policy.remembers and window is not None
    with (
        use_policy(model, policy) as record,
        torch.no_grad(),
        pytest.raises(ValueError, match="a window has cut") if refused else nullcontext(),
    ):
        packed = model.logits(model(tokens(), DOCUMENTS, 128))
        cache = make_cache(model, 1, 128)
        found = [prefill(model, tokens()[:, :121].tolist(), cache, 50)]
        found += [extend(model, tokens()[:, i : i + 1], cache)[0] for i in range(121, 128)]
    torch.testing.assert_close(packed, dense, **TOLERANCE)
    if refused:
        return
    torch.testing.assert_close(model.logits(torch.cat(found)), whole[120:], **TOLERANCE)
    assert set(record.counts) == policy.phases
    for phase in policy.phases:
        assert (record.density(phase) == 1).all() and (record.tile_density(phase) == 1).all()


@pytest.mark.parametrize("policy", [p for p in SET_SPARSE if "prefill" not in p.phases], ids=named)
def test_a_prompt_in_chunks_is_one_prompt(policy: SparsePolicy) -> None:
    model = make(tiny("softmax", "nape"))

    def answer(chunk: int) -> Tensor:
        cache = make_cache(model, 1, 80)
        with use_policy(model, policy) as record:
            prefill(model, tokens()[:, :70].tolist(), cache, chunk)
            out = torch.cat([extend(model, tokens()[:, i : i + 1], cache)[0] for i in range(70, 80)])
        assert (record.density("decode") < 1).all()
        return out

    torch.testing.assert_close(answer(14), answer(70), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer(23), answer(70), atol=1e-5, rtol=1e-5)  # 3 x 23 would leave one token alone


@settings(max_examples=12)
@given(st.data())
@pytest.mark.parametrize("policy", SPARSE, ids=named)
def test_documents_stay_apart(policy: SparsePolicy, data: st.DataObject) -> None:
    """Documents of any lengths: a changed token changes no output of another document."""
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=2, max_size=4))
    changed = data.draw(st.integers(0, sum(lengths) - 1))
    text = torch.randint(0, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(changed))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    model = make(tiny("softmax", "nape"))
    with use_policy(model, policy), torch.no_grad():
        out = model(text, cu_seqlens)[0]
        text[0, changed] = (text[0, changed] + 1) % 97
        other = model(text, cu_seqlens)[0]
    assert out.isfinite().all()
    start, end = int(cu_seqlens[cu_seqlens <= changed][-1]), int(cu_seqlens[cu_seqlens > changed][0])
    torch.testing.assert_close(other[:start], out[:start], atol=0, rtol=0)
    torch.testing.assert_close(other[end:], out[end:], atol=0, rtol=0)


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("policy", SPARSE, ids=named)
def test_attention_is_causal_and_within_the_window(policy: SparsePolicy, data: st.DataObject) -> None:
    """Values of keys that a query may not see change nothing of its output, and each query sees some key: with values
    of one constant, the output is that constant (less what SpargeAttention drops after normalising)."""
    before = data.draw(st.integers(0, 130))
    n_queries = data.draw(st.integers(1, 140)) if "prefill" in policy.phases else 1
    n_keys = before + n_queries
    window = data.draw(st.none() | st.integers(1, 80))
    slopes = data.draw(st.sampled_from([None, torch.tensor([1.0, 0.5, 0.0, 0.0])]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    q = torch.randn(4, n_queries, 8, generator=generator)
    k, v = torch.randn(2, 2, n_keys, 8, generator=generator)
    prompt = torch.randn(4, before, 8, generator=generator)

    def attend(v: Tensor) -> Attended:
        view = view_of(n_queries, n_keys, slopes, window)
        if before and policy.remembers:
            policy.observe(prompt, k[:, :before], replace(view, decoding=False, query_start=0))
        return policy.attend(q, k, v, view)

    attended = attend(v)
    assert (attended.kept > 0).all() and (attended.kept <= attended.visible).all()
    assert (attended.live_tiles > 0).all() and (attended.live_tiles <= attended.total_tiles).all()
    changed = data.draw(st.integers(0, n_keys - 1))
    other = v.clone()
    other[:, changed] += 1
    affected = view_of(n_queries, n_keys, window=window).visible(slice(0, n_queries), n_keys, q.device)[:, changed]
    torch.testing.assert_close(attend(other).out[:, ~affected], attended.out[:, ~affected], atol=0, rtol=0)
    ones = attend(torch.ones_like(v)).out
    if isinstance(policy, SpargeAttention):
        assert ((ones > 0) & (ones < 1 + 1e-5)).all()
    else:
        torch.testing.assert_close(ones, torch.ones_like(ones), atol=1e-5, rtol=0)


def test_views_have_the_memory_of_the_layer_below() -> None:
    """Of the same sequence: a document of this forward pass, or a row of the cache."""
    seen: list[tuple[int, Any, int]] = []

    class Watching(SlidingWindow):
        def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
            seen.append((view.layer, view.below.get("keys"), k.shape[1]))
            view.memory["keys"] = k.shape[1]
            return super().select(q, k, view)

    model = make(tiny("softmax", n_layers=3))
    with use_policy(model, Watching(9)), torch.no_grad():
        model(tokens(), DOCUMENTS)
        cache = make_cache(model, 2, 40)
        prefill(model, [tokens(30)[0].tolist(), tokens(20)[0].tolist()], cache, 64)
        extend(model, tokens(2).view(2, 1), cache)
    lengths = [30, 1, 69, 28, 30, 30, 31, 21]  # the prompts of a cache are padded while they are read
    by_layer = [[one for one in seen if one[0] == layer] for layer in range(3)]
    assert [one[1:] for one in by_layer[0]] == [(None, n) for n in lengths]
    assert [one[1:] for one in by_layer[1]] == [one[1:] for one in by_layer[2]] == [(n, n) for n in lengths]


def test_density_counts_pairs_and_tiles() -> None:
    """A window of 64 in 3 tiles of 64 tokens: 64 keys a query after the first 64; the far tile is dead."""
    model = make(tiny("softmax", "nope"))
    with use_policy(model, SlidingWindow(64)) as record, torch.no_grad():
        model(tokens(192))
    pairs = 64 * 65 / 2 + 128 * 64
    torch.testing.assert_close(record.density("prefill"), torch.full((2, 4), pairs / (192 * 193 / 2)).double())
    torch.testing.assert_close(record.tile_density("prefill"), torch.full((2, 4), 5 / 6).double())
    with pytest.raises(ValueError, match="did not act in phase 'decode': it acted in \\['prefill'\\]"):
        record.density("decode")


def test_the_table_of_the_docs_has_every_policy() -> None:
    """With the phases where it acts, and a name in the report."""
    lines = (Path(__file__).parents[3] / "docs/sparse_attention.md").read_text().splitlines()
    rows = [line.split("|")[1:4] for line in lines if line.startswith("| `")]
    acts = {name: phases.strip() for names, _, phases in rows for name in re.findall(r"`(\w+)`", names)}
    where = {"both": {"prefill", "decode"}, "prompt": {"prefill"}, "decoding": {"decode"}}
    found = {name: policy_at(name, 0.5, 128).phases for name in FAMILIES}
    assert acts.keys() == found.keys() <= NAMES.keys()
    assert all(where[acts[name]] == phases for name, phases in found.items())


def test_what_cannot_run_is_an_error() -> None:
    with (
        pytest.raises(ValueError, match="kind is 'asentmax': give its softmax twin"),
        use_policy(make(tiny("asentmax")), SlidingWindow(3)),
    ):
        pass
    model = make(tiny("softmax"))
    with (
        use_policy(model, SlidingWindow(3)),
        pytest.raises(ValueError, match="under a policy already"),
        use_policy(model, SlidingWindow(3)),
    ):
        pass
    assert all(block.attention.override is None for block in model.layers())
    for wrong in (lambda: SlidingWindow(0), lambda: StreamingLLM(-1, 4)):
        with pytest.raises(ValueError, match="expected"):
            wrong()
