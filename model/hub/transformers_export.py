"""Models as folders that transformers loads: weights under its names, config.json, tokenizer, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from common.errors import UsageError
from common.files import write_file, write_json
from common.new_folder import written_aside
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.hub_tokenizer import HubTokenizer
from data.tokenizers.special_tokens import SETTINGS
from longsplash.remote_code import CODE
from model.checkpoint import CheckpointInfo
from model.config import ModelConfig
from model.hub.architecture import config_of
from model.hub.files import save_weights
from model.hub.sentencepiece_json import tokenizer_json
from model.hub.weights import hub_name
from model.loading import stored_weights

IMPORT = "import longsplash.hub  # its code: pip install .[hub] in a checkout of LongSplash\n"


def export_for_transformers(found: CheckpointInfo, output: Path, dtype: torch.dtype, shard_size: str) -> int:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load; that of an
    entmax model after `import longsplash.hub`, or with trust_remote_code=True where longsplash is installed.

    found, output, dtype, shard_size: as in `model.export.export`; output is new.

    Returns the number of weights. Raises UsageError for a model or a tokenizer that transformers has none for, OSError
    where the disk refuses.
    """
    network, length = found.architecture, found.require(sequence_length=int)["sequence_length"]
    config = config_of(network, length, network.attention.annealed(found.step))
    tokenizer = _tokenizer(found)
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config["dtype"] = str(dtype).removeprefix("torch.")
    with written_aside(output) as aside:
        weights = {hub_name(name): tensor.to(dtype) for name, tensor in stored_weights(found).items()}
        save_weights(weights, aside, output, shard_size)
        write_json(aside / "config.json", config, indent=2)
        if network.attention.is_entmax:
            shutil.copyfile(CODE, aside / CODE.name)
        _write_tokenizer(tokenizer, aside, length)
        write_file(aside / "README.md", _card(found, network, config).encode())
    return sum(map(torch.numel, weights.values()))


def _tokenizer(found: CheckpointInfo) -> Tokenizer:
    """The checkpoint's own. Raises UsageError where it is gone or another."""
    said = found.tokenizer
    try:
        tokenizer = load_tokenizer(said["path"])
    except FileNotFoundError as error:
        raise UsageError(
            f"{found.path} was trained with tokenizer {said['path']}, which is gone: put it back"
        ) from error
    if tokenizer.fingerprint != said["fingerprint"]:
        raise UsageError(
            f"{said['path']} has fingerprint {tokenizer.fingerprint[:12]}, but {found.path} was trained with "
            f"{said['fingerprint'][:12]}: put back that tokenizer"
        )
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """tokenizer.json, and tokenizer_config.json that makes transformers use it as it is."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    settings |= {"clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, HubTokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
        settings |= {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "lossy": tokenizer.lossy}
    else:
        content, bos, eos = tokenizer_json(tokenizer)
        write_file(folder / "tokenizer.json", content.encode())
        settings |= {"bos_token": bos, "eos_token": eos, "split_special_tokens": True}  # names in a text are text
    write_json(folder / SETTINGS, settings, indent=2)


def _card(found: CheckpointInfo, network: ModelConfig, config: dict[str, Any]) -> str:
    """A model card: what it is and how it was made."""
    meta, entmax = found.meta, network.attention.is_entmax
    source = f" Weights came from {meta['source']}." if "source" in meta else ""
    trained = (
        f"{meta['tokens']:,} tokens in {found.step:,} steps"
        if isinstance(meta.get("tokens"), int) and found.step
        else "no steps of its own"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- longsplash
---
# {found.path.parent.parent.name if found.path.parent.name == "checkpoints" else found.path.name}

A {config["model_type"]} language model with {_attention(network)}, in {config["dtype"]}: {network.n_layers} layers of
width {network.d_model}, {network.n_heads} query and {network.n_kv_heads} key/value heads of {network.head_size}, a
vocabulary of {network.vocab_size:,}. It was trained on sequences of {meta["sequence_length"]:,} tokens. In
training with this code each document begins with `bos_token` and ends with `eos_token`.

**How it was made**: LongSplash (code version {meta.get("code_version", "unknown")}), {trained}.{source}

```python
{IMPORT if entmax else ""}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Its settings:

```json
{json.dumps(meta.get("settings", {}), indent=1, sort_keys=True)}
```
"""


def _attention(network: ModelConfig) -> str:
    """In words."""
    attention = network.attention
    if not attention.is_entmax:
        return "softmax attention"
    alpha = (
        f"alpha per head learned from {attention.alpha:g} on" if attention.learn_alpha else f"alpha {attention.alpha:g}"
    )
    temperature = " and the adaptive temperature of ASEntmax (arXiv:2506.16640)" if attention.kind == "asentmax" else ""
    return f"alpha-entmax attention ({alpha}){temperature}"
