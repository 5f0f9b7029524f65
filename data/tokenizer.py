"""SentencePiece tokenizer that is lossless on every UTF-8 string.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) writes a space as U+2581, so a U+2581 of the text would
come back as a space. Here such a character never reaches SentencePiece: it is stored as its three byte pieces
<0xE2><0x96><0x81>. No other text gives those ids, because the piece for a space always exists, so the mapping is
injective and costs nothing elsewhere. Decoding joins the bytes of the pieces; it does not use SentencePiece's decoder.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import math
import os
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from common.files import write_file

SPACE_MARK = "\u2581"
# Time per character grows with the length given to SentencePiece at once (5x from 100 KB to 10 MB), so longer texts
# are encoded in chunks that end at a newline. Texts up to this length are encoded whole.
CHUNK_CHARACTERS = 32768
TRAINING_LINE_CHARACTERS = 4096
# Characters that become pieces unless they fall among the rarest ones of the corpus, which COVERAGE leaves to bytes.
# The space never does: not losing it depends on its piece.
ALWAYS_PIECES = " \n\t" + string.digits + string.ascii_letters + string.punctuation
COVERAGE = 0.9995
LEAST_VOCABULARY = 3 + 256 + 1  # unk, bos and eos, the bytes, the space
# Texts that a tokenizer must give back. Of the last two, encoded in chunks, one has the seam inside spaces, the other
# behind a newline.
PROBES = (
    "def f(x):\n    return  1\n", " x", "x ", "", " ", "  ", "a  b   c", "\t\tx\t y", "\n\n\n", "a\r\nb\rc",
    "A\0b\x01\x7f\x85c", "e\u0301 \u212b \ufb01 \xbd \uff21 \u3000\xa0x", "\ufeffx\u200b\u200d\u2028y",
    "\U0001f469\u200d\U0001f680 \U0010ffff", "\u2581 \u2581", "<s></s><unk><0x0A>", string.printable, " " * 40,
    "a" * (CHUNK_CHARACTERS - 2) + "     b", "a b\n" * (CHUNK_CHARACTERS // 4) + " c",
)  # fmt: skip
LOSSLESS = (
    "use one that data.prepare trains, or train it with normalization_rule_name identity, add_dummy_prefix false and "
    "remove_extra_whitespaces false"
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


class Tokenizer:
    """Encode and decode with a SentencePiece model file trained by `train_tokenizer`.

    Attributes: path (Path), fingerprint (sha256 hex of the model file), vocab_size, bos_id, eos_id (int).
    Raises FileNotFoundError when the file is missing, ValueError when it is no SentencePiece model with byte fallback
    or one that changes texts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
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
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._piece_bytes = [self._bytes_of_piece(i) for i in range(self.vocab_size)]
        self._check_pieces()
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
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
        if byte_pieces != 256 or not has_space or min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                f"tokenizer {self.path} has {byte_pieces} byte pieces, space piece: {has_space}, bos {self.bos_id}, "
                f"eos {self.eos_id}; expected 256 byte pieces, a space piece, bos and eos: use one that data.prepare "
                "trains"
            )

    def _check_is_lossless(self) -> None:
        """Raises ValueError when a probe is given back changed, or any character of the first two planes."""
        for probe in PROBES:
            self.check_round_trip(probe, self.encode(probe), LOSSLESS)
        characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))
        if self._processor.normalize(characters) != characters.replace(" ", SPACE_MARK):
            for character in characters:
                self.check_round_trip(f"x{character}y", self.encode(f"x{character}y"), LOSSLESS)

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

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos. Raises ValueError on lone surrogates (not UTF-8)."""
        ids: list[int] = []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at character {error.start}: not UTF-8; remove it") from error
        for chunk in split_into_chunks(text, CHUNK_CHARACTERS):
            if SPACE_MARK in chunk:
                for part in re.split(f"({SPACE_MARK})", chunk):
                    ids += self._space_mark_ids if part == SPACE_MARK else self._processor.encode(part)
            else:
                ids += self._processor.encode(chunk)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bos, eos and unk give nothing. Bytes cut inside a character give U+FFFD.

        Raises ValueError for an id outside [0, vocab_size).
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one token adds to a text, which may be part of a character; none for bos, eos and unk.

        Raises ValueError for an id outside [0, vocab_size).
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside [0, {self.vocab_size}) of tokenizer {self.path}")
        return self._piece_bytes[token]


def sample_lines(texts: Iterable[str], sample_bytes: int, scan_bytes: int) -> list[str]:
    """A sample of at most `sample_bytes` from the first `scan_bytes` of the texts, independent of their order.

    Texts are cut into runs of lines of about 4 KB; those with the smallest hash are kept, so memory stays within the
    sample. Equal runs are kept once.
    """
    kept: dict[int, str] = {}
    heap: list[int] = []  # negated hashes: the largest hash comes out first
    kept_bytes = scanned = 0
    for text in texts:
        for line in split_into_chunks(text, TRAINING_LINE_CHARACTERS):
            raw = line.encode()
            priority = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
            if priority in kept or (kept_bytes >= sample_bytes and priority > -heap[0]):
                continue
            kept[priority] = line
            heapq.heappush(heap, -priority)
            kept_bytes += len(raw)
            while kept_bytes > sample_bytes:
                kept_bytes -= len(kept.pop(-heapq.heappop(heap)).encode())
        scanned += len(text.encode())
        if scanned >= scan_bytes:
            break
    return [kept[priority] for priority in sorted(kept)]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_path: str | os.PathLike[str],
    *,
    sample_bytes: int,
    scan_bytes: int,
    split_by_unicode_script: bool,
) -> None:
    """Train a BPE model on a bounded sample of `texts` and write it to `model_path` (complete or absent).

    BPE, not unigram: on 11 MB of Python sources it gives 3 to 5 % more bytes per token and trains in 2 s, not 50 s.
    Identity normalisation, no dummy prefix, whitespace runs and newlines kept, digits split, byte fallback.
    split_by_unicode_script: False lets a piece join letters and punctuation, 8 to 17 % more bytes per token on code.
    Raises ValueError, which says what size would fit, when the sample cannot give `vocab_size` pieces.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise ValueError(f"tokenizer.vocab_size is {vocab_size}, expected at least {LEAST_VOCABULARY}")
    texts = iter(texts)
    first = list(itertools.islice(texts, 1))
    if not first:
        raise ValueError("cannot train a tokenizer: the training split of the corpus has no text")
    sample = sample_lines(itertools.chain(first, texts), sample_bytes, scan_bytes)
    if not sample:
        raise ValueError(
            f"tokenizer.sample_bytes is {sample_bytes}, which holds no run of lines of the text: expected at least "
            f"{4 * TRAINING_LINE_CHARACTERS}"
        )
    # U+2581 never reaches SentencePiece in encode, so neither here. Only characters that occur can become pieces.
    lines = [part for line in sample for part in line.split(SPACE_MARK) if part] + [ALWAYS_PIECES]
    lines += [" "] * _missing_spaces(lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_unicode_script=split_by_unicode_script,
            character_coverage=COVERAGE,
            required_chars=ALWAYS_PIECES.replace(" ", SPACE_MARK),
            max_sentence_length=4 * TRAINING_LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise _no_such_vocabulary(vocab_size, sum(map(len, sample)), str(error)) from error
    write_file(Path(model_path), model.getvalue())


def _missing_spaces(lines: list[str]) -> int:
    """Spaces to add so that the space is not among the rarest characters, which SentencePiece drops to reach COVERAGE
    even where they are required_chars: after DNA or base64 there would be none. Lines of one space form no pairs."""
    total, spaces = sum(map(len, lines)), sum(line.count(" ") for line in lines)
    rare = 1 - COVERAGE
    return math.ceil((rare * total - spaces) / (1 - rare)) + 1 if spaces <= rare * total else 0


def _no_such_vocabulary(vocab_size: int, characters: int, message: str) -> ValueError:
    """What SentencePiece's message about a vocabulary means for whoever runs data.prepare."""
    start = f"tokenizer.vocab_size {vocab_size} is"
    if most := re.search(r"size too high .* a value <= (\d+)", message):
        return ValueError(
            f"{start} too large for a sample of {characters} characters, which gives at most {most[1]} pieces; set "
            f"tokenizer.vocab_size to {most[1]} or less, or give more text"
        )
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return ValueError(f"{start} too small for the characters of the corpus, expected at least {least[1]}")
    if vocab_size >= 2**31:
        return ValueError(f"{start} too large, expected less than 2147483648")
    return ValueError(f"{start} no size that a sample of {characters} characters can be trained to ({message})")
