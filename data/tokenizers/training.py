"""Training a SentencePiece tokenizer that is lossless on every UTF-8 string."""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import math
import os
import re
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from common.files import write_file
from data.tokenizers.interface import SPACE_MARK, split_into_chunks

TRAINING_LINE_CHARACTERS = 4096
# Characters that become pieces unless they fall among the rarest ones of the corpus, which COVERAGE leaves to bytes.
# The space never does: not losing it depends on its piece.
ALWAYS_PIECES = " \n\t" + string.digits + string.ascii_letters + string.punctuation
COVERAGE = 0.9995
LEAST_VOCABULARY = 3 + 256 + 1  # unk, bos and eos, the bytes, the space


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
