"""Policies that evict keys, against their definitions: H2O token by token, and how layers and heads share budgets."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.policies.eviction import Budgets
from model.policies.h2o import H2O
from model.policies.policy import SequenceView
from model.policies.snapkv import AdaSnapKV, PyramidKV, SnapKV
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of, weights_of


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def decoded(policy: H2O, q: Tensor, k: Tensor, n_prompt: int, view: SequenceView) -> list[Tensor]:
    """Bool (H, keys) of each token behind a prompt that comes in two chunks."""
    middle = -(-n_prompt // 3)
    for start, stop in ((0, middle), (middle, n_prompt))[: 1 + (n_prompt > 1)]:
        policy.observe(q[:, start:stop], k[:, :stop], replace(view, decoding=False, query_start=start))
    steps = range(n_prompt, k.shape[1])
    masks = [mask_of(policy, q[:, t : t + 1], k[:, : t + 1], replace(view, query_start=t)) for t in steps]
    return [mask[:, 0].expand(4, -1) for mask in masks]


def h2o_sets(q: Tensor, k: Tensor, n_prompt: int, view: SequenceView, heavy: int, recent: int) -> list[list[set[int]]]:
    """The definition, one set of keys for each pair of query heads: what each token after the prompt attends to."""
    n_keys = k.shape[1]
    whole = replace(view, query_start=0)
    logits = weights_of(q, k, whole).log()
    groups = []
    for group in range(2):
        alive: set[int] = set()
        total, steps = [0.0] * n_keys, []
        for t in range(n_keys):
            if t >= n_prompt:
                newest = {j for j in alive if j >= t - recent}
                older = sorted(alive - newest, key=lambda j: (-total[j], j))
                alive = newest | set(older[:heavy])
            alive = alive | {t}
            seen = sorted(alive)
            for head in (2 * group, 2 * group + 1):
                for j, p in zip(seen, logits[head, t, seen].softmax(-1).tolist(), strict=True):
                    total[j] += p / 2
            if t >= n_prompt:
                steps.append(alive)
        groups.append(steps)
    return groups


@settings(max_examples=15)
@given(seed=st.integers(0, 99), n_prompt=st.integers(1, 40), heavy=st.integers(1, 12), alibi=st.booleans())
def test_h2o_is_the_loop_over_tokens(seed: int, n_prompt: int, heavy: int, alibi: bool) -> None:
    """What was evicted never comes back, the newest keys are always there, a group's heads agree."""
    recent, n_keys = 1 + seed % 6, n_prompt + 12
    q, k, _ = draw(n_keys, n_keys, seed)
    view = view_of(1, n_keys, SLOPES if alibi else None)
    expected = h2o_sets(q, k, n_prompt, view, heavy, recent)
    gone = torch.zeros(4, n_keys, dtype=torch.bool)
    for step, mask in enumerate(decoded(H2O(heavy, recent), q, k, n_prompt, view)):
        for head in range(4):
            assert set(mask[head].nonzero().flatten().tolist()) == expected[head // 2][step]
        assert mask[:, -1 - recent :].all() and not (mask & gone[:, : mask.shape[1]]).any()
        gone[:, : mask.shape[1]] |= ~mask
    assert mask.sum(1).tolist() == [min(n_keys, heavy + recent + 1)] * 4


def test_h2o_keeps_early_keys_that_were_looked_at_and_drops_late_ones() -> None:
    """Key 7 draws every later query; from token 20 on nobody looks at it, and the sum still holds it."""
    q, k, _ = draw(40, 40, size=0.1)
    k[:, 7, 0], q[:, :20, 0] = 30.0, 30.0
    q[:, 20:, 0] = -1.0
    for mask in decoded(H2O(1, 3), q, k, 30, view_of(1, 40)):
        n = mask.shape[1]
        assert mask[0].nonzero().flatten().tolist() == [7, *range(n - 4, n)]


def test_heads_choose_alone_without_groups() -> None:
    q, k, _ = draw(40, 40, 3)
    alone = decoded(H2O(6, 4, Budgets(grouped=False)), q, k, 35, view_of(1, 40))
    grouped = decoded(H2O(6, 4), q, k, 35, view_of(1, 40))
    for one, both in zip(alone, grouped, strict=True):
        assert (both[::2] == both[1::2]).all() and (one[::2] != one[1::2]).any()
        assert (one.sum(1) == 11).all() and (both.sum(1) == 11).all()


def layer_budgets(each: int, n_keys: int, n_layers: int, beta: int = 20) -> list[int]:
    views = [view_of(1, n_keys, layer=layer, n_layers=n_layers) for layer in range(n_layers)]
    counts = [Budgets(beta=beta).counts(torch.zeros(2, n_keys), each, view) for view in views]
    assert all((one == one[0]).all() for one in counts)
    return [int(one[0]) for one in counts]


@given(each=st.integers(0, 300), n_keys=st.integers(1, 700), n_layers=st.integers(1, 40), beta=st.integers(1, 30))
@settings(max_examples=60)
def test_pyramid_budgets_fall_and_sum_to_the_layers_share(each: int, n_keys: int, n_layers: int, beta: int) -> None:
    found = layer_budgets(each, n_keys, n_layers, beta)
    assert found == sorted(found, reverse=True) and found[-1] >= 0
    if each < n_keys:
        longer = layer_budgets(each, n_keys + 1, n_layers, beta)
        assert all(after <= before + 1 for before, after in zip(found, longer, strict=True))
    if each >= n_keys:
        assert found == [each] * n_layers  # everything stays
        return
    assert found[0] <= n_keys and sum(found) == n_layers * each
    if n_layers > 1:
        most = min(2 * each - each // beta, n_keys)
        assert (found[0], found[-1]) == (most, 2 * each - most)


def test_pyramid_budgets_by_hand() -> None:
    """Unclipped the last layer has b // beta; where the text is short the first has all of it."""
    assert layer_budgets(128, 1000, 32)[::31] == [250, 6]
    assert layer_budgets(100, 150, 5) == [150, 125, 100, 75, 50]


def test_ada_gives_spread_heads_more_and_each_its_floor() -> None:
    scores = torch.zeros(2, 40)
    scores[0, :2], scores[1, :30] = 0.5, 1 / 30
    view = view_of(1, 40)
    assert Budgets(even=0.2).counts(scores, 10, view).tolist() == [round(2 + 0.8 * 2), round(2 + 0.8 * 18)]
    assert Budgets(even=1.0).counts(scores, 10, view).tolist() == [10, 10]
    for even in (0.1, 0.2, 0.5):
        random = torch.rand(8, 60, generator=torch.Generator().manual_seed(1)).pow(torch.arange(1, 9)[:, None])
        counts = Budgets(even=even).counts(random, 12, view)
        assert abs(int(counts.sum()) - 8 * 12) <= 4 and (counts >= int(even * 12)).all()
        assert counts[0] > counts[7]


def snapkv_keys(q: Tensor, k: Tensor, policy: SnapKV, view: SequenceView) -> list[set[int]]:
    """The definition for prompts that are longer than what is observed, of each query head."""
    n, last = k.shape[1], policy.observed
    p = weights_of(q, k, replace(view, query_start=0))[:, n - last :, : n - last].sum(1)
    if policy.budgets.grouped:
        p = torch.stack([(p[0] + p[1]) / 2, (p[2] + p[3]) / 2])
    pooled = [
        [max(row[max(0, j - policy.pooled // 2) : j + policy.pooled // 2 + 1]) for j in range(len(row))]
        for row in p.tolist()
    ]
    each = policy.capacity - last
    if policy.budgets.beta is not None:
        each = layer_budgets(each, n - last, view.n_layers, policy.budgets.beta)[view.layer]
    flat = sorted(((x, -h, -j) for h, row in enumerate(pooled) for j, x in enumerate(row)), reverse=True)
    among = [sum(-h == head for _, h, _ in flat[: each * len(pooled)]) for head in range(len(pooled))]
    kept = []
    for row, count in zip(pooled, among, strict=True):
        budget = round(policy.budgets.even * each + (1 - policy.budgets.even) * count)
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        kept.append({*order[:budget], *range(n - last, n)})
    return [one for one in kept for _ in range(4 // len(kept))]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_pyramidkv_and_ada_snapkv_are_their_definitions(seed: int, layer: int) -> None:
    q, k, _ = draw(70, 71, seed)
    view = view_of(1, 71, SLOPES, layer=layer, n_layers=3)
    both = Budgets(beta=4, even=0.3, grouped=False)
    found = set()
    for policy in (
        PyramidKV(24), AdaSnapKV(40), AdaSnapKV(24, 8, 3), SnapKV(24, 6, 3, "max", both),
        SnapKV(24, 6, 3, "max"), SnapKV(24, 6, 3, "max", Budgets()),
    ):  # fmt: skip
        view = replace(view, memory={})
        policy.observe(q[:, :50], k[:, :50], replace(view, query_start=0))
        policy.observe(q[:, 50:], k[:, :70], replace(view, query_start=50))
        mask = mask_of(policy, q[:, :1], k, view)[:, 0]
        expected = snapkv_keys(q, k[:, :70], policy, view)
        assert [set(row.nonzero().flatten().tolist()) for row in mask] == [one | {70} for one in expected]
        found.add(tuple(map(tuple, mask.tolist())))
    assert len(found) == 6


def test_budgets_of_layers_follow_the_text() -> None:
    """Behind a prompt that evicts nothing: at every token layers share as of the keys that there are by then, which sum
    to the mean budget, and end at PyramidKV's. Nothing that was evicted comes back."""
    q, k, _ = draw(80, 80, 5)
    policy = H2O(20, 5, Budgets(beta=4))
    layers = [decoded(policy, q, k, 10, view_of(1, 80, layer=layer, n_layers=4)) for layer in range(4)]
    for step, masks in enumerate(zip(*layers, strict=True)):
        n_older = 10 + step - 5  # its own key and the recent ones come in addition
        expected = layer_budgets(20, n_older, 4, beta=4)
        found = [int(n) - 6 for mask in masks for n in mask.sum(1)[:1]]
        assert found == ([n_older] * 4 if n_older <= 20 else expected)
        assert all((mask.sum(1) == mask.sum(1)[0]).all() for mask in masks)
    assert found == [35, 25, 15, 5]
    for masks in layers:
        for before, after in zip(masks, masks[1:], strict=False):
            assert not (after[:, : before.shape[1]] & ~before).any()


def test_budgets_of_h2o_are_those_of_the_prompt() -> None:
    """Layers share as of its length, where it is long enough; heads by their sums, and then each keeps its number."""
    q, k, _ = draw(60, 60, 5)
    for layer, beta, heavy in ((0, 4, 35), (2, 4, 5), (0, None, 20), (2, None, 20)):
        view = view_of(1, 60, layer=layer, n_layers=3)
        masks = decoded(H2O(20, 5, Budgets(beta=beta)), q, k, 50, view)
        assert {int(n) for mask in masks for n in mask.sum(1)} == {heavy + 6}
    k[0] *= 3  # its two heads look at few keys
    counts = [mask.sum(1).tolist() for mask in decoded(H2O(20, 5, Budgets(even=0.2)), q, k, 50, view_of(1, 60))]
    assert all(one == counts[0] for one in counts) and counts[0][0] < counts[0][2]
    assert abs(sum(counts[0]) / 4 - 26) <= 1


def test_evicted_keys_stay_away_where_a_prompt_goes_on() -> None:
    """The chunk is read densely and looks at key 3, which is evicted: its sum is the largest now."""
    q, k, _ = draw(60, 60, 7)
    k[:, 3, 0], q[:, :40, 0], q[:, 40:50, 0] = 30.0, -1.0, 9.0
    policy, view = H2O(6, 4), view_of(1, 60)
    before = decoded(policy, q, k[:, :40], 30, view)[-1]
    policy.observe(q[:, 40:50], k[:, :50], replace(view, decoding=False, query_start=40))
    after = mask_of(policy, q[:, 50:51], k[:, :51], replace(view, query_start=50))[:, 0]
    assert view.memory["sums"][:, :46].argmax(1).tolist() == [3, 3]
    assert (after.sum(1) == 11).all() and not (after[:, :40] & ~before).any()


def test_published_settings() -> None:
    assert PyramidKV(9) == PyramidKV(9, 8, 7, "max", Budgets(beta=20, even=1.0, grouped=True))
    assert AdaSnapKV(9) == AdaSnapKV(9, 32, 7, "max", Budgets(beta=None, even=0.2, grouped=True))
    assert SnapKV(9) == SnapKV(9, 32, 5, "mean", Budgets(beta=None, even=1.0, grouped=False))


def test_settings_of_eviction_that_mean_nothing_are_errors() -> None:
    for wrong, said in (
        (lambda: H2O(0, 3), "heavy is 0: expected at least 1"),
        (lambda: H2O(3, 0), "recent is 0: expected at least 1"),
        (lambda: Budgets(beta=0), "beta is 0: expected at least 1"),
        (lambda: Budgets(even=0), "even is 0: expected a share"),
        (lambda: Budgets(beta=2.5), "beta is 2.5: expected an integer of at least 1"),
        (lambda: H2O(float("nan"), 3), "heavy is nan: expected an integer of at least 1"),
        (lambda: PyramidKV(4, pooled=2), "pooled is 2: expected an odd"),
        (lambda: SnapKV(4, pooling="sum"), "pooling is 'sum': expected one of"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    q, k, _ = draw(4, 9)
    with pytest.raises(ValueError, match="h2o has seen no prompt"):
        H2O(2, 2).select(q[:, :1], k, view_of(1, 9))
    for cut in (H2O(2, 2), PyramidKV(4)):
        with pytest.raises(ValueError, match=f"{cut.name} chooses from whole prompts"):
            cut.select(q[:, :1], k, view_of(1, 9, key_start=3))
