"""vAttention's estimates, against plain sums: unbiased, and as far off as its settings say."""

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist, mean, variance

import pytest
import torch
from torch import Tensor

from model.policies.policy import SequenceView
from model.policies.quest import Quest
from model.policies.snapkv import SnapKV
from model.policies.sparq import SparQ
from model.policies.vattention import VAttention
from model.policies.window import SlidingWindow
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of, weights_of

BASE = SlidingWindow(1)  # nothing but the own key


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def drawn(policy: VAttention, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (H, keys): the exact keys and both samples."""
    exact = mask_of(policy, q, k, view).expand(4, -1, -1)[:, 0]
    others = view.visible(slice(0, 1), k.shape[1], q.device) & ~exact
    return exact, *policy.samples(q, k, v, view, exact, others)


def estimates(
    policy: VAttention, q: Tensor, k: Tensor, v: Tensor, view: SequenceView, tries: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """float64 (H,) and (H, D), denominator and numerator over what dense attention has for them, of each seed; the
    policy's output is their ratio."""
    p = weights_of(q, k, view)[:, 0]
    values = v.double().repeat_interleave(2, 0)
    for seed in range(tries):
        one = replace(policy, seed=seed)
        exact, _, second = drawn(one, q, k, v, view)
        times = (k.shape[1] - exact.sum(1)) / second.sum(1)
        weights = p * (exact + second * times[:, None])
        top, bottom = (weights[:, None] @ values)[:, 0], weights.sum(1)
        if seed < 5:
            found = one.attend(q, k, v, view).out[:, 0].double()
            torch.testing.assert_close(found, top / bottom[:, None], atol=1e-5, rtol=1e-4)
        yield bottom, top


def test_numerator_and_denominator_are_unbiased() -> None:
    """Over 400 seeds the mean lies within 4 standard errors of the exact value."""
    q, k, v = draw(1, 60, 1, size=1.0)
    view, policy = view_of(1, 60, SLOPES), VAttention(BASE, 0.4, 0.4, sinks=2, local=3, rate=0.1)
    bottoms, tops = (torch.stack(one) for one in zip(*estimates(policy, q, k, v, view, 400), strict=True))
    dense = (weights_of(q, k, view) @ v.double().repeat_interleave(2, 0))[:, 0]
    for found, expected in ((bottoms, torch.ones(4).double()), (tops, dense)):
        error = (found.mean(0) - expected).abs() / (found.std(0) / 20)
        assert (error < 4).all() and (found.std(0) > 0.01).any()


def test_a_key_that_the_first_sample_misses_is_not_underestimated() -> None:
    """One heavy key among flat ones: the second sample is everything where the first has it, small where not. Were the
    first sample counted too, the key's mean weight would be its chance to be in it."""
    q, k, v = torch.ones(4, 1, 8), torch.zeros(2, 40, 8), torch.ones(2, 40, 8)
    k[:, 20] = 1.0
    view, policy = view_of(1, 40), VAttention(BASE, 0.1, 0.5, sinks=0, local=1, rate=0.2)
    sizes, total, tries = set(), torch.zeros(4), 300
    for seed in range(tries):
        _, first, second = drawn(replace(policy, seed=seed), q, k, v, view)
        assert (first.sum(1) == 8).all()
        sizes |= {(bool(there), int(n)) for there, n in zip(first[:, 20], second.sum(1), strict=True)}
        total += second[:, 20] * 39 / second.sum(1)
    assert sizes == {(False, 8), (True, 39)}
    assert (total.mean() / tries - 1).abs() < 4 * 2 / math.sqrt(4 * tries)  # one draw deviates by less than 2


def test_errors_exceed_eps_with_a_probability_of_at_most_delta() -> None:
    """Flat scores over 600 keys, values that make the numerator as hard to estimate as the denominator: of 600
    estimates of each the share delta may be off by more than eps, and not many fewer are (samples are of a quarter of
    all on average, which makes errors rarer than the theorem says)."""
    q, k, _ = draw(1, 600, 2, size=0.7)
    view = view_of(1, 600)
    v = torch.ones(2, 600, 8)
    policy = VAttention(BASE, 0.05, 0.2, sinks=4, local=4, rate=0.1)
    dense = (weights_of(q, k, view) @ v.double().repeat_interleave(2, 0))[:, 0]
    below, above, n_read = 0, 0, []
    for bottom, top in estimates(policy, q, k, v, view, 150):
        below += int(((bottom - 1).abs() > policy.eps).sum())
        above += int(((top - dense).norm(dim=1) > policy.eps * dense.norm(dim=1)).sum())
    for seed in range(5):
        n_read += drawn(replace(policy, seed=seed), q, k, v, view)[2].sum(1).tolist()
    assert mean(n_read) < 300
    assert 0.05 < below / 600 <= policy.delta and 0.05 < above / 600 <= policy.delta


@pytest.mark.parametrize("alibi", [False, True])
def test_the_sample_is_as_large_as_the_theorem_says(alibi: bool) -> None:
    """From variances of the first sample, of e^s and of e^s v, and the value of both that it estimates. Head 2's e^s v
    are alike, so that the denominator decides."""
    q, k, v = draw(1, 90, 3, size=0.6)
    view, policy = view_of(1, 90, SLOPES if alibi else None), VAttention(BASE, 0.3, 0.1, sinks=5, local=8, rate=0.15)
    weights = weights_of(q, k, view)[:, 0]
    v[0], v[1] = v[0] + 1, (0.01 / weights[2])[:, None]
    exact, first, second = drawn(policy, q, k, v, view)
    assert (exact.sum(1) == 13).all() and not (exact & (first | second)).any()
    found = []
    for head in range(4):
        n, places = 77, first[head].nonzero().flatten().tolist()
        assert len(places) == 12
        sizes = []
        for values in (v[head // 2].double(), torch.ones(90, 1).double()):
            terms = weights[head, :, None] * values
            channels = [terms[places, c].tolist() for c in range(terms.shape[1])]
            total = sum((float(terms[exact[head], c].sum()) + n * mean(x)) ** 2 for c, x in enumerate(channels))
            z = NormalDist().inv_cdf(0.95)
            sizes.append((z * n / 0.3) ** 2 * sum(map(variance, channels)) / total)
        found.append(min(max(12, math.ceil(max(sizes))), n))
    assert second.sum(1).tolist() == found and len(set(found)) > 1


def test_samples_without_variance_or_value() -> None:
    """Values of 0 ask for nothing, what seems to be 0 and varies for all; a first sample has two keys at least."""
    q, k, v = draw(1, 90, 3, size=0.6)
    view, policy = view_of(1, 90), VAttention(BASE, 0.01, 0.1, sinks=5, local=8, rate=1e-3)
    _, first, second = drawn(policy, q, k, torch.zeros_like(v), view)
    assert first.sum(1).tolist() == [2] * 4
    assert (second == drawn(policy, q, k, torch.ones_like(v), view)[2]).all() and (second.sum(1) > 2).any()
    exact, first = torch.arange(9).expand(4, -1) == 8, torch.arange(9).expand(4, -1) < 2
    v = torch.tensor([1.0, -1, 5, 5, 5, 5, 5, 5, 0]).expand(2, -1)[..., None]
    assert policy.sample_size(torch.zeros(4, 9), v, exact, first, torch.full((4,), 8)).tolist() == [8] * 4


def test_density_counts_the_keys_of_both_samples_and_what_the_base_counts() -> None:
    q, k, v = draw(1, 90, 3, size=0.3)
    view, policy = view_of(1, 90), VAttention(SparQ(8, 2, 2), 0.5, 0.4, sinks=1, local=4, rate=0.2)
    exact, first, second = drawn(policy, q, k, v + 1, view)
    attended = policy.attend(q, k, v + 1, view)
    assert attended.kept.tolist() == (exact | second).sum(1).tolist()
    assert attended.read.tolist() == ((exact | first | second).sum(1) + math.ceil(90 / 8)).tolist()
    assert (attended.read < 90).any() and (first & ~second).any()


def test_no_error_allowed_is_dense() -> None:
    q, k, v = draw(1, 70, 5)
    view = view_of(1, 70, SLOPES)
    attended = VAttention(BASE, 1e-6, sinks=3, local=3).attend(q, k, v, view)
    expected = weights_of(q, k, view) @ v.double().repeat_interleave(2, 0)
    torch.testing.assert_close(attended.out.double(), expected, atol=1e-5, rtol=1e-4)
    assert attended.read.tolist() == [70] * 4


def test_unread_scores_do_not_matter() -> None:
    """A key in neither sample may have any score, the largest too."""
    q, k, v = draw(1, 60, 6, size=0.3)
    view, policy = view_of(1, 60), VAttention(BASE, 0.15, 0.5, sinks=2, local=2, rate=0.1)
    exact, first, second = drawn(policy, q, k, v + 1, view)
    heads = (first.sum(1) < second.sum(1)).nonzero().flatten().tolist()
    assert len(heads) > 1
    for head in heads:
        unread = int((~(exact | first | second)[head]).nonzero()[0])
        changed = k.clone()
        changed[head // 2, unread] = 4000 * q[head, 0]  # e^s of all others would be 0 beside it
        found = policy.attend(q, changed, v + 1, view).out[head]
        torch.testing.assert_close(found, policy.attend(q, k, v + 1, view).out[head], atol=0, rtol=0)


def test_samples_belong_to_seed_layer_and_position() -> None:
    """And to nothing else: the global generator neither decides nor moves."""
    q, k, v = draw(1, 80, 7)
    policy = VAttention(Quest(2, 4, dense_layers=0), 0.3, sinks=2, local=2)
    view, state = view_of(1, 80), torch.get_rng_state()
    once = drawn(policy, q, k, v, view)[1]
    torch.manual_seed(5)
    assert (drawn(policy, q, k, v, view)[1] == once).all()
    assert (once[0] != once[1]).any()
    for other in (replace(view, layer=1), replace(view, layer=2**16), replace(view, key_start=9)):
        assert (drawn(policy, q, k, v, other)[1] != once).any()
    for seed in (1, 2**32, 2**40):
        assert (drawn(replace(policy, seed=seed), q, k, v, view)[1] != once).any()
    torch.set_rng_state(state)
    policy.attend(q, k, v, view)
    assert (torch.get_rng_state() == state).all()


def test_a_key_is_drawn_wherever_the_cache_starts() -> None:
    """Other rows decide how much a window leaves of the cache; equal keys, so that sizes are equal."""
    policy = VAttention(SlidingWindow(1), 0.3, sinks=0, local=2)
    q, k, v = torch.zeros(4, 1, 8), torch.zeros(2, 60, 8), torch.ones(2, 60, 8)
    whole = drawn(policy, q, k, v, view_of(1, 60, window=30))[1]
    cut = drawn(policy, q, k[:, 20:], v[:, 20:], view_of(1, 40, key_start=20, window=30))[1]
    assert (cut == whole[:, 20:]).all() and not whole[:, :20].any() and whole.any()


def test_settings_of_vattention_that_mean_nothing_are_errors() -> None:
    for wrong, said in (
        (lambda: VAttention(SnapKV(40)), "base is snapkv: expected a policy that chooses keys of every token anew"),
        (lambda: VAttention(BASE, 0), "eps is 0: expected a relative error above 0"),
        (lambda: VAttention(BASE, 0.1, 1), r"delta is 1: expected a probability in \(0, 1\)"),
        (lambda: VAttention(BASE, rate=0), "rate is 0: expected a share"),
        (lambda: VAttention(BASE, sinks=-1), "sinks is -1: expected at least 0"),
        (lambda: VAttention(BASE, local=-1), "local is -1: expected at least 0"),
        (lambda: VAttention(BASE, seed=-1), "seed is -1: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
