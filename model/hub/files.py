"""Files of weights as the hub has them."""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from model.checkpoint import share


def save_weights(weights: dict[str, Tensor], folder: Path, output: Path, shard_size: str) -> None:
    """model.safetensors in `folder`, or parts of at most shard_size with model.safetensors.index.json.

    output: what the folder will be called. Raises OSError where the disk refuses.
    """
    try:
        save_torch_state_dict(weights, folder, max_shard_size=shard_size)
    except SafetensorError as error:  # what the disk says, without a number
        raise OSError(f"{output} cannot be written ({error})") from error
    for path in folder.glob("*.safetensors"):
        share(path)
