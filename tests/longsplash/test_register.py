"""attn_implementation="entmax": equal to eager attention with entmax in softmax's place; padding, caches, windows,
documents; a learned alpha; what is refused."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import longsplash
from kernels import entmax
from tests.training.conftest import ROOT

WINDOW, TOKENS = 5, 12
SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=64,
)  # fmt: skip
DECODER = dict(SIZES, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=None)
LAYERS = ["full_attention", "sliding_attention"]
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**DECODER)),
    "mistral": (MistralForCausalLM, MistralConfig(**DECODER, sliding_window=WINDOW)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **DECODER, sliding_window=WINDOW, layer_types=LAYERS, attn_logit_softcapping=None, query_pre_attn_scalar=8
        ),
    ),
}
ENCODER = BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def registered() -> None:
    longsplash.register(backend="torch")


def build(name: str, kind: str = "entmax", **changes: Any) -> PreTrainedModel:
    cls, config = (BertModel, ENCODER) if name == "bert" else DECODERS[name]
    config = type(config)(**{**config.to_dict(), **changes})
    config._attn_implementation = kind
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)  # scores wide enough for weights of zero
    return model.eval()


@contextlib.contextmanager
def softmax_is_entmax(monkeypatch: pytest.MonkeyPatch, alpha: float = 1.5) -> Iterator[None]:
    def replaced(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        weights = entmax(x if dtype is None else x.to(dtype), alpha=alpha, dim=dim, backend="torch")
        assert bool((weights == 0).any())
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", replaced)
        yield


def draw(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(2, 50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, **inputs: Any) -> Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of one weighted sum of the real tokens' outputs."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (out * weight).sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert x.keys() == y.keys() and len(x) > 5
    for name in x:
        if name.endswith("key.bias"):
            continue  # zero but for rounding: it adds one number to all scores of a query
        torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-3 * float(y[name].abs().max()) + 1e-6, msg=name)


def padding(side: str) -> Tensor:
    """Rows of 12 and 8 real tokens; "between": pads in the middle as well."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "right": slice(8, 12), "between": slice(3, 7)}[side]] = 0
    return mask


ALL = [*DECODERS, "bert"]


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
    kept = model.generate(tokens, **options, cache_implementation=cache, output_logits=True, return_dict_in_generate=True)
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


# A learned alpha


@pytest.mark.parametrize("name", ALL)
def test_learned_alpha_starts_as_fixed_and_learns(name: str) -> None:
    model, tokens, mask = build(name), draw(), padding("left")
    with torch.no_grad():
        fixed = outputs(model, input_ids=tokens, attention_mask=mask)
    parameters = longsplash.add_alpha(model, start=1.5)
    assert len(parameters) == 2 and all(x.shape == (4,) and x.dtype == torch.float32 for x in parameters)
    real = mask.bool()
    out = outputs(model, input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(out[real], fixed[real], rtol=1e-4, atol=1e-4)
    (out[real] ** 2).mean().backward()
    assert all(x.grad is not None and bool((x.grad != 0).all()) for x in parameters)


def test_learned_alpha_has_the_right_gradient() -> None:
    model, tokens, mask = build("qwen3").double(), draw(), padding("left")
    (first, _) = longsplash.add_alpha(model, start=1.3)

    def loss() -> Tensor:
        return (outputs(model, input_ids=tokens, attention_mask=mask)[mask.bool()] ** 2).mean()

    (gradient,) = torch.autograd.grad(loss(), first)
    with torch.no_grad():
        for i in range(4):
            values = []
            for step in (1e-2, -1e-2):
                first[i] += step
                values.append(loss())
                first[i] -= step
            slope = (values[0] - values[1]) / 2e-2
            torch.testing.assert_close(gradient[i], slope.float(), rtol=2e-2, atol=1e-6)


def test_learned_alpha_is_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = build("llama"), draw()
    for parameter in longsplash.add_alpha(model):
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    with torch.no_grad():
        assert not torch.allclose(outputs(again, input_ids=tokens), outputs(model, input_ids=tokens), atol=1e-3)
        longsplash.load_alpha(again, tmp_path)
        assert torch.equal(outputs(again, input_ids=tokens), outputs(model, input_ids=tokens))
    other = build("llama")
    longsplash.add_alpha(other, start=1.2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, input_ids=tokens), outputs(model, input_ids=tokens))
    with pytest.raises(ValueError, match="model has an alpha already"):
        longsplash.load_alpha(again, tmp_path)
    with pytest.raises(ValueError, match="alpha of each of the model's 3 attention modules, got 2"):
        longsplash.load_alpha(build("llama", num_hidden_layers=3), tmp_path)
    with pytest.raises(FileNotFoundError, match="folder must hold"):
        longsplash.load_alpha(build("llama"), tmp_path / "nothing")


# What is refused


def test_what_models_ask_for_in_vain() -> None:
    tokens = draw()
    with pytest.raises(ValueError, match=r"softcap.*attn_logit_softcapping=None"):
        build("gemma2", attn_logit_softcapping=50.0)(tokens)
    dropping = build("llama", attention_dropout=0.1)
    dropping(tokens)
    with pytest.raises(ValueError, match="no dropout, got 0.1: set attention_dropout=0"):
        dropping.train()(tokens)
    with pytest.raises(ValueError, match="2-d attention_mask"):
        build("llama")(tokens, attention_mask=torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril())
    config = ModernBertConfig(**SIZES, local_attention=4, global_attn_every_n_layers=2)
    config._attn_implementation = "entmax"
    with pytest.raises(ValueError, match="entmax attention takes causal and bidirectional masks"):
        ModernBertModel(config)(tokens)


def test_sinks_and_custom_masks_are_refused() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import create_causal_mask

    attend = AttentionInterface()["entmax"]
    q = torch.randn(1, 4, 3, 8)
    for name in ("s_aux", "position_bias", "cache"):
        with pytest.raises(ValueError, match=name if name != "cache" else "paged"):
            attend(nn.Module(), q, q, q, None, **{name: torch.zeros(4)})
    config = build("llama").config
    for extra in (dict(or_mask_function=lambda *_: True), dict(block_sequence_ids=torch.zeros(1, 3))):
        with pytest.raises(ValueError, match="got a mask by"):
            create_causal_mask(config, torch.zeros(1, 3, 32), None, None, **extra)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(alpha=1.0), "alpha must lie in"),
        (dict(alpha=torch.tensor(1.5)), "longsplash.add_alpha"),
        (dict(name="sdpa"), "name must be one"),
        (dict(name="a/b"), "name must be one"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_arguments_of_register(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        longsplash.register(**arguments)


def test_arguments_of_add_alpha() -> None:
    with pytest.raises(ValueError, match="start must be a number between"):
        longsplash.add_alpha(build("llama"), start=2.0)
    with pytest.raises(ValueError, match="got attn_implementation='sdpa' in model.layers.0.self_attn"):
        longsplash.add_alpha(build("llama", "sdpa"))
    with pytest.raises(ValueError, match="attention interface, got Linear"):
        longsplash.add_alpha(nn.Linear(2, 2))


def test_without_transformers_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import longsplash; longsplash.register()"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].endswith("pip install longsplash[hub]")
