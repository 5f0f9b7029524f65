"""longsplash.add_alpha and load_alpha: values, gradients, files; what they and register refuse."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM, ModernBertConfig, ModernBertModel
from transformers.masking_utils import create_causal_mask

import longsplash
from tests.longsplash.models import ALL, SIZES, TOKENS, build, draw, outputs, padding
from tests.training.conftest import ROOT

pytestmark = pytest.mark.usefixtures("registered")


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
