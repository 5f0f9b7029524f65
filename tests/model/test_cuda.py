"""Every attention kind on CUDA against the CPU in float32; needs a CUDA device."""

import copy
import warnings
from dataclasses import replace
from typing import get_args

import pytest
import torch

from model.config import AttentionConfig, AttentionKind, ModelConfig, NSAConfig, Positions
from model.inference.incremental import extend, make_cache, prefill
from model.policies.dual_chunk import DualChunk
from model.policies.policy import SequenceView
from model.softmax import document_block_mask, softmax_attention
from model.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DOCUMENTS = torch.tensor([0, 300, 300, 301, 1000, 1536], dtype=torch.int32)


def build(kind: AttentionKind, positions: Positions, window: int | None = None) -> Transformer:
    if AttentionConfig(kind=kind).is_trained_sparse and window:
        pytest.skip("it is sparse without a window, or has one of its own")
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, d_ff=256)
    # all blocks, and all tokens: which ones are best turns on rounding (test_cuda.py of nsa and dsa selects)
    nsa = NSAConfig(select_count=24) if kind == "nsa" else None
    attention = AttentionConfig(kind=kind, nsa=nsa)
    return Transformer(ModelConfig(**sizes, positions=positions, window=window, attention=attention))


def run(model: Transformer, cu_seqlens: torch.Tensor | None, dtype: torch.dtype | None):
    """Hidden states and the gradient of the query projection."""
    device = model.embedding.weight.device
    tokens = torch.randint(0, 512, (1, 1536), generator=torch.Generator().manual_seed(1)).to(device)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        longest = 1536 if cu_seqlens is None else int(cu_seqlens.diff().max())
        hidden = model(tokens, cu_seqlens, longest)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(device)
    gradient = torch.autograd.grad((hidden.float() * weight).sum(), model.blocks[0].attention.wq.weight)[0]
    return hidden.float().cpu(), gradient.cpu()


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("positions", get_args(Positions))
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_cuda_agrees_with_cpu(kind, positions, window, documents, dtype) -> None:
    """float32 within 1e-3 (TF32 is off by default); bfloat16 within 3x what autocast loses on the CPU."""
    model = build(kind, positions, window)
    truth = run(model, documents, None)
    on_gpu = run(copy.deepcopy(model).cuda(), documents, dtype)
    allowed = (
        [1e-3, 1e-3]
        if dtype is None
        else [3 * relative(a, b) for a, b in zip(run(model, documents, dtype), truth, strict=True)]
    )
    for ours, expected, limit in zip(on_gpu, truth, allowed, strict=True):
        assert relative(ours, expected) <= limit


@pytest.mark.parametrize("kind", ["softmax", "asentmax"])
@pytest.mark.parametrize("positions", ["rope", "nape"])
def test_compiled_blocks_agree(kind, positions) -> None:
    model = build(kind, positions).cuda()
    eager = run(model, DOCUMENTS, torch.bfloat16)
    model.compile_blocks()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # users cannot do anything about it
        compiled = run(model, DOCUMENTS, torch.bfloat16)
    for ours, expected in zip(compiled, eager, strict=True):
        assert relative(ours, expected) < 2e-2


@pytest.mark.parametrize(
    ("kind", "positions"), [*((kind, "nape") for kind in get_args(AttentionKind)), ("asentmax", "nope")]
)
def test_compiled_gradients_at_lengths_that_inductor_would_pad(kind, positions) -> None:
    """4 heads x 330 tokens are not whole 128 bytes of float32. Both compute in float32: within 1e-3."""
    gradients = []
    for compiled in (False, True):
        model = build(kind, positions).cuda()
        if compiled:
            model.compile_blocks()
        tokens = torch.randint(0, 512, (4, 330), generator=torch.Generator().manual_seed(1)).cuda()
        hidden = model(tokens)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).cuda()
        (hidden * weight).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 1e-3, name


@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize("lengths", [(1024, 4096), (65536, 131072)])
def test_compiled_softmax_of_one_document(lengths, one_buffer) -> None:
    """q, k and v apart, or slices of one buffer, as ranks that share sequences have them; the second length makes
    Inductor's shapes symbolic. One kernel in both, so they differ by bfloat16's rounding (2 ** -8) at most."""
    compiled = torch.compile(softmax_attention)
    options = dict(cu_seqlens=None, alibi_slopes=None, window=None, block_mask=None)
    for length in lengths:
        torch.manual_seed(0)
        values = torch.randn(length, 16 + 2 + 2, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(1, 16, length, 64, device="cuda", dtype=torch.bfloat16)
        found = []
        for attend in (softmax_attention, compiled):
            leaf = values.clone().requires_grad_()
            q, k, v = leaf.transpose(0, 1)[None].split([16, 2, 2], dim=1)
            if not one_buffer:
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out = attend(q, k, v, max_seqlen=length, **options)
            found.append([out.detach(), torch.autograd.grad(out, leaf, weight)[0]])
        for ours, expected in zip(*reversed(found), strict=True):
            assert relative(ours.float(), expected.float()) < 2**-8, length


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("positions", get_args(Positions))
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_cached_passes_agree_with_full_ones(kind, positions, window, dtype) -> None:
    """Prefill in chunks, decoding of rows of one length and of two: float32 within 1e-3, bfloat16 within 3x what
    autocast loses on the CPU."""
    model = build(kind, positions, window)
    tokens = torch.randint(0, 512, (2, 1031), generator=torch.Generator().manual_seed(1))
    truth = model(tokens)
    on_gpu = copy.deepcopy(model).cuda()
    for lengths in ([1024, 1024], [1024, 300]):
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            cache = make_cache(on_gpu, 2, 1031)
            prompts = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
            found = [prefill(on_gpu, prompts, cache, 700)[:, None]]
            for i in range(3):
                step = torch.stack([tokens[row, n + i : n + i + 1] for row, n in enumerate(lengths)])
                found.append(extend(on_gpu, step.cuda(), cache))
        ours = torch.cat(found, dim=1).float().cpu()
        expected = torch.stack([truth[row, n - 1 : n + 3] for row, n in enumerate(lengths)])
        allowed = 1e-3
        if dtype is not None:
            with torch.autocast("cpu", dtype=dtype):
                half = model(tokens)
            loss = torch.stack([half[row, n - 1 : n + 3] for row, n in enumerate(lengths)])
            allowed = 3 * relative(loss.float(), expected)
        assert relative(ours, expected) <= allowed


def test_flex_attention_is_compiled_for_every_kind_of_input() -> None:
    """torch compiles a function 8 times, and then computes FlexAttention with all scores in memory."""
    n_tokens = 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 32, 64, 128):
            q, k, v = torch.randn(3, 1, 2, n_tokens, head_dim, device="cuda", dtype=dtype)
            mask = document_block_mask(n_tokens, None, None, q.device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            softmax_attention(
                q, k, v, cu_seqlens=None, max_seqlen=n_tokens, alibi_slopes=torch.ones(2, device="cuda"), window=None,
                block_mask=mask,
            )  # fmt: skip
            assert torch.cuda.max_memory_allocated() - before < n_tokens**2


@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dual_chunk_attention_is_that_of_the_cpu(dtype: torch.dtype, size: int) -> None:
    """Each dtype has a fused kernel of its own that gives the sums; sizes of heads that they do not take are padded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, n, size, generator=generator).to(dtype) for h, n in ((4, 150), (2, 500), (2, 500)))
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    view = SequenceView(0, 1, False, 350, 0, size**-0.5, None, None, {}, frequencies)
    exact = DualChunk(96, 16).attend(q.double(), k.double(), v.double(), view).out
    on_cpu = (DualChunk(96, 16).attend(q, k, v, view).out.double() - exact).square().mean().sqrt()
    on_gpu = replace(view, frequencies=frequencies.cuda())
    found = DualChunk(96, 16).attend(q.cuda(), k.cuda(), v.cuda(), on_gpu).out.cpu().double()
    assert (found - exact).square().mean().sqrt() <= 3 * on_cpu
