"""Lengths that nobody has looked at, as on a CUDA device, where that would synchronise: wrong ones read nothing outside
of keys and values, which lie in the middle of larger buffers here.

Runs on CUDA where there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.alpha_entmax.attention
from kernels import entmax_attention
from tests.kernels.helpers import draw, int32, needs_triton

pytestmark = needs_triton
N_KEYS, BEYOND = 70, 90


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.alpha_entmax.attention, "readable", lambda x: False)


def within(batch: int, heads: int, seed: int) -> Tensor:
    """(batch, heads, N_KEYS, 16) with values among NaN: each head's keys have BEYOND rows of them behind and before."""
    buffer = torch.full((batch, heads, N_KEYS + 2 * BEYOND, 16), torch.nan)
    inner = buffer.to(draw(1).device)[:, :, BEYOND : BEYOND + N_KEYS]
    inner.copy_(draw(*inner.shape, seed=seed))
    return inner.requires_grad_()


def run(n_queries: int, batch: int, backend: str, backward: bool, **options: Any) -> list[Tensor]:
    q = draw(batch, 2, n_queries, 16, seed=0).requires_grad_(backward)
    k, v = (within(batch, 1, seed).requires_grad_(backward) for seed in (1, 2))
    out = entmax_attention(q, k, v, alpha=1.5, backend=backend, **options)
    if not backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("more", [{}, {"window": 20}, {"causal": False}], ids=str)
@pytest.mark.parametrize(("n_queries", "backward"), [(1, False), (40, True)])
def test_key_lengths_beyond_the_keys_are_the_nearest_that_fit(
    n_queries: int, backward: bool, more: dict[str, Any], backend: str
) -> None:
    wrong, right = int32(N_KEYS + BEYOND, -BEYOND, N_KEYS), int32(N_KEYS, 0, N_KEYS)
    with torch.set_grad_enabled(backward):
        ours = run(n_queries, 3, backend, backward, kv_lens=wrong, **more)
        expected = run(n_queries, 3, backend, backward, kv_lens=right, **more)
    for x, y in zip(ours, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "bounds", [(0, 30, N_KEYS + BEYOND), (-BEYOND, 30, N_KEYS), (0, 30, 50), (20, 30, N_KEYS)], ids=str
)
@pytest.mark.parametrize("causal", [True, False])
def test_documents_beyond_the_keys_end_with_them(bounds: tuple[int, ...], causal: bool, backend: str) -> None:
    """Also where the bounds begin late or end early, a row of which has no document."""
    guarded = torch.full((40,), 2**30, dtype=torch.int32)  # what lies behind the bounds is none
    guarded[: len(bounds)] = int32(*bounds).cpu()
    cu_seqlens = guarded.to(int32(0).device)[: len(bounds)]
    for x in run(N_KEYS, 1, backend, True, cu_seqlens=cu_seqlens, causal=causal):
        assert x.isfinite().all()


def test_bounds_of_no_document_are_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens must be .* of at least one document, got 1"):
        run(N_KEYS, 1, "triton", False, cu_seqlens=int32(0))
