"""Policies that choose keys of every decoded token anew, against their definitions: SparQ and Twilight."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.inference.incremental import extend, make_cache, prefill
from model.policies.policy import use_policy
from model.policies.quest import Quest
from model.policies.snapkv import SnapKV
from model.policies.sparge import SpargeAttention
from model.policies.sparq import SparQ
from model.policies.topk import OracleTopK
from model.policies.twilight import Twilight, in_four_bits
from model.policies.window import StreamingLLM
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of, weights_of
from tests.model.test_transformer import make, tiny, tokens


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sparq_scores(policy: SparQ, q: list[list[float]], k: list[list[float]], bias: list[list[float]]) -> list[list]:
    """Of one group: query heads, keys and biases as lists of numbers."""
    size = [sum(abs(head[c]) for head in q) for c in range(8)]
    channels = sorted(range(8), key=lambda c: (-size[c], c))[: policy.channels]
    scores = []
    for head, offset in zip(q, bias, strict=True):
        share = sum(abs(head[c]) for c in channels) / sum(map(abs, head))
        root = math.sqrt(8 * share)
        scores.append([sum(head[c] * key[c] for c in channels) / root + b for key, b in zip(k, offset, strict=True)])
    return scores


@settings(max_examples=15)
@given(seed=st.integers(0, 99), channels=st.integers(1, 4), local=st.integers(0, 8), alibi=st.booleans())
def test_sparq_is_its_definition(seed: int, channels: int, local: int, alibi: bool) -> None:
    """Channels, local and best keys of each group, exact attention over them, and the mean value for the rest."""
    n = 45
    q, k, v = draw(1, n, seed)
    view, policy = view_of(1, n, SLOPES if alibi else None), SparQ(8, channels, local)
    attended = policy.attend(q, k, v, view)
    exact = weights_of(q, k, view)[:, 0]
    for group in range(2):
        heads = slice(2 * group, 2 * group + 2)
        slopes = SLOPES[heads].tolist() if alibi else [0.0, 0.0]
        bias = [[-slope * (n - 1 - j) for j in range(n)] for slope in slopes]
        scores = sparq_scores(policy, q[heads, 0].double().tolist(), k[group].double().tolist(), bias)
        sure = list(range(n - 1 - local, n))
        others = sorted(range(n - 1 - local), key=lambda j: -scores[0][j] - scores[1][j])
        chosen = [*sure, *others[: 8 + 1 - len(sure)]]
        for i, head in enumerate(range(2 * group, 2 * group + 2)):
            mask = mask_of(policy, q, k, view)[head, 0]
            assert sorted(chosen) == mask.nonzero().flatten().tolist()
            total = sum(math.exp(s) for s in scores[i])
            share = sum(math.exp(scores[i][j]) for j in chosen) / total
            p = exact[head, chosen] / exact[head, chosen].sum()
            expected = share * (p @ v[group, chosen].double()) + (1 - share) * v[group].double().mean(0)
            torch.testing.assert_close(attended.out[head, 0].double(), expected, atol=1e-5, rtol=1e-4)
    assert attended.kept.tolist() == [9] * 4
    assert (attended.read - attended.kept).tolist() == [math.ceil(n * channels / 16)] * 4


def test_sparq_with_all_channels_takes_the_best_keys() -> None:
    q, k, _ = draw(1, 60, 4)
    view = view_of(1, 60, SLOPES)
    torch.testing.assert_close(SparQ(9, 8, 0).scores(q, k, view), view.scores(q, k, slice(0, 1), 60)[:, 0])
    scores = view.scores(q, k, slice(0, 1), 60)[:, 0].unflatten(0, (2, 2)).sum(1)
    scores[:, -1] = torch.inf
    best = torch.zeros(2, 60).scatter(1, scores.topk(10).indices, 1).bool()
    assert (mask_of(SparQ(9, 8, 0), q, k, view)[::2, 0] == best).all()


def test_sparq_is_dense_where_choosing_costs_as_much() -> None:
    """15 keys, their own, and half of 32 for the scores: keys without values."""
    for keys, window, dense in ((15, None, True), (14, None, False), (14, 31, True), (14, 40, False)):
        q, k, v = draw(1, 32, 1)
        view = view_of(1, 32, window=window)
        attended, n_seen = SparQ(keys, 8, 3).attend(q, k, v, view), min(32, window or 32)
        assert attended.read.tolist() == [n_seen if dense else keys + 1 + 16] * 4
        assert mask_of(SparQ(keys, 8, 3), q, k, view)[0].sum() == (n_seen if dense else keys + 1)


def fewest(weights: list[float], share: float) -> set[int]:
    """The first keys, by weight, that hold the share."""
    chosen: set[int] = set()
    for j in sorted(range(len(weights)), key=lambda j: -weights[j]):
        if sum(weights[i] for i in chosen) < share:
            chosen.add(j)
    return chosen


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99), share=st.floats(0.05, 0.99), alibi=st.booleans(), window=st.none() | st.integers(20, 60)
)
def test_twilight_keeps_the_fewest_keys_of_its_base(seed: int, share: float, alibi: bool, window: int | None) -> None:
    """By weights of keys that are rounded plainly; attention over what is kept is exact."""
    q, k, v = draw(1, 50, seed)
    view, base = view_of(1, 50, SLOPES if alibi else None, layer=1, window=window), Quest(4, 8, dense_layers=0)
    rounded = k.double().clone()
    for row in rounded.flatten(0, 1):
        least, step = float(row.min()), float(row.max() - row.min()) / 15
        row.copy_(torch.tensor([least + step * round((x - least) / step) for x in row.tolist()]))
    chosen = mask_of(base, q, k, view)[:, 0]
    p = weights_of(q, rounded, view)[:, 0] * chosen
    exact = weights_of(q, k, view)[:, 0]
    policy = Twilight(base, share, dense_layers=1)
    attended, mask = policy.attend(q, k, v, view), mask_of(policy, q, k, view)[:, 0]
    for head in range(4):
        kept = sorted(fewest((p[head] / p[head].sum()).tolist(), share))
        assert mask[head].nonzero().flatten().tolist() == kept
        weights = exact[head, kept] / exact[head, kept].sum()
        expected = weights @ v[head // 2, kept].double()
        torch.testing.assert_close(attended.out[head, 0].double(), expected, atol=1e-5, rtol=1e-4)
        assert attended.read[head] == len(kept) + math.ceil(int(chosen[head].sum()) / 8)


def test_twilight_is_its_base_at_share_1_and_dense_in_the_first_layers() -> None:
    q, k, v = draw(1, 64, 2)
    base = SparQ(6, 2, 2)
    for layer, share, kept, read in ((0, 0.5, 64, 64), (1, 1.0, 7, 7 + 8)):
        view = view_of(1, 64, layer=layer)
        attended = Twilight(base, share, dense_layers=1).attend(q, k, v, view)
        assert attended.kept.tolist() == [kept] * 4 and attended.read.tolist() == [read] * 4
    assert (mask_of(Twilight(base, 1.0), q, k, replace(view, layer=2)) == mask_of(base, q, k, view)).all()
    peaked = Twilight(base, 0.5).attend(q, k, v, replace(view, layer=2))
    assert ((peaked.kept < 7) & (peaked.read == peaked.kept + 1 + 8)).all()


def test_four_bits_are_sixteen_values_between_the_extremes() -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    found = in_four_bits(x)
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
    assert ((found - x).abs() <= step / 2 + 1e-6).all()
    for row, rounded in zip(x, found, strict=True):
        assert len(rounded.unique()) <= 16
        torch.testing.assert_close(rounded.aminmax(), row.aminmax())
    assert (in_four_bits(torch.full((1, 5), 3.0)) == 3).all()


def test_reported_density_counts_what_choosing_reads() -> None:
    """Over 6 tokens behind a prompt of 60."""
    model = make(tiny("softmax", "nape"))
    size = model.config.head_size
    cache = make_cache(model, 1, 66)
    with use_policy(model, SparQ(8, 2, 3)) as record, torch.no_grad():
        prefill(model, tokens()[:, :60].tolist(), cache, 60)
        for t in range(60, 66):
            extend(model, tokens()[:, t : t + 1], cache)
    expected = sum(9 + math.ceil(n * 2 / (2 * size)) for n in range(61, 67)) / sum(range(61, 67))
    assert record.density("decode").tolist() == [[pytest.approx(expected)] * 4] * 2


def test_settings_of_selectors_that_mean_nothing_are_errors() -> None:
    for wrong, said in (
        (lambda: SparQ(0), "keys is 0: expected at least 1"),
        (lambda: SparQ(9, 0), "channels is 0: expected at least 1"),
        (lambda: SparQ(9, local=-1), "local is -1: expected at least 0"),
        (lambda: SparQ(9), "local is 16: expected at most keys, 9"),
        (lambda: Twilight(Quest(4), 1.2), "share is 1.2: expected a share"),
        (lambda: Twilight(Quest(4), dense_layers=-1), "dense_layers is -1: expected at least 0"),
        (lambda: Twilight(SnapKV(40)), "base is snapkv: expected a policy that chooses keys of every token anew"),
        (lambda: Twilight(SpargeAttention(0.5)), "base is sparge: expected a policy"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


def test_bases_of_twilight() -> None:
    """Any policy that acts at every token anew."""
    q, k, _ = draw(1, 80, 6)
    view = view_of(1, 80, layer=2)
    for base in (OracleTopK(2, 16), StreamingLLM(4, 30), SparQ(20, 2, 4), Twilight(Quest(3), 0.9)):
        kept, chosen = mask_of(Twilight(base, 0.5), q, k, view), mask_of(base, q, k, view)
        assert not (kept & ~chosen).any() and kept.any(-1).all() and kept.sum() < chosen.sum()
    outer, inner, pages = Twilight(Twilight(Quest(3), 0.9), 0.5), Twilight(Quest(3), 0.9), Quest(3)
    v = draw(1, 80, 7)[2]
    read = (mask_of(inner, q, k, view).sum((1, 2)) + 7) // 8 + (mask_of(pages, q, k, view).sum((1, 2)) + 7) // 8
    assert (outer.attend(q, k, v, view).estimated == read).all()  # what the inner one reads counts too
