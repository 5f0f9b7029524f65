"""Run folders of step 0 around weights that no training of ours has made."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from data.tokenizer import Tokenizer, find_tokenizer_file
from data.tokenizers.copying import copy_tokenizer
from model.checkpoint import NETWORK, STATE_FILE, TOKENIZER_FOLDER, WEIGHT, checkpoint_folder, share, write_complete
from model.config import ModelConfig
from model.version import code_version

FILE_BYTES = 4 * 2**30  # of a file of weights


def write_run(
    aside: Path,
    output: Path,
    network: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    *,
    length: int,
    source: str,
) -> tuple[Path, int]:
    """Fills a new folder with a checkpoint of step 0, the tokenizer and NETWORK.

    Args:
        aside, output: the folder, and what it will be called.
        weights: all parameters of `network` by name; written in float32.
        length: tokens of a training sequence.
        source: where the weights come from, in words or as a path.

    Returns: the checkpoint's folder in `aside`, and the number of weights.
    """
    (aside / TOKENIZER_FOLDER).mkdir()
    copy_tokenizer(tokenizer, aside / TOKENIZER_FOLDER)
    name = find_tokenizer_file(aside / TOKENIZER_FOLDER).name
    folder = checkpoint_folder(aside, 0)
    folder.mkdir(parents=True)
    total = 0
    for number, part in enumerate(_parts(weights)):
        path = folder / STATE_FILE.format(number)
        save_file(part, path)
        share(path)
        total += sum(map(torch.numel, part.values()))
    meta = {  # as training writes it into a checkpoint's marker, of a run that has seen nothing
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "model": asdict(network),
        "tokenizer": {
            "path": str(output.resolve() / TOKENIZER_FOLDER / name),
            "fingerprint": tokenizer.fingerprint,
        },
        "sequence_length": length,
        "source": source,
        "code_version": code_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_complete(folder, meta)
    (aside / NETWORK).write_text(yaml.safe_dump({"model": {"network": asdict(network)}}, sort_keys=False))
    return folder, total


def _parts(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Files of at most FILE_BYTES (or one tensor), float32."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if part and size + 4 * tensor.numel() > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[WEIGHT + name] = tensor.detach().float().contiguous()
        size += 4 * tensor.numel()
    yield part
