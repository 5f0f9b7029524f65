"""Softmax attention of packed documents: in batches of similar length as one by one."""

import pytest
import torch

from model.softmax import _in_batches, softmax_attention

BOUNDS = [0, 1, 1, 40, 43, 50, 58, 59, 59, 90]  # two empty documents


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("slopes", [None, torch.tensor([1.0, 0.5, 0.0, 0.0])], ids=["plain", "alibi"])
def test_batches_of_documents_equal_documents(slopes: torch.Tensor | None, window: int | None) -> None:
    """Outputs and gradients in float64: nothing reads what pads a row."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, BOUNDS[-1], 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    options = dict(cu_seqlens=cu_seqlens, max_seqlen=BOUNDS[-1], alibi_slopes=slopes, window=window, block_mask=None)
    weight = torch.randn(q.shape, dtype=torch.float64)
    found = []
    for out in (softmax_attention(q, k, v, **options), _in_batches(q, k, v, cu_seqlens, slopes, window)):
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for expected, other in zip(*found, strict=True):
        assert torch.allclose(other, expected, rtol=1e-12, atol=1e-12)
