"""Dual Chunk Attention, against a loop over pairs of query and key that have not been rotated yet."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from model.config import RopeScaling
from model.inference.incremental import extend, make_cache, prefill
from model.policies.dual_chunk import DualChunk
from model.policies.policy import masked_attention, use_policy
from model.rotary import rotary_frequencies
from tests.model.policies.policy_inputs import draw, view_of
from tests.model.policies.test_patterns import FREQUENCIES, turned
from tests.model.test_transformer import DOCUMENTS, make, tiny, tokens

CLOSE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def distance(t: int, j: int, farthest: int, local: int) -> int:
    """The paper's three cases: own chunk, the one before, older ones."""
    chunk = farthest - local
    if t // chunk == j // chunk:
        return t % chunk - j % chunk
    if t // chunk == j // chunk + 1:
        return min(t % chunk + chunk, farthest) - j % chunk
    return farthest - j % chunk


@pytest.mark.parametrize(("farthest", "local"), [(12, 2), (9, 1), (8, 4), (2, 1), (80, 3)])
@pytest.mark.parametrize("n_queries", [70, 21, 1])
def test_equals_the_papers_three_cases(farthest: int, local: int, n_queries: int) -> None:
    n_keys = 70
    q, k, v = draw(n_queries, n_keys, 1)
    start = n_keys - n_queries
    view = view_of(n_queries, n_keys, frequencies=FREQUENCIES)
    rotated = turned(q, torch.arange(start, n_keys)), turned(k, torch.arange(n_keys))
    attended = DualChunk(farthest, local).attend(*rotated, v, view)
    for i in range(n_queries):
        t = start + i
        away = [distance(t, j, farthest, local) for j in range(t + 1)]
        assert min(away) >= 0 and max(away) <= farthest  # no distance that training has not seen
        assert all(away[j] == t - j for j in range(max(0, t - local), t + 1))  # the nearest are where they are
        met = torch.stack([turned(q[:, i : i + 1], torch.tensor([one]))[:, 0] for one in away], 1)  # [H, keys, D]
        scores = (met * k[:, : t + 1].repeat_interleave(2, 0)).sum(-1) * view.scale
        expected = (scores.softmax(-1)[..., None] * v[:, : t + 1].repeat_interleave(2, 0)).sum(1)
        torch.testing.assert_close(attended.out[:, i], expected, **CLOSE)
    assert attended.kept.tolist() == [int(attended.visible)] * 4


def test_a_layer_without_rotation_stays_dense() -> None:
    q, k, v = draw(30, 30)
    weights = (q @ k.repeat_interleave(2, 0).mT * 8**-0.5).masked_fill(torch.ones(30, 30).triu(1) > 0, -torch.inf)
    found = DualChunk(6, 2).attend(q, k, v, view_of(30, 30))
    torch.testing.assert_close(found.out, weights.softmax(-1) @ v.repeat_interleave(2, 0), **CLOSE)


@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, 32)])
def test_a_model_decodes_as_it_reads(scaling: RopeScaling | None) -> None:
    """Prompt in chunks and token by token, beside one pass; packed documents keep to themselves."""
    model, text = make(tiny("softmax", "rope", rope_scaling=scaling)), tokens()
    with torch.no_grad(), use_policy(model, DualChunk(40, 8)) as record:
        whole = model.logits(model(text))[0]
        cache = make_cache(model, 1, 128)
        found = [prefill(model, text[:, :121].tolist(), cache, 50)]
        found += [extend(model, text[:, i : i + 1], cache)[0] for i in range(121, 128)]
        packed = model.logits(model(text, DOCUMENTS, 128))[0]
        ends = DOCUMENTS.tolist()
        alone = [model.logits(model(text[:, a:b]))[0] for a, b in zip(ends, ends[1:], strict=False) if b > a]
    torch.testing.assert_close(model.logits(torch.cat(found)), whole[120:], **CLOSE)
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)
    assert (record.density("prefill") == 1).all() and (record.density("decode") == 1).all()
    with torch.no_grad():
        dense = model.logits(model(text))[0]
    torch.testing.assert_close(whole[:41], dense[:41], **CLOSE)
    assert (whole[41:] - dense[41:]).abs().max() > 1e-3


def test_the_authors_setting_keeps_below_the_trained_length() -> None:
    assert DualChunk.of_trained_length(8192) == DualChunk(6144, 1024)
    for wrong, said in (
        (lambda: DualChunk.of_trained_length(7), "trained_length is 7: expected at least 8"),
        (lambda: DualChunk(8, 0), "local is 0: expected at least 1"),
        (lambda: DualChunk(8, 5), "farthest is 8: expected at least 10"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.mark.parametrize(
    ("positions", "options", "said"),
    [
        ("nape", {}, "positions is 'nape': dual_chunk changes rotary ones"),
        ("rope", {"window": 9}, "window is 9: dual_chunk is for models that attend to the whole text"),
        ("rope", {"rope_scaling": RopeScaling("dynamic", 4.0, 32)}, "'dynamic': dual_chunk needs angles"),
    ],
)
def test_models_that_it_means_nothing_for_are_refused(positions: Any, options: dict[str, Any], said: str) -> None:
    model = make(tiny("softmax", positions, **options))
    with pytest.raises(ValueError, match=said), use_policy(model, DualChunk(40, 8)):
        pass


def test_turning_queries_on_costs_no_more_than_bfloat16_does() -> None:
    """Queries are rounded as they come and once more where they are turned to, plain attention's once."""
    n, lost, plain_lost = 4000, [], []
    frequencies = rotary_frequencies(tiny("softmax", "rope", d_model=32), torch.tensor(n - 1))
    view = view_of(64, n, frequencies=frequencies)
    for seed in range(6):
        q, k, v = draw(64, n, seed)
        given = turned(q, torch.arange(n - 64, n)), turned(k, torch.arange(n)), v
        half = DualChunk(48, 8).attend(*(x.bfloat16() for x in given), view).out
        lost.append(half.double() - DualChunk(48, 8).attend(*(x.double() for x in given), view).out)
        plain_lost.append(plain(torch.bfloat16, *given).double() - plain(torch.float64, *given))
    ours, theirs = (torch.stack(each).square().mean().sqrt() for each in (lost, plain_lost))
    assert ours <= 2 * theirs


def plain(dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last queries."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    k, v = (x.to(dtype).repeat_interleave(2, 0) for x in (k, v))
    return scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=seen)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (64, 64), (65, 65), (130, 400), (1, 129), (64, 100)])
def test_all_pairs_and_tiles_count(n_queries: int, n_keys: int) -> None:
    q, k, v = draw(n_queries, n_keys)
    view = view_of(n_queries, n_keys, frequencies=FREQUENCIES)
    policy = DualChunk(48, 8)
    expected = masked_attention(q, k, v, view, policy.select(q, k, view))
    found = policy.attend(q, k, v, view)
    for name in ("kept", "visible", "live_tiles", "total_tiles"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
