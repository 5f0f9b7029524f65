"""Models of transformers and ours: the same logits for every family and way of scaling rotary positions, and back."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from common.errors import UsageError
from model.config import AttentionConfig, ModelConfig, RopeScaling
from model.hub.architecture import architecture_of, config_of
from model.hub.weights import hub_name, is_alias, our_name
from model.inference.incremental import extend, make_cache, prefill
from model.transformer import Transformer

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip
LENGTH = 96  # past the original contexts
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama wide heads": ("llama", dict(head_dim=16)),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral full": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=0)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2)),
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0))),
    "dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "llama3": (
        "llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=48,
            )
        ),
    ),
    "yarn": ("qwen2", dict(rope_parameters=YARN)),
    "yarn factor": ("llama", dict(rope_parameters=YARN | dict(attention_factor=1.3, beta_fast=16, beta_slow=2))),
    "yarn mscale": ("llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9, truncate=False))),
}  # fmt: skip


def config(family: str, **options: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**SIZES, **options})


def random_model(name: str) -> PreTrainedModel:
    family, options = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **options), attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms as well
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def ours_of(theirs: PreTrainedModel) -> Transformer:
    network = architecture_of(theirs.config)
    ours = Transformer(network)
    weights = {our_name(name): x for name, x in theirs.state_dict().items() if not is_alias(name, network)}
    ours.load_state_dict(weights)
    return ours.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str) -> None:
    theirs = random_model(name)
    ours = ours_of(theirs)
    tokens = torch.randint(61, (2, LENGTH))
    expected = theirs(tokens, use_cache=False).logits
    found = ours.logits(ours(tokens))
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "yarn"])
@torch.no_grad()
def test_tokens_are_generated_as_transformers_does(name: str) -> None:
    theirs = random_model(name)
    ours = ours_of(theirs)
    prompt = torch.randint(1, 61, (1, 11))  # 0 is padding, which transformers masks
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 11:]
    cache = make_cache(ours, 1, 40)
    hidden = prefill(ours, prompt.tolist(), cache, chunk_tokens=100)
    found = []
    for _ in range(20):
        token = ours.logits(hidden).argmax(-1)
        found.append(int(token))
        hidden = extend(ours, token[:, None], cache)[:, -1]
    assert found == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_back_again(name: str) -> None:
    """The architecture that transformers makes of what is written is the same, and so are the logits."""
    theirs = random_model(name)
    ours = ours_of(theirs)
    written = config_of(ours.config, training_length=theirs.config.max_position_embeddings)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written), attn_implementation="eager").eval()
    weights = {hub_name(key): value for key, value in ours.state_dict().items()}
    missing, unexpected = again.load_state_dict(weights, strict=False)
    assert not unexpected and all(is_alias(key, ours.config) for key in missing)
    again.tie_weights()
    assert architecture_of(again.config) == ours.config
    tokens = torch.randint(61, (1, LENGTH))
    torch.testing.assert_close(again(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "model_type is 'gpt2', which cannot be converted: expected one of llama, mistral"),
        ("llama", dict(hidden_act="gelu"), "hidden_act in config.json is 'gelu', .* expected 'silu'"),
        ("llama", dict(attention_bias=True), "attention_bias in config.json is True, .* expected False"),
        ("llama", dict(mlp_bias=True), "mlp_bias in config.json is True"),
        ("llama", dict(logit_scale=3.0), "logit_scale in config.json is 3.0, .* expected no such key"),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            r"layer_types is \['full_attention', 'sliding_attention', .* expected one kind of attention in all layers",
        ),
        (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                    original_max_position_embeddings=32,
                )
            ),
            "rope_type is 'longrope', which cannot be represented",
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
            "partial_rotary_factor of rope_parameters is 0.5",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_named(family: str, options: dict[str, Any], message: str) -> None:
    sizes = {} if family == "gpt2" else SIZES
    with pytest.raises(UsageError, match=message):
        architecture_of(AutoConfig.for_model(family, **{**sizes, **options}))


def network(**options: Any) -> ModelConfig:
    sizes: dict[str, Any] = dict(vocab_size=61, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    return ModelConfig(**{**sizes, "positions": "rope", "attention": AttentionConfig(kind="softmax"), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positions="nape"), "attention.kind softmax and positions nape is none of transformers' own"),
        (dict(attention=AttentionConfig(kind="ssmax")), "attention.kind ssmax and positions rope is none"),
        (dict(qkv_bias=True, qk_norm=True), "a model with qkv_bias and qk_norm is none of transformers' own"),
        (dict(nope_layers=[0], window=5), "a model with nope_layers and window is none"),
        (dict(qkv_bias=True, head_dim=16), "head_dim is 16 with qkv_bias"),
    ],
)
def test_what_transformers_lacks_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_of(network(**options), 64)


def test_unknown_weights_have_no_name() -> None:
    for name in ("model.layers.0.self_attn.sinks", "visual.weight", "model.layers.x.mlp.up_proj.weight"):
        with pytest.raises(KeyError):
            our_name(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="longrope", factor=2.0, original_length=8), "rope_scaling.kind: expected one of"),
        (dict(kind="yarn", factor=0.5, original_length=8), "rope_scaling.factor"),
        (dict(kind="linear", factor=2.0, original_length=8, attention_factor=1.1), "only yarn has one"),
        (dict(kind="llama3", factor=2.0, original_length=8, low_turns=5.0), "rope_scaling.high_turns"),
    ],
)
def test_scaling_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nope_layers=[2]), "nope_layers: expected layers from 0 to 1"),
        (dict(nope_layers=[0, 0]), "nope_layers"),
        (dict(positions="nope", nope_layers=[0]), "nope_layers: expected none for positions nope"),
        (
            dict(positions="nope", rope_scaling=RopeScaling("linear", 2.0, 8)),
            "rope_scaling: expected none for positions nope",
        ),
    ],
)
def test_positions_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)
