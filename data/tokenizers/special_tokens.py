"""What tokenizer_config.json beside a tokenizer says of it: bos, eos, and whether it may change texts.

Models of the hub come with such a file. data.prepare writes one beside the tokenizer.json of a corpus, and beside a
tokenizer.model that changes texts: {"bos_token": TEXT, "eos_token": TEXT, "lossy": BOOLEAN}.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from common.files import read_json, to_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # where a folder has both, as transformers: the first
SETTINGS = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """bos, eos: contents of the tokens; None where the file names none. lossy: texts may come back changed."""

    bos: str | None = None
    eos: str | None = None
    lossy: bool = False

    def to_bytes(self) -> bytes:
        return to_json({"bos_token": self.bos, "eos_token": self.eos, "lossy": self.lossy})


def read_settings(tokenizer: Path) -> TokenizerSettings:
    """Of the file beside a tokenizer; its defaults where there is none. Raises ValueError for one that is damaged."""
    path = tokenizer.with_name(SETTINGS)
    if not path.is_file():
        return TokenizerSettings()
    content = read_json(path, "put back the one that came with the tokenizer")
    lossy = content.get("lossy", False)
    if not isinstance(lossy, bool):
        raise ValueError(f"{path} has lossy {lossy!r}, expected true or false")
    return TokenizerSettings(_content(content, "bos_token", path), _content(content, "eos_token", path), lossy)


def _content(settings: dict[str, Any], key: str, path: Path) -> str | None:
    """A token is written as its content, or as an object that has it beside options of its own."""
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{path} has {key} {settings[key]!r}, expected the text of a token, or an object with content")
    return token
