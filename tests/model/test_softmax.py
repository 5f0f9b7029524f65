"""Softmax attention of packed documents, in batches of similar length as one by one, and of chunks behind a cache."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import softmax
from model.kv_cache import Extension
from model.softmax import (
    _in_batches,
    _last_queries,
    cached_softmax_attention,
    cached_uses_flex,
    softmax_attention,
)

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


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query by query, head by head: the last query stands at the last key."""
    (batch, heads, n_queries, dim), (_, groups, n_keys, _) = q.shape, k.shape
    out = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h * groups // heads], v[b, h * groups // heads]
            for i in range(n_queries):
                seen = n_keys - n_queries + i + 1
                out[b, h, i] = (keys[:seen] @ q[b, h, i] * dim**-0.5).softmax(0) @ values[:seen]
    return out


def rows_of_one_length(n_queries: int, n_keys: int) -> Extension:
    position = torch.arange(n_keys - n_queries, n_keys)[None]
    return Extension(position, slice(n_keys - n_queries, n_keys), slice(0, n_keys), None)


@pytest.mark.parametrize("mode", ["plain", "inference", "autocast"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(37, 90), (1, 9), (9, 9), (2, 65)])
def test_last_queries_equal_loops_and_the_masked_path(n_queries, n_keys, dtype, groups, mode) -> None:
    """Against float64 at most twice what the loops lose in the dtype themselves; apart at most by the sum of both."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16).to(dtype) for h, n in ((4, n_queries), (groups, n_keys), (groups, n_keys)))
    truth = one_by_one(q.double(), k.double(), v.double())
    allowed = 2 * (one_by_one(q, k, v).double() - truth).norm()
    with ExitStack() as modes:
        if mode == "inference":
            modes.enter_context(torch.inference_mode())
        elif mode == "autocast":
            modes.enter_context(torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32))
        ours = _last_queries(q, k, v)
        masked = cached_softmax_attention(
            q, k, v, extension=rows_of_one_length(n_queries, n_keys), alibi_slopes=None, window=None, block_mask=None
        )
    assert type(ours) is Tensor and ours.dtype == dtype and ours.shape == q.shape
    assert (ours.double() - truth).norm() <= allowed
    assert (ours.double() - masked.double()).norm() <= 2 * allowed


def test_last_queries_hold_no_mask_before_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's bias is a tensor of 2 * queries * keys float32 values in host memory, which nothing reads: 2 TiB here."""
    given = []
    monkeypatch.setattr(softmax, "scaled_dot_product_attention", lambda *_, attn_mask, **__: given.append(attn_mask))
    q, k = torch.empty(1, 1, 2**18, 0), torch.empty(1, 1, 2**20, 0)
    _last_queries(q, k, k)
    (bias,) = given
    assert (bias.seq_len_q, bias.seq_len_kv) == (2**18, 2**20) and bias.untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    ("n_queries", "window", "ragged", "path"),
    [
        (1024, None, False, "last queries"),
        (2, None, False, "last queries"),
        (4096, None, False, "library"),
        (1, None, False, "library"),
        (1024, 100, False, "flex"),
        (2, 100, False, "mask"),
        (1024, None, True, "mask"),
    ],
)
def test_chunks_on_cuda_are_compiled_for_windows_and_slopes_alone(n_queries, window, ragged, path, monkeypatch) -> None:
    """With tensors that have a CUDA device and no values."""
    taken = []

    def spy(name: str):
        return lambda *_, **__: taken.append(name)

    monkeypatch.setattr(softmax, "_last_queries", spy("last queries"))
    monkeypatch.setattr(softmax, "_masked", spy("mask"))
    monkeypatch.setattr(softmax, "compiled_flex", lambda: spy("flex"))
    monkeypatch.setattr(softmax, "scaled_dot_product_attention", spy("library"))
    with FakeTensorMode():
        q, k = (torch.empty(2, h, n, 16, device="cuda") for h, n in ((4, n_queries), (2, 4096)))
        position = torch.empty(2 if ragged else 1, n_queries, device="cuda")
        lengths = torch.empty(2, device="cuda") if ragged else None
        slots = None if ragged else slice(4096 - n_queries, 4096)
        extension = Extension(position, slots, slice(0, 4096), lengths)
        block_mask = object() if cached_uses_flex(extension, None, window) else None
        cached_softmax_attention(q, k, k, extension=extension, alibi_slopes=None, window=window, block_mask=block_mask)
        with_slopes = cached_uses_flex(extension, torch.empty(4, device="cuda"), window)
    assert taken == [path]
    assert with_slopes == (n_queries > 2 and not ragged)
