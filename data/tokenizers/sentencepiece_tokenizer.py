"""SentencePiece models; those that data.prepare trains are lossless on every UTF-8 string.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) writes a space as U+2581, so a U+2581 of the text would
come back as a space. Here such a character never reaches SentencePiece: it is stored as its three byte pieces
<0xE2><0x96><0x81>. No other text gives those ids, because the piece for a space always exists, so the mapping is
injective and costs nothing elsewhere. Decoding joins the bytes of the pieces; it does not use SentencePiece's decoder.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import sentencepiece

from data.tokenizers.interface import (
    CHUNK_CHARACTERS,
    PROBES,
    SPACE_MARK,
    TAKE_IT_LOSSY,
    Tokenizer,
    check_is_utf8,
    first_planes,
    split_into_chunks,
)

LOSSLESS = (
    "use one that data.prepare trains, or train it with normalization_rule_name identity, add_dummy_prefix false and "
    f"remove_extra_whitespaces false, {TAKE_IT_LOSSY}"
)


class SentencePieceTokenizer(Tokenizer):
    """Encode and decode with a SentencePiece model file. Its fingerprint is the sha256 of the file.

    lossy: take one that changes texts. It encodes as SentencePiece does: no chunks, whose seams it may change too.
    Raises FileNotFoundError when the file is missing, ValueError when it is no SentencePiece model, has no bos or eos
    or, but for `lossy`, lacks byte fallback or changes texts.
    """

    def __init__(self, path: str | os.PathLike[str], *, lossy: bool = False) -> None:
        self.path, self.lossy = Path(path), lossy
        if not self.path.is_file():
            raise FileNotFoundError(
                f"tokenizer model {self.path} does not exist; expected the tokenizer.model of a prepared corpus"
            )
        model = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a SentencePiece model; prepare the corpus again") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self._piece_bytes = [self._bytes_of_piece(i) for i in range(self.vocab_size)]
        self._check_pieces()
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        if not lossy:
            self._check_is_lossless()

    def _bytes_of_piece(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    def _check_pieces(self) -> None:
        byte_pieces = sum(self._processor.is_byte(i) for i in range(self.vocab_size))
        has_space = self._processor.piece_to_id(SPACE_MARK) != self._processor.unk_id()
        if min(self.bos_id, self.eos_id) < 0 or not (self.lossy or (byte_pieces == 256 and has_space)):
            raise ValueError(
                f"tokenizer {self.path} has {byte_pieces} byte pieces, space piece: {has_space}, bos {self.bos_id}, "
                f"eos {self.eos_id}; expected 256 byte pieces, a space piece, bos and eos: use one that data.prepare "
                "trains"
            )

    def _check_is_lossless(self) -> None:
        """Raises ValueError when a probe is given back changed, or any character of the first two planes."""
        for probe in PROBES:
            self.check_round_trip(probe, self.encode(probe), LOSSLESS)
        characters = first_planes()
        if self._processor.normalize(characters) != characters.replace(" ", SPACE_MARK):
            for character in characters:
                self.check_round_trip(f"x{character}y", self.encode(f"x{character}y"), LOSSLESS)

    def encode(self, text: str) -> list[int]:
        check_is_utf8(text)
        if self.lossy:
            return list(self._processor.encode(text))
        ids: list[int] = []
        for chunk in split_into_chunks(text, CHUNK_CHARACTERS):
            if SPACE_MARK in chunk:
                for part in re.split(f"({SPACE_MARK})", chunk):
                    ids += self._space_mark_ids if part == SPACE_MARK else self._processor.encode(part)
            else:
                ids += self._processor.encode(chunk)
        return ids
