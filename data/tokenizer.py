"""Opens a tokenizer, of either kind: the tokenizer.json of a model of the hub, or a SentencePiece model."""

from __future__ import annotations

import os
from pathlib import Path

from data.tokenizers.hub_tokenizer import HubTokenizer
from data.tokenizers.interface import Tokenizer
from data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizers.special_tokens import TOKENIZER_FILES, read_settings

__all__ = ["Tokenizer", "find_tokenizer_file", "load_tokenizer"]


def find_tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The tokenizer's file: `path`, or the first of TOKENIZER_FILES in a folder or run. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_file():
        return path
    names = " or ".join(TOKENIZER_FILES)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path} does not exist; expected a {names}, or a folder that has one")
    folders = (path, path / "tokenizer")  # a run that was converted keeps it there
    found = next((one / name for one in folders for name in TOKENIZER_FILES if (one / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"tokenizer {path} is a folder without {names}; expected one of them in it")
    return found


def load_tokenizer(
    path: str | os.PathLike[str], *, bos: str | None = None, eos: str | None = None, lossy: bool | None = None
) -> Tokenizer:
    """The tokenizer of a file whose name ends in .json, else of a SentencePiece model, or of a folder that has either.

    Args:
        bos, eos: contents of its special tokens, where tokenizer_config.json beside it does not say them; not for
            SentencePiece models, which have their own.
        lossy: take one that changes texts; None for what tokenizer_config.json says, which data.prepare writes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no tokenizer, one that changes texts, or bos or eos that it does not have.
    """
    file = find_tokenizer_file(path)
    settings = read_settings(file)
    lossy = settings.lossy if lossy is None else lossy
    if file.suffix == ".json":
        return HubTokenizer(file, settings, bos=bos, eos=eos, lossy=lossy)
    for name, given in (("bos", bos), ("eos", eos)):
        if given is not None:
            raise ValueError(f"tokenizer.{name} is {given!r}, but {file} is a SentencePiece model, which has its own")
    return SentencePieceTokenizer(file, lossy=lossy)
