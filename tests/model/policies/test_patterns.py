"""Patterns of positions alone, against loops over pairs of query and key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.policies.patterns import Fixed, Strided
from tests.model.policies.policy_inputs import draw, mask_of, view_of


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
@given(columns=st.integers(1, 4), blocks=st.integers(1, 5), **SHAPES)
def test_fixed_is_the_own_block_and_columns_that_rotate_over_heads(
    columns: int, blocks: int, n_keys: int, before: int, cut: int
) -> None:
    n_queries, block = max(1, n_keys - before), columns * blocks
    q, k, _ = draw(n_queries, n_keys)
    mask = mask_of(Fixed(block, columns), q, k, view_of(n_queries, n_keys, key_start=cut))
    expected = torch.zeros(4, n_queries, n_keys, dtype=torch.bool)
    for head in range(4):
        last = block - columns * (head % blocks)
        for i, j, t, s in seen(n_keys, before, cut):
            expected[head, i, j] = t // block == s // block or last - columns <= s % block < last
    assert (mask == expected).all()


def test_settings_of_patterns_that_mean_nothing_are_errors() -> None:
    assert (Strided().stride, Fixed().block, Fixed().columns) == (128, 128, 32)
    for wrong, said in (
        (lambda: Strided(0), "stride is 0: expected at least 1"),
        (lambda: Fixed(0), "block is 0: expected at least 1"),
        (lambda: Fixed(12, 0), "columns is 0: expected at least 1"),
        (lambda: Fixed(12, 5), "columns is 5: expected a divisor of block, 12"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
