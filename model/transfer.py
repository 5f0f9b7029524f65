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
EQUAL_PARAMETERS = "attention.dsa.equal_parameters"
SIZES = tuple(f"attention.{kind}" for kind in TRAINED_SPARSE)


def keeps_weights(key: str) -> bool:
    """Whether a key of the flattened model config changes how the same weights are used, and not what they are."""
    return not FREE_KEYS.isdisjoint({key, key.split(".")[0]})


def differences(old: ModelConfig, new: ModelConfig) -> dict[str, tuple[object, object]]:
    """Old and new value by dotted key, of which a mapping that only one has (rope_scaling) gives one each."""
    saved, wanted = flatten(asdict(old)), flatten(asdict(new))
    values = {key: (saved.get(key), wanted.get(key)) for key in sorted(saved.keys() | wanted.keys())}
    return {key: (before, now) for key, (before, now) in values.items() if before != now}


def unlike_weights(old: ModelConfig, new: ModelConfig) -> dict[str, tuple[object, object]]:
    """The `differences` that keep a model `new` from starting with the weights of a model `old`."""
    every = differences(old, new)
    keys = [key for key in every if not keeps_weights(key)]
    if (old.attention.kind, new.attention.kind) in KIND_CHANGES:
        keys = [key for key in keys if key != "attention.kind" and not key.startswith(SIZES)]
        if old.feed_forward_size != new.feed_forward_size:
            keys.append(EQUAL_PARAMETERS)
    if "attention.kind" in keys:  # says enough
        keys = [key for key in keys if not key.startswith(SIZES)]
    return {key: every.get(key, (None, None)) for key in keys}
