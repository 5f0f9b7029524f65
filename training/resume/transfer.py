"""A new run that starts from another run's weights: what may differ between the two, and what is new."""

from dataclasses import asdict

from torch import Tensor

from common.nested import flatten
from model.checkpoint import CheckpointInfo
from model.checksums import Verify
from model.config import TRAINED_SPARSE, ModelConfig
from model.loading import load_model
from model.transformer import Transformer
from training.tracking import say

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


def check_transfer(checkpoint: CheckpointInfo, network: ModelConfig) -> None:
    """Raises ValueError that names what keeps a model of config `network` from starting with these weights."""
    saved, wanted = _architectures(checkpoint, network)
    differing = [key for key in _differing(saved, wanted) if not keeps_weights(key)]
    if (saved["attention.kind"], wanted["attention.kind"]) in KIND_CHANGES:
        differing = [key for key in differing if key != "attention.kind" and not key.startswith(SIZES)]
        if checkpoint.architecture.feed_forward_size != network.feed_forward_size:
            differing.append("attention.dsa.equal_parameters")
    if "attention.kind" in differing:  # says enough
        differing = [key for key in differing if not key.startswith(SIZES)]
    if differing:
        listed = ", ".join(f"{key} {saved.get(key)!r} (config: {wanted.get(key)!r})" for key in differing)
        own = f"attention.{network.attention.kind}."
        free = sorted(key for key in FREE_KEYS if not key.startswith(SIZES) or key.startswith(own))
        unequal = "attention.dsa.equal_parameters" in differing
        way_out = " (give --model.network.attention.dsa.equal_parameters false)" if unequal else ""
        raise ValueError(
            f"--init_from {checkpoint.path} has weights for another model: its model.network has {listed}{way_out}; "
            f"only {', '.join(free)} may differ, and attention.kind may change from softmax to ssmax, "
            "dsa, dms or an entmax kind or from entmax to asentmax"
        )


def transfer_weights(checkpoint: CheckpointInfo, model: Transformer, verify: Verify = "checksum") -> dict[str, Tensor]:
    """Give `model` the checkpoint's weights, and say what has changed and what keeps its initial values. Learned alphas
    stay what they are, wherever the config's alpha starts.

    Returns what a model on the meta device has yet to be given, by name and mapped into memory; nothing where it has it
    already. Raises ValueError as check_transfer and load_model do.
    """
    check_transfer(checkpoint, model.config)
    saved, wanted = _architectures(checkpoint, model.config)
    source = load_model(checkpoint.path, verify=verify).model
    weights = dict(source.state_dict())
    for layer, (new, old) in enumerate(zip(model.layers(), source.layers(), strict=True)):
        if new.attention.alpha is not None and old.attention.alpha is not None:
            taken = new.attention.alpha.taken_over(old.attention.alpha)
            weights |= {} if taken is None else {f"blocks.{layer}.attention.alpha.alpha_raw": taken}
    own = [name for name, _ in model.named_parameters()]
    missing, dropped = [name for name in own if name not in weights], [name for name in weights if name not in own]
    deferred = model.embedding.weight.is_meta
    if not deferred:
        model.load_state_dict(weights, strict=False)
    say(f"starting from the weights of {checkpoint.path} (its step {checkpoint.step}): step 0, new optimizer and data")
    changed = [f"{key} {saved.get(key)} -> {wanted.get(key)}" for key in _differing(saved, wanted)]
    for what, found in (
        ("changed", changed),
        ("new, with initial values", _names(missing)),
        ("not taken over", _names(dropped)),
    ):
        if found:
            say(f"  {what}: {', '.join(found)}")
    return weights if deferred else {}


def _architectures(checkpoint: CheckpointInfo, network: ModelConfig) -> tuple[dict[str, object], dict[str, object]]:
    return flatten(asdict(checkpoint.architecture)), flatten(asdict(network))


def _differing(saved: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """Keys, of which a mapping that only one has (rope_scaling) gives one each."""
    return sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))


def _names(keys: list[str]) -> list[str]:
    """Parameter names without the number of their layer, each once."""
    return list(dict.fromkeys(".".join(part for part in key.split(".")[1:] if not part.isdigit()) for key in keys))
