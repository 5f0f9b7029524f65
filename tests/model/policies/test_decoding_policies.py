"""What policies of decoding select, against their definitions: Quest, SnapKV and Double-P; what those with a memory
share."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.inference.incremental import extend, make_cache, prefill
from model.policies.double_p import DoubleP, make_clusters
from model.policies.h2o import H2O
from model.policies.policy import SparsePolicy, use_policy
from model.policies.quest import Quest
from model.policies.snapkv import SnapKV
from model.policies.topk import OracleTopK
from model.policies.twilight import Twilight
from model.policies.vattention import VAttention
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of, weights_of
from tests.model.test_transformer import make, tiny, tokens


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), n_keys=st.integers(1, 60), alibi=st.booleans())
def test_quest_bounds_hold_and_choose_the_pages(seed: int, n_keys: int, alibi: bool) -> None:
    q, k, _ = draw(1, n_keys, seed)
    view = view_of(1, n_keys, SLOPES if alibi else None)
    policy = Quest(3, 8, dense_layers=1)
    assert mask_of(policy, q, k, view).all()
    view = replace(view, layer=1)
    bounds, scores = policy.bounds(q, k, view), view.scores(q, k, slice(0, 1), n_keys)[:, 0]
    for page in range(bounds.shape[1]):
        inside = scores[:, 8 * page : 8 * page + 8]
        assert (bounds[:, page] >= inside.amax(1) - 1e-4).all()
        if inside.shape[1] == 1 and not alibi:
            torch.testing.assert_close(bounds[:, page], inside[:, 0], atol=1e-4, rtol=1e-4)
    kept = mask_of(policy, q, k, view)[:, 0, ::8]
    bounds[:, -1] = torch.inf
    assert kept[:, -1].all() and (kept.sum(1) == min(3, kept.shape[1])).all()
    assert (bounds.masked_fill(~kept, -torch.inf).amax(1) >= bounds.masked_fill(kept, -torch.inf).amax(1)).all()


@pytest.mark.parametrize("cut", range(1, 10))
def test_pages_of_quest_lie_where_the_text_has_them(cut: int) -> None:
    """Under a sliding window other rows decide from which key on the cache is passed: it changes nothing of a row."""
    q, k, _ = draw(1, 40, 2)
    policy, view = Quest(3, 8, dense_layers=0), view_of(1, 40, SLOPES, window=31)
    later = replace(view, query_start=39 - cut, key_start=cut)
    found, whole = mask_of(policy, q, k[:, cut:], later)[:, 0], mask_of(policy, q, k, view)[:, 0]
    assert torch.equal(found, whole[:, cut:]) and not whole[:, :cut].any()
    bounds = policy.bounds(q, k[:, cut:], later)
    torch.testing.assert_close(bounds, policy.bounds(q, k, view)[:, cut // 8 :])
    assert whole.sum(1).max() < 31


@pytest.mark.parametrize("policy", [
    Quest(2, 8, dense_layers=0), Twilight(Quest(2, 8, dense_layers=0), 0.8, dense_layers=0),
    VAttention(Quest(2, 8, dense_layers=0), 0.7, 0.3, sinks=1, local=1), OracleTopK(2, 8),
], ids=lambda policy: policy.name)  # fmt: skip
def test_a_row_is_decoded_as_it_is_alone(policy: SparsePolicy) -> None:
    """Beside rows of other lengths, which move the start of what a window leaves of the cache."""
    model = make(tiny("softmax", "nape", window=21))
    prompts = [tokens()[0, :n].tolist() for n in (60, 52, 39)]

    def answer(rows: list[list[int]]) -> Tensor:
        cache = make_cache(model, len(rows), 70)
        prefill(model, rows, cache, 999)
        step = torch.arange(5, 15)
        with use_policy(model, policy) as record:
            out = [extend(model, one.expand(len(rows), 1), cache) for one in step]
        assert (record.density("decode") < 1).all()
        return torch.cat(out, 1)

    torch.testing.assert_close(answer(prompts), torch.cat([answer([one]) for one in prompts]), atol=1e-5, rtol=1e-5)


def test_snapkv_keeps_what_the_last_queries_look_at() -> None:
    """Key 20 draws all their attention: it stays with its neighbours, and of the rest the observed ones."""
    q, k, v = draw(60, 60)
    k[:, 20] = 0
    q[:] = 0
    q[..., 0], k[:, 20, 0] = 30, 30
    policy = SnapKV(capacity=9, observed=4, pooled=5)
    view = view_of(1, 61)
    policy.observe(q[:, :33], k[:, :33], view_of(33, 33, memory=view.memory))
    policy.observe(q[:, 33:], k, view_of(27, 60, memory=view.memory))
    k = torch.cat([k, k[:, :1]], 1)
    mask = mask_of(policy, q[:, :1], k, view)[:, 0]
    assert (mask.sum(1) == 10).all() and mask[:, 56:].all() and mask[:, 18:23].all()
    later = mask_of(policy, q[:, :1], torch.cat([k, k], 1), replace(view, query_start=121))
    assert (later[:, 0, :60] == mask[:, :60]).all() and later[:, 0, 60:].all()  # chosen once


def test_eviction_needs_one_row_and_its_prompt() -> None:
    model = make(tiny("softmax"))
    with use_policy(model, SnapKV(8)), pytest.raises(ValueError, match="snapkv remembers one prompt, got a cache of 2"):
        prefill(model, tokens(20).repeat(2, 1).tolist(), make_cache(model, 2, 20), 64)
    cache = make_cache(model, 1, 20)
    prefill(model, tokens(10).tolist(), cache, 64)
    with use_policy(model, SnapKV(8)), pytest.raises(ValueError, match="has seen no prompt"):
        extend(model, tokens(1), cache)


def test_a_new_prompt_is_not_taken_for_the_last_one() -> None:
    """Memory begins anew with each prompt: its answer is that of a policy that saw no other."""
    model = make(tiny("softmax"))

    def answer(policy: SparsePolicy, *prompts: Tensor) -> Tensor:
        with use_policy(model, policy):
            for prompt in prompts:
                cache = make_cache(model, 1, 60)
                prefill(model, prompt.tolist(), cache, 16)
                out = extend(model, torch.tensor([[5]]), cache)
        return out

    first, second = tokens(100)[:, :40], tokens(100)[:, 50:]
    for policy in (SnapKV(6, 3), H2O(3, 3), DoubleP(0.6, 0.3, 4)):
        torch.testing.assert_close(answer(policy, first, second), answer(policy, second))
        assert (answer(policy, second) - answer(SnapKV(100), second)).abs().max() > 1e-3


def test_double_p_is_exact_where_keys_of_a_cluster_are_equal() -> None:
    """Centroids then have the scores of their keys, and mean values give their sums: dense output at low density."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 5, 8, generator=generator)
    k = kinds[:, torch.arange(60) % 5]
    q, _, v = draw(1, 61)
    k = torch.cat([k, torch.randn(2, 1, 8, generator=generator)], 1)
    view = view_of(1, 61)
    attended = DoubleP(1.0, 0.01, 12).attend(q, k, v, view)
    expected = weights_of(q, k, view) @ v.double().repeat_interleave(2, 0)
    torch.testing.assert_close(attended.out.double(), expected, atol=1e-5, rtol=1e-4)
    # the heaviest cluster of 12 exactly, 4 centroids, the new token
    assert attended.kept.tolist() == [12 + 4 + 1] * 4 and attended.visible == 61
    dropped = DoubleP(0.02, 0.01, 12).attend(q, k, v, view_of(1, 61))
    assert dropped.kept.tolist() == [12 + 1] * 4


def test_double_p_drops_and_approximates_by_share() -> None:
    """Against plain sums over its clusters, with ALiBi, whose mean over a cluster is the bias at the mean place."""
    q, k, v = draw(1, 51, size=1.0)
    view, policy = view_of(1, 51, SLOPES), DoubleP(0.9, 0.5, 5)
    attended = policy.attend(q, k, v, view)
    clusters = view.memory["clusters"]
    token_scores = weights_of(q, k, view).log()[:, 0]  # up to a constant of the row, which cancels
    for head in range(4):
        of_key = clusters.of_key[head]
        groups = [(of_key == c).nonzero().flatten() for c in range(10)]
        scores = torch.stack([token_scores[head, g].mean() + math.log(len(g)) for g in groups])
        order, share = scores.argsort(descending=True), scores.softmax(0)
        total, mass = torch.zeros(8).double(), 0.0
        before, kept = 0.0, 1
        rows = [(torch.exp(token_scores[head, 50]), v[head // 2, 50].double())]
        for c in order.tolist():
            if before < 0.5:
                rows += [(torch.exp(token_scores[head, j]), v[head // 2, j].double()) for j in groups[c].tolist()]
                kept += len(groups[c])
            elif before < 0.9:
                rows.append((torch.exp(scores[c]), v[head // 2, groups[c]].double().mean(0)))
                kept += 1
            before += float(share[c])
        for weight, value in rows:
            total, mass = total + weight * value, mass + weight
        torch.testing.assert_close(attended.out[head, 0].double(), total / mass, atol=1e-5, rtol=1e-4)
        assert attended.kept[head] == kept


def test_double_p_clusters_by_place_where_alibi_decides() -> None:
    """The channel that ALiBi adds to the keys: under a steep slope clusters are stretches of text, without one not."""
    q, k, v = draw(1, 65)
    view = view_of(1, 65, torch.tensor([50.0, 50.0, 0.0, 0.0]))
    DoubleP(0.9, 0.5, 16).attend(q, k, v, view)
    of_key = view.memory["clusters"].of_key
    assert (of_key[:2].diff().abs() > 0).sum(1).tolist() == [3, 3]
    assert ((of_key[2:].diff().abs() > 0).sum(1) > 10).all()


def test_k_means_separates_clusters() -> None:
    centres = 10 * torch.eye(4, 8)
    k = (centres[torch.arange(40) % 4] + 0.01 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))[None]
    clusters = make_clusters(k[:, torch.arange(40)], 10, 5)
    assert clusters.sizes.sum() == 40
    torch.testing.assert_close(clusters.means(k), clusters.centroids)
    distance = torch.cdist(k[0], clusters.centroids[0])
    assert (distance.argmin(1) == clusters.of_key[0]).all()
