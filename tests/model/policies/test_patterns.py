"""Patterns of positions alone, against loops over pairs of query and key."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import RopeScaling
from model.policies.lm_infinite import LMInfinite
from model.policies.patterns import Fixed, Longformer, Strided
from model.policies.policy import SequenceView, use_policy
from model.policies.window import SlidingWindow
from model.rotary import rotate
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of
from tests.model.test_transformer import make, tiny, tokens

CLOSE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


SHAPES = dict(n_keys=st.integers(1, 40), before=st.integers(0, 30), cut=st.integers(0, 9))


def seen(n_keys: int, before: int, cut: int) -> list[tuple[int, int, int, int]]:
    """Index of query and key and their positions, of all pairs that causality allows."""
    rows = range(max(1, n_keys - before))
    start = n_keys - len(rows)
    return [(i, j, start + i + cut, j + cut) for i in rows for j in range(n_keys) if j <= start + i]


@settings(max_examples=20)
@given(stride=st.integers(1, 12), **SHAPES)
def test_strided_is_a_band_and_every_stride_th_key(stride: int, n_keys: int, before: int, cut: int) -> None:
    n_queries = max(1, n_keys - before)
    q, k, _ = draw(n_queries, n_keys)
    mask = mask_of(Strided(stride), q, k, view_of(n_queries, n_keys, key_start=cut))
    expected = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for i, j, t, s in seen(n_keys, before, cut):
        expected[i, j] = t - s < stride or (t - s) % stride == 0
    assert (mask[0] == expected).all()


@settings(max_examples=20)
@given(columns=st.integers(1, 4), blocks=st.integers(1, 5), more=st.integers(0, 3), **SHAPES)
def test_fixed_is_the_own_block_and_columns_that_rotate_over_heads(
    columns: int, blocks: int, more: int, n_keys: int, before: int, cut: int
) -> None:
    """A block's first keys are nobody's where columns do not divide it."""
    n_queries, block = max(1, n_keys - before), columns * blocks + more % columns
    q, k, _ = draw(n_queries, n_keys)
    mask = mask_of(Fixed(block, columns), q, k, view_of(n_queries, n_keys, key_start=cut))
    expected = torch.zeros(4, n_queries, n_keys, dtype=torch.bool)
    for head in range(4):
        last = block - columns * (head % blocks)
        for i, j, t, s in seen(n_keys, before, cut):
            expected[head, i, j] = t // block == s // block or last - columns <= s % block < last
    assert (mask == expected).all()


@settings(max_examples=20)
@given(layer=st.integers(0, 4), least=st.integers(1, 6), more=st.integers(0, 9), gap=st.integers(1, 4), **SHAPES)
def test_longformer_is_windows_that_grow_by_layer_and_gaps_in_later_ones(
    layer: int, least: int, more: int, gap: int, n_keys: int, before: int, cut: int
) -> None:
    n_queries = max(1, n_keys - before)
    q, k, _ = draw(n_queries, n_keys)
    view = view_of(n_queries, n_keys, key_start=cut, layer=layer, n_layers=5)
    mask = mask_of(Longformer(least, least + more, 3, gap), q, k, view)
    size = least + [0, more // 4, more // 2, 3 * more // 4, more][layer]
    expected = torch.zeros(4, n_queries, n_keys, dtype=torch.bool)
    for head in range(4):
        step = gap if head < 3 and layer >= 3 else 1
        for i, j, t, s in seen(n_keys, before, cut):
            expected[head, i, j] = t - s in [step * n for n in range(size)]
    assert (mask == expected).all()


FREQUENCIES = 10000 ** -(torch.arange(0, 8, 2) / 8)


def turned(x: Tensor, position: Tensor) -> Tensor:
    """x, (heads, n, 8), as rotary positions have it."""
    angle = position.float()[:, None] * FREQUENCIES
    return rotate(x[None], angle.cos(), angle.sin())[0]


@pytest.mark.parametrize(("size", "sinks", "cut"), [(7, 3, 0), (1, 5, 0), (12, 0, 0), (5, 6, 2), (40, 3, 0)])
@pytest.mark.parametrize("positions", ["rope", "nape", "nope"])
def test_lm_infinite_has_no_distance_above_its_size(positions: str, size: int, sinks: int, cut: int) -> None:
    """Against a loop over pairs: the query turned by the distance alone, or the bias at it."""
    q, k, v = draw(9, 30, 1)
    view = view_of(9, 30, SLOPES if positions == "nape" else None, key_start=cut)
    given_q, given_k = q, k
    if positions == "rope":
        view = replace(view, frequencies=FREQUENCIES)
        given_q, given_k = turned(q, torch.arange(21, 30) + cut), turned(k, torch.arange(30) + cut)
    attended = LMInfinite(size, sinks).attend(given_q, given_k, v, view)
    n_read = 0
    for i in range(9):
        near = [j for j in range(22 + i) if 21 + i - j < size or j + cut < sinks]
        n_read += len(near)
        for head in range(4):
            scores = []
            for j in near:
                distance = torch.tensor([min(21 + i - j, size)])
                one = turned(q[head : head + 1, i : i + 1], distance) if positions == "rope" else q[head, i]
                bias = float(SLOPES[head] * distance) if positions == "nape" else 0.0
                scores.append(float(one.flatten().double() @ k[head // 2, j].double()) * 8**-0.5 - bias)
            p = torch.tensor(scores).double().softmax(0)
            torch.testing.assert_close(attended.out[head, i].double(), p @ v[head // 2, near].double(), **CLOSE)
    assert attended.kept.expand(4).tolist() == [n_read] * 4


def test_what_a_window_hides_from_lm_infinite_stays_hidden() -> None:
    """The model's window is the shorter one: no sink is left, and attention is the window's."""
    q, k, v = draw(9, 30, 1)
    view = view_of(9, 30, SLOPES, window=8)
    found = LMInfinite(10, 5).attend(q, k, v, view)
    torch.testing.assert_close(found.out, SlidingWindow(8).attend(q, k, v, view).out)


def test_lm_infinite_does_not_see_how_long_the_text_is() -> None:
    """The same sinks and last keys around a gap of any length, at any rotary position that float32 tells apart."""
    q, k, v = draw(1, 25, 2)
    found = []
    for gap in (0, 10, 5000):
        far = torch.cat([torch.arange(5), torch.arange(5, 25) + gap])
        keys, values = torch.zeros(2, 25 + gap, 8), torch.zeros(2, 25 + gap, 8)
        keys[:, far], values[:, far] = turned(k, far), v
        view = view_of(1, 25 + gap, frequencies=FREQUENCIES)
        found.append(LMInfinite(20, 5).attend(turned(q, far[-1:]), keys, values, view).out)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-3, rtol=2e-3)


def test_views_know_how_their_layer_rotates() -> None:
    seen = []

    class Watching(SlidingWindow):
        def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
            seen.append(view.frequencies)

    scaled = dict(kind="linear", factor=4.0, original_length=32)
    for positions, options in (("nape", {}), ("rope", {"rope_scaling": RopeScaling(**scaled), "nope_layers": [1]})):
        model = make(tiny("softmax", positions, **options))
        with use_policy(model, Watching(5), {"decode"}), torch.no_grad():
            model(tokens(20))
    assert seen[:2] == [None, None] and seen[3] is None
    torch.testing.assert_close(seen[2], FREQUENCIES / 4)
    dynamic = make(tiny("softmax", "rope", rope_scaling=RopeScaling(**{**scaled, "kind": "dynamic"})))
    with pytest.raises(ValueError, match="'dynamic': lm_infinite needs angles"), use_policy(dynamic, LMInfinite(9)):
        pass


def test_settings_of_patterns_that_mean_nothing_are_errors() -> None:
    assert (Strided().stride, Fixed().block, Fixed().columns) == (128, 128, 32)
    for wrong, said in (
        (lambda: Strided(0), "stride is 0: expected at least 1"),
        (lambda: Fixed(0), "block is 0: expected at least 1"),
        (lambda: Fixed(12, 0), "columns is 0: expected at least 1"),
        (lambda: LMInfinite(0), "size is 0: expected at least 1"),
        (lambda: LMInfinite(4, -1), "sinks is -1: expected at least 0"),
        (lambda: Longformer(9, 8), "largest is 8: expected at least 9"),
        (lambda: Longformer(9, 9, gap=0), "gap is 0: expected at least 1"),
        (lambda: Fixed(12, 13), "columns is 13: expected at most block, 12"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
