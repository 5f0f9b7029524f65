"""What stands in a tokenizer.json: which bytes its tokens are, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from data.tokenizers.interface import SPACE_MARK

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
DECISIVE = ("normalizer", "pre_tokenizer", "model", "decoder")  # of the parts; added_tokens too


def byte_alphabet() -> dict[str, int]:
    """Byte of each character that GPT-2 writes bytes with: printable ones of Latin-1 stand for themselves, the others
    for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _types(part: Any) -> set[str]:
    """The types of a part of the pipeline and of all within it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | _types(list(part.values()))


def special_contents(content: Mapping[str, Any]) -> list[str]:
    return [token["content"] for token in content.get("added_tokens") or [] if token.get("special")]


def unknown_token(content: Mapping[str, Any]) -> str | None:
    """What stands for text that no token spells."""
    model = content["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    unknown: str | None = model.get("unk_token")
    return unknown


def bytes_of_pieces(
    content: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int, silent: Collection[str | None]
) -> list[bytes]:
    """UTF-8 bytes that each id adds to a text. ids: of all tokens. silent: tokens that add nothing."""
    model = content["model"]
    pipeline = [content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    alphabet = byte_alphabet() if "ByteLevel" in _types(pipeline) else {}
    has_mark = SPACE_MARK in json.dumps(pipeline, ensure_ascii=False)
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    added = {token["content"] for token in content.get("added_tokens") or []}

    def spelled(piece: str) -> bytes:
        if piece in silent:
            return b""
        if piece in added:
            return piece.encode()
        if alphabet and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if model.get("byte_fallback") and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if prefix:
            return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else b" " + piece.encode()
        if suffix and piece.endswith(suffix):
            piece = piece.removesuffix(suffix) + " "
        return (piece.replace(SPACE_MARK, " ") if has_mark else piece).encode()

    pieces = [b""] * vocab_size
    for piece, token in ids.items():
        pieces[token] = spelled(piece)
    return pieces


def fingerprint(content: Mapping[str, Any], bos_id: int, eos_id: int) -> str:
    """sha256 hex over what decides the ids of a text and the text of ids.

    The post-processor, truncation and padding are not used, options that are off may be absent, and merges are written
    as pairs or as two texts with a space: files that differ in those are the same.
    """
    model = {key: value for key, value in content["model"].items() if value not in (None, False)}
    if "merges" in model:
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    parts = {part: content.get(part) for part in DECISIVE} | {"model": model}
    added = sorted(content.get("added_tokens") or [], key=lambda token: token["id"])
    decisive = {**parts, "added_tokens": added, "bos": bos_id, "eos": eos_id}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
