"""What every tokenizer does, whatever kind of file it comes from, and the texts that it must give back."""

from __future__ import annotations

import os
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SPACE_MARK = "\u2581"  # what SentencePiece and its descendants write for a space
# SentencePiece's time per character grows with the length given to it at once (5x from 100 KB to 10 MB), so longer
# texts are encoded in chunks that end at a newline. Texts up to this length are encoded whole.
CHUNK_CHARACTERS = 32768
# Texts that a tokenizer must give back. Of the last two, encoded in chunks, one has the seam inside spaces, the other
# behind a newline.
PROBES = (
    "def f(x):\n    return  1\n", " x", "x ", "", " ", "  ", "a  b   c", "\t\tx\t y", "\n\n\n", "a\r\nb\rc",
    "A\0b\x01\x7f\x85c", "e\u0301 \u212b \ufb01 \xbd \uff21 \u3000\xa0x", "\ufeffx\u200b\u200d\u2028y",
    "\U0001f469\u200d\U0001f680 \U0010ffff", "\u2581 \u2581", "<s></s><unk><0x0A>", string.printable, " " * 40,
    "a" * (CHUNK_CHARACTERS - 2) + "     b", "a b\n" * (CHUNK_CHARACTERS // 4) + " c",
)  # fmt: skip
TAKE_IT_LOSSY = (
    "or, to train on what comes back, set tokenizer.lossy: true where the corpus is prepared (bytes are then counted "
    "in the texts themselves)"
)


def split_into_chunks(text: str, limit: int) -> Iterator[str]:
    """Cut `text` into consecutive chunks of at most `limit` characters, after the last newline that fits, if any."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def first_planes() -> str:
    """Every character of the first two planes but the surrogates."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))


def check_is_utf8(text: str) -> None:
    """Raises ValueError on lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}: not UTF-8; remove it") from error


class Tokenizer(ABC):
    """Text to token ids and back. `data.tokenizer.load_tokenizer` opens one.

    Decoding joins the bytes of the tokens, so that the parts of a sequence decode to the parts of its text.

    Attributes:
        path: the file.
        fingerprint: sha256 hex, equal for tokenizers that encode alike and have the same bos and eos.
        vocab_size: every id is below it.
        bos_id, eos_id: every tokenizer has both, they may be the same. `encode` gives neither.
        lossy: texts may come back changed, which tokenizer.lossy of data.prepare has allowed: how many bytes a text has
            is then counted in the text, not in its tokens.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    lossy: bool
    _piece_bytes: list[bytes]  # of each id

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos; names of special tokens in it are plain text.

        Raises ValueError on lone surrogates (not UTF-8).
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens and unk give nothing. Bytes cut inside a character give U+FFFD.

        Raises ValueError for an id outside [0, vocab_size).
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one token adds to a text, which may be part of a character; none for special ones and unk.

        Raises ValueError for an id outside [0, vocab_size).
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside [0, {self.vocab_size}) of tokenizer {self.path}")
        return self._piece_bytes[token]

    def check_round_trip(self, text: str, ids: Sequence[int], way_out: str) -> None:
        """Raises ValueError, which shows where, when `ids` do not decode to `text`. way_out: ends the message."""
        if b"".join([self._piece_bytes[i] for i in ids]) == text.encode():
            return
        back = self.decode(ids)
        same = len(os.path.commonprefix([text, back]))
        start = max(0, same - 20)
        where = f" (from character {start})" if start else ""
        raise ValueError(
            f"tokenizer {self.path} changes text: {text[start : same + 30]!r}{where} comes back as "
            f"{back[start : same + 30]!r}; {way_out}"
        )
