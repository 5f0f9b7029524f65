"""Which models can start from another's weights: what of the architecture may differ."""

from dataclasses import asdict

from common.nested import flatten
from model.config import TRAINED_SPARSE, ModelConfig

# Keys of the model config that may differ from the checkpoint's: they change how the same weights are used.
FREE_KEYS = {"rope_base", "rope_scaling", "window"} | {
    f"attention.{key}"
    for key in (
        "alpha", "learn_alpha", "alpha_min", "alpha_max", "anneal_steps", "anneal_from", "temperature_offset",
        "temperature_range", "temperature_bias", "backend", "nsa.select_count", "nsa.select_local", "nsa.window",
        "dsa.select_tokens", "dsa.stage", "dsa.freeze", "dsa.loss_weight", "dms.window", "dms.compression",
        "dms.ramp_steps", "dms.loss_weight", "hierarchical.block",
    )
}  # fmt: skip
# (old, new) attention kinds where the new one uses every weight of the old one.
KIND_CHANGES = {
    ("softmax", "ssmax"),
    ("softmax", "entmax"),
    ("softmax", "asentmax"),
    ("softmax", "dsa"),
    ("softmax", "dms"),
    ("entmax", "asentmax"),
}

SIZES = tuple(f"attention.{kind}" for kind in TRAINED_SPARSE)


def keeps_weights(key: str) -> bool:
    """Whether a key of the flattened model config changes how the same weights are used, and not what they are."""
    return not FREE_KEYS.isdisjoint({key, key.split(".")[0]})


def flat(network: ModelConfig) -> dict[str, object]:
    """Its settings by dotted key."""
    return flatten(asdict(network))


def differing_keys(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Of which a mapping that only one has (rope_scaling) gives one each."""
    saved, wanted = flat(old), flat(new)
    return sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))


def unlike_weights(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Keys that keep a model `new` from starting with the weights of a model `old`."""
    differing = [key for key in differing_keys(old, new) if not keeps_weights(key)]
    if (old.attention.kind, new.attention.kind) in KIND_CHANGES:
        differing = [key for key in differing if key != "attention.kind" and not key.startswith(SIZES)]
        if old.feed_forward_size != new.feed_forward_size:
            differing.append("attention.dsa.equal_parameters")
    if "attention.kind" in differing:  # says enough
        differing = [key for key in differing if not key.startswith(SIZES)]
    return differing
