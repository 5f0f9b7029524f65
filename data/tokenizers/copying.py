"""A tokenizer in the folder of a prepared corpus: a copy of its file, and what is said of it beside."""

from __future__ import annotations

import hashlib
from pathlib import Path

from common.files import write_file
from data.tokenizer import Tokenizer
from data.tokenizers.hub_tokenizer import HubTokenizer
from data.tokenizers.special_tokens import SETTINGS, TOKENIZER_FILES, TokenizerSettings


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes it into `folder` so that load_tokenizer(folder) opens the same. The tokenizer's own file comes last."""
    from_hub, model = TOKENIZER_FILES
    if isinstance(tokenizer, HubTokenizer):
        name, settings = from_hub, TokenizerSettings(tokenizer.bos, tokenizer.eos, tokenizer.lossy)
    else:
        name, settings = model, TokenizerSettings(lossy=tokenizer.lossy)
    if settings != TokenizerSettings():
        write_file(folder / SETTINGS, settings.to_bytes())
    write_file(folder / name, tokenizer.path.read_bytes())


def digests(folder: Path) -> dict[str, str]:
    """sha256 hex of each file of the tokenizer in `folder`, by name."""
    paths = [folder / name for name in (*TOKENIZER_FILES, SETTINGS)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}
