"""attn_implementation="entmax": equal to eager attention with entmax in softmax's place; padding, caches, windows,
documents, compilation."""

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartModel, StaticCache, ViTConfig, ViTModel

import longsplash
from longsplash.attention_mask import entmax_mask
from tests.kernels.helpers import DEVICE, needs_triton
from tests.longsplash.models import (
    ALL,
    DECODERS,
    SIZES,
    TOKENS,
    build,
    draw,
    gradients,
    outputs,
    padding,
    same,
    seeded,
    softmax_is_entmax,
)

pytestmark = pytest.mark.usefixtures("registered")
PARTS = dict(layers=1, attention_heads=4, ffn_dim=40)


@pytest.mark.parametrize("name", ALL)
def test_equals_entmax_over_eager_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, (ours, reference) = draw(), (build(name), build(name, "eager"))
    out = outputs(ours, input_ids=tokens)
    with softmax_is_entmax(monkeypatch):
        expected = outputs(reference, input_ids=tokens)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(out, outputs(build(name, "eager"), input_ids=tokens), atol=1e-2)
    same(gradients(ours, out), gradients(reference, expected))


@pytest.mark.parametrize("side", ["left", "right", "between"])
@pytest.mark.parametrize("name", ALL)
def test_padding_equals_eager(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, (ours, reference) = padding(side), (build(name), build(name, "eager"))
    inputs = dict(input_ids=draw() * mask, attention_mask=mask)
    if side == "between" and name in ("mistral", "gemma2"):
        with pytest.raises(ValueError, match="attention_mask must have a row's real tokens side by side"):
            ours(**inputs)
        return
    out = outputs(ours, **inputs)[mask.bool()]
    with softmax_is_entmax(monkeypatch):
        expected = outputs(reference, **inputs)[mask.bool()]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    same(gradients(ours, out), gradients(reference, expected))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_padded_tokens_change_nothing(name: str, side: str) -> None:
    """Outputs and gradients of a row alone, without padding."""
    model, tokens, mask = build(name), draw(), padding(side)
    real = mask[1].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = outputs(model, input_ids=tokens, attention_mask=mask, position_ids=positions)[1, real]
    padded = gradients(model, out)
    alone = outputs(model, input_ids=tokens[1:, real])[0]
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
    same(padded, gradients(model, alone))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_equals_no_cache(name: str, cache: str, padded: bool) -> None:
    """Past the window, of prompts padded on the left."""
    model, tokens = build(name), draw()
    mask = padding("left") if padded else torch.ones_like(tokens)
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, attention_mask=mask, pad_token_id=0)
    kept = model.generate(
        tokens, **options, cache_implementation=cache, output_logits=True, return_dict_in_generate=True
    )
    plain = model.generate(tokens, **options, use_cache=False)
    assert torch.equal(kept.sequences, plain)
    whole = torch.cat([mask, mask.new_ones(2, 8)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = outputs(model, input_ids=plain, attention_mask=whole, position_ids=positions)
    torch.testing.assert_close(torch.stack(kept.logits, 1), logits[:, TOKENS - 1 : -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_chunks_equal_one_pass(name: str, static: bool) -> None:
    model, tokens = build(name), draw()
    cache = StaticCache(model.config, max_cache_len=20) if static else None
    outs = []
    for chunk in tokens.split([4, 5, 1, 2], 1):
        result = model(chunk, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        outs.append(result.logits)
    torch.testing.assert_close(torch.cat(outs, 1), model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_are_apart(name: str) -> None:
    model, tokens = build(name), draw()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8], [*range(7), *range(5)]])
    packed = outputs(model, input_ids=tokens, position_ids=positions, use_cache=False)
    for row, splits in ((0, [3, 9]), (1, [7, 5])):
        alone = [outputs(model, input_ids=x[None])[0] for x in tokens[row].split(splits)]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(tokens, position_ids=positions, use_cache=True)
    ends = torch.tensor([0, 3, 12], dtype=torch.int32)
    given = outputs(
        model, input_ids=tokens[:1], position_ids=positions[:1], use_cache=True, cu_seq_lens_q=ends, cu_seq_lens_k=ends
    )
    torch.testing.assert_close(given[0], packed[0])


def test_bfloat16_and_autocast() -> None:
    model, tokens, mask = build("qwen3"), draw(), padding("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs(model, input_ids=tokens, attention_mask=mask)
    model.to(torch.bfloat16)
    assert outputs(model, input_ids=tokens, attention_mask=mask).isfinite().all() and mixed.isfinite().all()


def test_gradient_checkpointing_changes_nothing() -> None:
    model, tokens, mask = build("gemma2").train(), draw(), padding("left")
    real = mask.bool()
    plain = gradients(model, outputs(model, input_ids=tokens, attention_mask=mask)[real])
    model.gradient_checkpointing_enable()
    same(gradients(model, outputs(model, input_ids=tokens, attention_mask=mask, use_cache=False)[real]), plain)


def test_a_name_for_each_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    longsplash.register(1.25, name="entmax-1.25", backend="torch")
    model, tokens = build("llama"), draw()
    model.set_attn_implementation("entmax-1.25")
    with softmax_is_entmax(monkeypatch, 1.25):
        expected = outputs(build("llama", "eager"), input_ids=tokens)
    torch.testing.assert_close(outputs(model, input_ids=tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_and_decoder(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention to a padded encoder."""
    sizes: dict[str, Any] = {f"{part}_{x}": n for part in ("encoder", "decoder") for x, n in PARTS.items()}
    config = BartConfig(vocab_size=50, d_model=32, dropout=0.0, bos_token_id=1, eos_token_id=None, **sizes)
    mask = padding(side)
    inputs = dict(input_ids=draw(), attention_mask=mask, decoder_input_ids=draw(tokens=7))
    ours, reference = seeded(BartModel, config), seeded(BartModel, config, "eager")
    out = outputs(ours, **inputs)
    with softmax_is_entmax(monkeypatch):
        expected = outputs(reference, **inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert len(longsplash.add_alpha(ours)) == 3


def test_encoder_that_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4})
    images = torch.randn(2, 3, 16, 16)
    out = outputs(seeded(ViTModel, config), pixel_values=images)
    with softmax_is_entmax(monkeypatch):
        expected = outputs(seeded(ViTModel, config, "eager"), pixel_values=images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton)])
def test_kernels_equal_torch(backend: str) -> None:
    tokens, mask = draw(), padding("left")
    results = []
    for each in ("torch", backend):
        longsplash.register(backend=each)
        model = build("gemma2").to(DEVICE)
        out = outputs(model, input_ids=tokens.to(DEVICE), attention_mask=mask.to(DEVICE)).cpu()[mask.bool()]
        results.append((out, {name: x.cpu() for name, x in gradients(model, out).items()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    same(results[0][1], results[1][1])


def test_compiled_equals_eager() -> None:
    tokens, mask = draw(), padding("left")
    model, real = build("llama", num_hidden_layers=1), mask.bool()
    torch._dynamo.reset()
    compiled = torch.compile(build("llama", num_hidden_layers=1), backend="aot_eager")
    for inputs in (dict(attention_mask=mask), dict[str, Any]()):
        rows = real if inputs else torch.ones_like(real)
        x = outputs(model, input_ids=tokens, use_cache=False, **inputs)[rows]
        y = outputs(compiled, input_ids=tokens, use_cache=False, **inputs)[rows]
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        same(gradients(model, x), {k.removeprefix("_orig_mod."): g for k, g in gradients(compiled, y).items()})


def test_mask_keeps_what_it_says_on_another_device() -> None:
    mask = entmax_mask(2, TOKENS, TOKENS, attention_mask=padding("left"))
    moved = mask.to("meta")
    assert mask.to("cpu") is mask and moved.visibility is not None and mask.visibility is not None
    assert moved.visibility.n_keys == TOKENS and moved.visibility.causal
    assert moved.visibility.keys_from is not None and moved.visibility.keys_from.device.type == "meta"
