"""A new run that starts from another run's weights: what may differ between the two, and what is new."""

from torch import Tensor

from model.checkpoint import CheckpointInfo
from model.checksums import Verify
from model.config import ModelConfig
from model.loading import load_model
from model.transfer import EQUAL_PARAMETERS, FREE_KEYS, SIZES, differences, unlike_weights
from model.transformer import Transformer
from training.tracking import say


def check_transfer(checkpoint: CheckpointInfo, network: ModelConfig) -> None:
    """Raises ValueError that names what keeps a model of config `network` from starting with these weights."""
    if differing := unlike_weights(checkpoint.architecture, network):
        listed = ", ".join(f"{key} {saved!r} (config: {wanted!r})" for key, (saved, wanted) in differing.items())
        own = f"attention.{network.attention.kind}."
        free = sorted(key for key in FREE_KEYS if not key.startswith(SIZES) or key.startswith(own))
        way_out = f" (give --model.network.{EQUAL_PARAMETERS} false)" if EQUAL_PARAMETERS in differing else ""
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
    differing = differences(checkpoint.architecture, model.config)
    changed = [f"{key} {saved} -> {wanted}" for key, (saved, wanted) in differing.items()]
    for what, found in (
        ("changed", changed),
        ("new, with initial values", _names(missing)),
        ("not taken over", _names(dropped)),
    ):
        if found:
            say(f"  {what}: {', '.join(found)}")
    return weights if deferred else {}


def _names(keys: list[str]) -> list[str]:
    """Parameter names without the number of their layer, each once."""
    return list(dict.fromkeys(".".join(part for part in key.split(".")[1:] if not part.isdigit()) for key in keys))
