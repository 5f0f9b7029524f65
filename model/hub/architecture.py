"""Architectures of transformers as ours, and back. What the other side cannot represent is an error that names it."""

import math
from collections.abc import Mapping
from typing import Any

from common.errors import UsageError
from longsplash.remote_code import AUTO_MAP, MODEL_TYPE
from model.config import AttentionConfig, ModelConfig, RopeScaling

FAMILIES = {  # transformers' model_type and class
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# Keys of their configs that become ours
REPRESENTED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "max_position_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers", "no_rope_layer_interval",
}  # fmt: skip
# Keys that change no logits: names, tokens (the tokenizer's), how to compute, start values, dropout in training
WITHOUT_EFFECT = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp",
    "auto_map", "_name_or_path", "_model_name_or_path", "id2label", "label2id", "name", "is_llama_config",
    "rope_interleaved", "transformers.js_config",
}  # fmt: skip
OF_ENTMAX = {  # keys of longsplash.hub's configs besides
    "alpha", "learn_alpha", "alpha_min", "alpha_max", "alpha_from", "alpha_progress", "adaptive_temperature",
    "temperature_offset", "temperature_range", "temperature_bias", "positions", "nape_slopes", "nope_layers",
    "qkv_bias", "qk_norm",
}  # fmt: skip
QKV_BIASED = ("qwen2",)
QK_NORMED = ("qwen3",)
DEFAULT_ROPE = {"rope_type", "rope_theta", "type"}
ROPE_KEYS = {  # rope_type: its keys besides
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def architecture_of(config: Any) -> ModelConfig:
    """Ours of a transformers config: a PreTrainedConfig of one of FAMILIES, whose attention is softmax, or of
    longsplash.hub.

    Raises UsageError that names what this code has no model for.
    """
    family = config.model_type
    if family not in (*FAMILIES, MODEL_TYPE):
        raise UsageError(f"model_type is {family!r}, which cannot be converted: expected one of {', '.join(FAMILIES)}")
    _refuse_unknown(config)
    layers = config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None)
    with_rope = getattr(config, "no_rope_layers", None) or [1] * layers  # 1 where a layer rotates
    base, scaling = _rope(config)
    softmax: dict[str, Any] = dict(
        positions="rope",
        nope_layers=[layer for layer, rotates in enumerate(with_rope) if not rotates],
        qkv_bias=family in QKV_BIASED,
        qk_norm=family in QK_NORMED,
        attention=AttentionConfig(kind="softmax"),
    )
    return ModelConfig(
        vocab_size=config.vocab_size,
        n_layers=layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_ff=config.intermediate_size,
        head_dim=head_dim if head_dim and head_dim * config.num_attention_heads != config.hidden_size else None,
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        init_std=config.initializer_range,
        window=_window(config),
        **(_of_entmax(config) if family == MODEL_TYPE else softmax),
    )


def _of_entmax(config: Any) -> dict[str, Any]:
    """What _entmax wrote, but for sizes and rotary positions. Raises UsageError for an alpha on its way."""
    if config.alpha_progress != 1:
        raise UsageError(
            f"alpha_progress in config.json is {config.alpha_progress}: its alpha was still on its way, which a run "
            "of step 0 has no place for; expected 1: convert an export of the run's end, or start from the run itself"
        )
    attention = AttentionConfig(
        kind="asentmax" if config.adaptive_temperature else "entmax",
        alpha=config.alpha,
        learn_alpha=config.learn_alpha,
        alpha_min=config.alpha_min,
        alpha_max=config.alpha_max,
        temperature_offset=config.temperature_offset,
        temperature_range=config.temperature_range,
        temperature_bias=config.temperature_bias,
    )
    same = ("positions", "nape_slopes", "qkv_bias", "qk_norm")
    return {key: getattr(config, key) for key in same} | {
        "nope_layers": list(config.nope_layers),
        "attention": attention,
    }


def _refuse_unknown(config: Any) -> None:
    """Raises UsageError for a key that is neither represented nor without effect, and is not what the family has."""
    usual = type(config)().to_dict()
    known = REPRESENTED | WITHOUT_EFFECT | (OF_ENTMAX if config.model_type == MODEL_TYPE else set())
    for key, value in config.to_dict().items():
        if key in known or value == usual.get(key) or value is None:
            continue
        if key == "quantization_config" and value.get("quant_method") == "gguf":  # read as plain numbers
            continue
        other = "expected no such key (remove it if it changes nothing)"
        expected = f"expected {usual[key]!r}" if key in usual else other
        raise UsageError(f"{key} in config.json is {value!r}, which cannot be represented: {expected}")


def _window(config: Any) -> int | None:
    """transformers' window counts the token itself, as ours does."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise UsageError(
            f"layer_types is {config.layer_types}, which cannot be represented: expected one kind of attention in all "
            "layers, full or sliding"
        )
    if kinds:
        return config.sliding_window if kinds == {"sliding_attention"} else None
    return config.sliding_window if config.model_type in ("mistral", MODEL_TYPE) else None


def _rope(config: Any) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Raises UsageError."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise UsageError(f"rope_type is {kind!r}, which cannot be represented: expected one of {', '.join(ROPE_KEYS)}")
    for key, value in parameters.items():
        whole = key == "partial_rotary_factor" and value == 1
        if key not in DEFAULT_ROPE | ROPE_KEYS[kind] and value is not None and not whole:
            raise UsageError(f"{key} of rope_parameters is {value!r}, which {kind} cannot represent: expected none")
    base = float(parameters["rope_theta"])
    if kind == "default":
        return base, None
    longest = config.max_position_embeddings
    original = longest if kind in ("linear", "dynamic") else parameters["original_max_position_embeddings"]
    given = parameters.get("factor")
    factor: float = longest / original if given is None else given  # without one, as DeepSeek
    options: dict[str, Any] = {}
    if kind == "llama3":
        options = {"low_turns": parameters["low_freq_factor"], "high_turns": parameters["high_freq_factor"]}
    elif kind == "yarn":
        options = {
            "low_turns": parameters.get("beta_slow") or 1.0,
            "high_turns": parameters.get("beta_fast") or 32.0,
            "attention_factor": _attention_factor(parameters, factor),
            "whole_pairs": parameters.get("truncate", True),
        }
    return base, RopeScaling(kind=kind, factor=factor, original_length=original, **options)


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's, from mscale and mscale_all_dim where both are given (DeepSeek's form)."""
    given = parameters.get("attention_factor")
    scales = [parameters.get(name) for name in ("mscale", "mscale_all_dim")]
    if given is not None or not all(scales):
        return given
    over, under = (0.1 * scale * math.log(factor) + 1 for scale in scales)  # type: ignore[operator]
    return over / under


def config_of(network: ModelConfig, training_length: int, annealed: float = 1.0) -> dict[str, Any]:
    """The content of a config.json of transformers, without the ids of its bos and eos. An entmax model's is of
    longsplash.hub, a softmax model's of one of FAMILIES.

    training_length: tokens of a training sequence. annealed: as in Transformer.

    Raises UsageError that names what no family has.
    """
    if network.attention.is_entmax:
        return _shared(network, training_length) | _entmax(network, annealed)
    return _shared(network, training_length) | _softmax(network)


def _shared(network: ModelConfig, training_length: int) -> dict[str, Any]:
    """What all families have."""
    return {
        "vocab_size": network.vocab_size,
        "hidden_size": network.d_model,
        "intermediate_size": network.d_ff,
        "num_hidden_layers": network.n_layers,
        "num_attention_heads": network.n_heads,
        "num_key_value_heads": network.n_kv_heads,
        "head_dim": network.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": network.norm_eps,
        "initializer_range": network.init_std,
        "tie_word_embeddings": network.tie_embeddings,
        "rope_parameters": _rope_parameters(network),
        "max_position_embeddings": _longest(network, training_length),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # families have ids of their own
    }


def _entmax(network: ModelConfig, annealed: float) -> dict[str, Any]:
    attention = network.attention
    return {
        "model_type": MODEL_TYPE,
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1]],
        "auto_map": AUTO_MAP,
        "sliding_window": network.window,
        "alpha": attention.alpha,
        "learn_alpha": attention.learn_alpha,
        "alpha_min": attention.alpha_min,
        "alpha_max": attention.alpha_max,
        "alpha_from": attention.anneal_from,
        "alpha_progress": annealed,
        "adaptive_temperature": attention.kind == "asentmax",
        "temperature_offset": attention.temperature_offset,
        "temperature_range": attention.temperature_range,
        "temperature_bias": attention.temperature_bias,
        "positions": network.positions,
        "nape_slopes": network.nape_slopes,
        "nope_layers": network.nope_layers,
        "qkv_bias": network.qkv_bias,
        "qk_norm": network.qk_norm,
    }


def _softmax(network: ModelConfig) -> dict[str, Any]:
    family = _family(network)
    content: dict[str, Any] = {"model_type": family, "architectures": [FAMILIES[family]]}
    if family == "mistral":
        content["sliding_window"] = network.window
    elif network.window is not None:  # Qwen's
        windowed = ["sliding_attention"] * network.n_layers
        content |= {"use_sliding_window": True, "sliding_window": network.window, "max_window_layers": 0}
        content["layer_types"] = windowed
    if family == "smollm3":
        content["no_rope_layers"] = [int(layer not in network.nope_layers) for layer in range(network.n_layers)]
    return content


def _family(network: ModelConfig) -> str:
    """transformers' model_type for what a model has, of which each family has one thing besides Llama's."""
    if network.attention.kind != "softmax" or network.positions != "rope":
        raise UsageError(
            f"a model of attention.kind {network.attention.kind} and positions {network.positions} is none of "
            "transformers' own: expected softmax and rope, or an entmax kind"
        )
    if network.qkv_bias and network.head_size * network.n_heads != network.d_model:
        raise UsageError(
            f"head_dim is {network.head_size} with qkv_bias, which no model of transformers has: expected d_model / "
            f"n_heads = {network.d_model / network.n_heads:g}"
        )
    wanted = {
        "qwen2": network.qkv_bias,
        "qwen3": network.qk_norm,
        "smollm3": bool(network.nope_layers),
        "mistral": network.window is not None and not network.qkv_bias and not network.qk_norm,
    }
    families = [family for family, has in wanted.items() if has]
    if len(families) > 1:
        names = {"qwen2": "qkv_bias", "qwen3": "qk_norm", "smollm3": "nope_layers", "mistral": "window"}
        parts = " and ".join(names[family] for family in families)
        raise UsageError(f"a model with {parts} is none of transformers' own: expected one of them")
    return families[0] if families else "llama"


def _rope_parameters(network: ModelConfig) -> dict[str, Any]:
    scaling = network.rope_scaling
    base: dict[str, Any] = {"rope_theta": network.rope_base}
    if scaling is None:
        return {"rope_type": "default", **base}
    parameters = {"rope_type": scaling.kind, **base, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.fast_turns}
    if scaling.kind == "yarn":
        parameters |= {
            "beta_slow": scaling.low_turns,
            "beta_fast": scaling.fast_turns,
            "truncate": scaling.whole_pairs,
            "attention_factor": scaling.attention_factor,
        }
    return {key: value for key, value in parameters.items() if value is not None}


def _longest(network: ModelConfig, training_length: int) -> int:
    """max_position_embeddings, from which "dynamic" takes the original length."""
    scaling = network.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return scaling.original_length
    return training_length
