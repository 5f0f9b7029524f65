"""Tokenizers of the Hugging Face hub: a tokenizer.json, read by the `tokenizers` library.

Ids are those of the library, without what its post-processor would add, cut off or fill up. Decoding joins the bytes of
the tokens; it does not use the library's decoder, which drops a leading space and joins words anew. So byte-level ones
(GPT-2, Llama 3, SmolLM2) are lossless, and those that put a space first (Llama 2) or compose characters (Qwen) are not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from common.files import read_json
from data.tokenizers.hub_content import bytes_of_pieces, fingerprint, special_contents, unknown_token
from data.tokenizers.interface import (
    PROBES,
    TAKE_IT_LOSSY,
    Tokenizer,
    check_is_utf8,
    first_planes,
    split_into_chunks,
)
from data.tokenizers.special_tokens import SETTINGS, TokenizerSettings

NO_TOKENIZER = "expected the tokenizer.json of a model of the Hugging Face hub"
LOSSLESS = f"use one of bytes, as GPT-2's or Llama 3's, or one that data.prepare trains, {TAKE_IT_LOSSY}"
# The library takes some 300 bytes a character. Longer texts are cut at newlines, where the tokenizer keeps them whole.
WHOLE_CHARACTERS = 2**20
MOST_SHOWN = 8  # tokens in a message


class HubTokenizer(Tokenizer):
    """Encode and decode with a tokenizer.json. Its fingerprint does not hang on how the file is written.

    settings: what tokenizer_config.json beside it says. bos, eos: contents of tokens, before what that says.
    Raises ValueError when it is no tokenizer, encodes at random, has no such bos or eos or, but for `lossy`, changes
    texts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: TokenizerSettings,
        *,
        bos: str | None = None,
        eos: str | None = None,
        lossy: bool = False,
    ) -> None:
        # Worker processes encode side by side; threads of the library besides only make them wait for each other.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path, self.lossy = Path(path), lossy
        content = read_json(self.path, NO_TOKENIZER, {"model": dict})
        self._library = self._open(content)
        ids = self._library.get_vocab(with_added_tokens=True)
        self._check_added(content, ids)
        self.vocab_size = 1 + max(ids.values(), default=-1)
        self._special = special_contents(content)
        self.bos_id, self.bos = self._find("bos", bos, settings.bos, ids)
        self.eos_id, self.eos = self._find("eos", eos, settings.eos, ids)
        # Special ones are plain text to encode_special_tokens, also those that only bos and eos make special.
        special = {*self._special, self.bos, self.eos}
        self._library.add_special_tokens([tokenizers.AddedToken(one, special=True) for one in (self.bos, self.eos)])
        self._library.encode_special_tokens = True
        self._piece_bytes = bytes_of_pieces(content, ids, self.vocab_size, {*special, unknown_token(content)})
        self.fingerprint = fingerprint(content, self.bos_id, self.eos_id)
        if not lossy:
            self._check_is_lossless(content)

    def _open(self, content: dict[str, Any]) -> tokenizers.Tokenizer:
        if content["model"].get("dropout"):
            raise ValueError(
                f"{self.path} has model.dropout {content['model']['dropout']}, so it encodes at random; set it to null"
            )
        try:
            library = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{self.path} is no tokenizer ({error}); {NO_TOKENIZER}") from error
        library.no_truncation()
        library.no_padding()
        return library

    def _check_added(self, content: dict[str, Any], ids: dict[str, int]) -> None:
        """The library numbers added tokens itself where the file's numbers do not follow the vocabulary."""
        for token in content.get("added_tokens") or []:
            if ids[token["content"]] != token["id"]:
                raise ValueError(
                    f"{self.path} has added token {token['content']!r} with id {token['id']}, where its vocabulary "
                    f"asks for {ids[token['content']]}: it is damaged; {NO_TOKENIZER}"
                )

    def _find(self, name: str, given: str | None, configured: str | None, ids: dict[str, int]) -> tuple[int, str]:
        """Id and content of bos or eos: the option's, else that of tokenizer_config.json."""
        file = self.path.with_name(SETTINGS)
        content = configured if given is None else given
        shown = ", ".join(map(repr, self._special[:MOST_SHOWN])) or "none"
        if content is None:
            said = f"{file} names no {name}_token" if file.is_file() else f"{file} does not exist"
            same = ", which may be the eos for a model without bos" if name == "bos" else ""
            raise ValueError(
                f"tokenizer {self.path} has no {name}: {said}; set tokenizer.{name} to the text of one of its tokens"
                f"{same} (its special ones: {shown})"
            )
        if content not in ids:
            source = f"{name}_token of {file}" if given is None else f"tokenizer.{name}"
            raise ValueError(
                f"{source} is {content!r}, which is no token of {self.path}; set tokenizer.{name} to the text of one "
                f"(its special ones: {shown})"
            )
        return ids[content], content

    def _check_is_lossless(self, content: dict[str, Any]) -> None:
        """Raises ValueError when a probe is given back changed, an added token among text, or any character of the
        first two planes."""
        probes = [
            *PROBES,
            *(f"x {token['content']} y{token['content']}" for token in content.get("added_tokens") or []),
        ]
        characters = "\n".join(first_planes())
        normalizer = self._library.normalizer
        spells_any = len({piece for piece in self._piece_bytes if len(piece) == 1}) == 256
        if not spells_any or (normalizer is not None and normalizer.normalize_str(characters) != characters):
            probes.append(characters)  # takes a second
        for probe in probes:
            self.check_round_trip(probe, self._encode_whole([probe])[0], LOSSLESS)

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode(self, text: str) -> list[int]:
        check_is_utf8(text)
        if self.lossy:  # what it adds or drops at ends it would at seams
            return self._encode_whole([text])[0]
        return [
            token for chunk in split_into_chunks(text, WHOLE_CHARACTERS) for token in self._encode_whole([chunk])[0]
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.lossy or max(map(len, texts), default=0) <= WHOLE_CHARACTERS:
            for text in texts:
                check_is_utf8(text)
            return self._encode_whole(texts)
        return super().encode_batch(texts)
