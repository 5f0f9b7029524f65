"""Chunked prefill and decoding against the full forward pass."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels.common.backends import INTERPRETED
from model.attention import cached_metadata
from model.config import AttentionKind, Positions
from model.inference.incremental import extend, make_cache, prefill
from model.kv_cache import Extension, KVCache
from model.softmax import cached_block_mask, cached_softmax_attention
from model.transformer import Transformer
from tests.kernels import interpreter
from tests.model.test_transformer import KINDS, POSITIONS, make, tiny

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def full_logits(model: Transformer, sequence: list[int]) -> Tensor:
    """(T, V)."""
    return model.logits(model(torch.tensor([sequence])))[0]


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_equal_full_passes(
    kind: AttentionKind, positions: Positions, window: int | None
) -> None:
    """Prompts of 70, 33, 33, 7 and 1 tokens in chunks that cut them anywhere, then four tokens one by one, then three
    at once."""
    model = make(tiny(kind, positions, window=window, qk_norm=True))
    prompts, further = draw(70, 33, 33, 7, 1), draw(7, 7, 7, 7, 7)
    cache = make_cache(model, 5, 77)
    found = [prefill(model, prompts, cache, chunk_tokens=64)[:, None]]
    assert cache.lengths == [70, 33, 33, 7, 1]
    steps = torch.tensor(further)
    found += [extend(model, steps[:, i : i + 1], cache) for i in range(4)] + [extend(model, steps[:, 4:], cache)]
    ours = model.logits(torch.cat(found, dim=1))  # [B, 8, V]
    for row, (prompt, more) in enumerate(zip(prompts, further, strict=True)):
        torch.testing.assert_close(ours[row], full_logits(model, prompt + more)[-8:], **TOLERANCE)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_one_row_equal_the_full_pass(
    kind: AttentionKind, positions: Positions, window: int | None, monkeypatch
) -> None:
    """Every position's logits, the softmax mask in several parts."""
    monkeypatch.setattr("model.softmax.MASK_ELEMENTS", 2048)
    model = make(tiny(kind, positions, n_kv_heads=1, window=window))
    (sequence,) = draw(130)
    cache = make_cache(model, 1, 130)
    chunks = torch.tensor([sequence]).split([50, 1, 64, 15], dim=1)
    ours = model.logits(torch.cat([extend(model, chunk, cache) for chunk in chunks], dim=1))[0]
    torch.testing.assert_close(ours, full_logits(model, sequence), **TOLERANCE)


@pytest.mark.parametrize("kind", ["softmax", "asentmax"])
def test_64_prompts_in_one_batch_equal_one_by_one(kind: AttentionKind) -> None:
    model = make(tiny(kind))
    prompts = draw(*range(64, 0, -1))
    cache = make_cache(model, 64, 65)
    token = torch.arange(64)[:, None]
    together = torch.stack([prefill(model, prompts, cache, 512), extend(model, token, cache)[:, 0]])
    for row, prompt in enumerate(prompts):
        cache = make_cache(model, 1, 65)
        alone = torch.cat([prefill(model, [prompt], cache, 512), extend(model, token[row : row + 1], cache)[0]])
        torch.testing.assert_close(together[:, row], alone, **TOLERANCE)


def test_a_pass_takes_no_more_tokens_than_allowed(monkeypatch) -> None:
    model, shapes = make(tiny()), []

    def recorded(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return extend(model, tokens, cache)

    monkeypatch.setattr("model.inference.incremental.extend", recorded)
    prefill(model, draw(50, 20, 8), make_cache(model, 3, 50), 24)
    assert shapes == [(3, 8), (2, 12), (1, 24), (1, 6)]
    shapes.clear()
    prefill(model, draw(2, 2, 2), make_cache(model, 3, 2), 1)
    assert shapes == [(3, 1), (3, 1)]


def test_annealed_alpha_is_that_of_the_step() -> None:
    model = make(tiny("entmax", attention=dict(anneal_steps=10, anneal_from=1.05)))
    model.set_step(4)
    (sequence,) = draw(40)
    ours = model.logits(prefill(model, [sequence], make_cache(model, 1, 40), 16))[0]
    torch.testing.assert_close(ours, full_logits(model, sequence)[-1], **TOLERANCE)
    model.set_step(10)
    assert (ours - full_logits(model, sequence)[-1]).abs().max() > 1e-2


def test_rows_are_copied_and_cut() -> None:
    model = make(tiny())
    prompts = draw(30, 20, 9)
    cache = make_cache(model, 3, 40)
    prefill(model, prompts, cache, 90)
    cache.truncate(0, 12)
    cache.copy_row(2, 1)
    assert cache.lengths == [12, 9, 9]
    ours = model.logits(extend(model, torch.tensor([[5], [6]]), cache))[:, 0]
    for row, sequence in enumerate(([*prompts[0][:12], 5], [*prompts[2], 6])):
        torch.testing.assert_close(ours[row], full_logits(model, sequence)[-1], **TOLERANCE)
    assert cache.lengths == [13, 10, 9]


def test_cache_takes_the_dtype_of_autocast_and_refuses_another() -> None:
    model = make(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = make_cache(model, 1, 8)
        assert extend(model, torch.tensor([[1, 2]]), cache).shape == (1, 2, 32)
    with pytest.raises(ValueError, match="holds torch.bfloat16.*gives keys of torch.float32"):
        extend(model, torch.tensor([[1, 2]]), cache)
    assert cache.lengths == [2]
    half = make(tiny()).to(torch.bfloat16)
    assert prefill(half, draw(9, 3), make_cache(half, 2, 9), 8).dtype == torch.bfloat16


def test_memory_is_what_the_docstring_says() -> None:
    config = tiny(n_layers=3, n_kv_heads=2, head_dim=16)
    cache = KVCache(config, rows=5, max_tokens=7, dtype=torch.bfloat16, device=torch.device("cpu"))
    _, layers = cache.open(5, 1)
    assert sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values)) == (
        2 * 3 * 2 * 16 * 2 * 5 * 7
    )


@pytest.mark.parametrize("window", [None, 10])
def test_a_cache_that_grows_gives_the_same(window: int | None) -> None:
    model = make(tiny(window=window))
    tokens = torch.tensor(draw(40, 40))
    whole, growing = make_cache(model, 2, 10**12, reserved=40), make_cache(model, 2, 10**12, reserved=3)
    sizes = []
    for start, stop in ((0, 3), (3, 5), (5, 6), (6, 39), (39, 40)):
        expected, found = (extend(model, tokens[:, start:stop], cache) for cache in (whole, growing))
        assert torch.equal(found, expected)
        sizes.append(growing.slots)
    assert sizes == [3, 6, 6, 39, 78] and whole.slots == 40
    assert make_cache(model, 1, 8, reserved=50).slots == 8


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 x 1,000,000,000,000,000 tokens take .* GiB, for which cpu has no room"):
        make_cache(make(tiny()), 1, 10**15)


def test_what_does_not_fit_is_an_error() -> None:
    model = make(tiny())
    cache = make_cache(model, 2, 8)
    with pytest.raises(ValueError, match="0 rows of 8 tokens"):
        make_cache(model, 0, 8)
    with pytest.raises(ValueError, match=r"have \[2, 3\] tokens.*longest first"):
        prefill(model, draw(2, 3), cache, 8)
    with pytest.raises(ValueError, match=r"have \[2, 0\] tokens"):
        prefill(model, [[1, 2], []], cache, 8)
    with pytest.raises(ValueError, match="tokens of 3 rows were given to a cache of 2"):
        prefill(model, draw(2, 2, 2), cache, 8)
    with pytest.raises(ValueError, match="9 tokens after 0 make 9, but the cache has room for 8"):
        prefill(model, draw(9), cache, 9)
    prefill(model, draw(7, 3), cache, 8)
    with pytest.raises(ValueError, match=r"hold \[7, 3\] tokens: expected an empty one"):
        prefill(model, draw(2), cache, 8)
    with pytest.raises(ValueError, match="2 tokens after 7 make 9"):
        extend(model, torch.ones(2, 2, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="cannot cut row 1 to 4 tokens: it has 3"):
        cache.truncate(1, 4)


@pytest.mark.parametrize("positions", get_args(Positions))
@pytest.mark.parametrize("window", [None, 20])
def test_flex_path_sees_the_same_keys(positions: Positions, window: int | None, monkeypatch) -> None:
    """FlexAttention, which CUDA uses for chunks, run eagerly on the CPU against the masked path."""
    import model.softmax as softmax

    config = tiny("softmax", positions, window=window)
    cache = KVCache(config, 1, 90, torch.float32, torch.device("cpu"))
    cache.lengths = [53]
    extension, _ = cache.open(1, 37)
    metadata = cached_metadata(config, extension, None)
    q, k, v = (torch.randn(1, heads, n, 8) for heads, n in ((4, 37), (2, 90), (2, 90)))
    k, v = k[:, :, extension.keys], v[:, :, extension.keys]
    shared = dict(extension=extension, alibi_slopes=metadata.alibi_slopes, window=window)
    expected = cached_softmax_attention(q, k, v, block_mask=None, **shared)
    monkeypatch.setattr(softmax, "compiled_flex", lambda: softmax.flex_attention)
    ours = cached_softmax_attention(q, k, v, block_mask=cached_block_mask(extension, window), **shared)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_window_reads_its_keys_only() -> None:
    cache = KVCache(tiny(window=10), 2, 90, torch.float32, torch.device("cpu"))
    cache.lengths = [50, 40]
    extension, _ = cache.open(2, 3)
    assert extension.keys == slice(31, 53) and extension.kv_lens is not None
    assert extension.kv_lens.tolist() == [22, 12] and extension.key_index.tolist() == [[19, 20, 21], [9, 10, 11]]
    cache.lengths = [50, 50]
    extension, _ = cache.open(2, 3)
    assert isinstance(extension, Extension) and extension.keys == slice(41, 53) and extension.kv_lens is None


@pytest.mark.skipif(not INTERPRETED, reason="tests/model/test_cuda.py tests the kernels where there is a GPU")
def test_triton_kernels_take_the_cache() -> None:
    interpreter.prepare()
    model = make(tiny("asentmax", "nape", attention=dict(backend="triton")))
    prompts = draw(40, 9)
    cache = make_cache(model, 2, 41)
    found = [prefill(model, prompts, cache, 32)[:, None], extend(model, torch.tensor([[5], [6]]), cache)]
    ours = model.logits(torch.cat(found, dim=1))
    model.config.attention.backend = "torch"
    for row, (prompt, token) in enumerate(zip(prompts, (5, 6), strict=True)):
        torch.testing.assert_close(ours[row], full_logits(model, [*prompt, token])[-2:], **TOLERANCE)
