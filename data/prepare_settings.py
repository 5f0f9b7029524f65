"""What data.prepare is asked for: its options, and which documents they take and hold out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator

from data.corpora import Corpus, Document
from data.tokenizer import find_tokenizer_file
from data.tokenizers.training import LEAST_VOCABULARY


@dataclasses.dataclass
class TokenizerConfig:
    """Tokenizer of the corpus: an existing model file, or one trained on a sample of the training split.

    Args:
        path: existing tokenizer: a tokenizer.json of the Hugging Face hub, a SentencePiece model, or a folder that has
            either (tokenizer.json first); None trains one. Corpora that are mixed must share one tokenizer
        bos: text of the token before each document, for a tokenizer.json; None for what tokenizer_config.json beside
            it says. For a model without bos name its eos
        eos: text of the token behind each document, likewise
        lossy: take a tokenizer that changes texts: what is trained on is what comes back. Bytes are those of the texts
        vocab_size: vocabulary of the trained tokenizer, bos, eos, unk and 256 byte pieces included
        sample_bytes: text the training sees at most
        scan_bytes: text read at most to draw the sample from
        split_by_unicode_script: False lets a piece join letters and punctuation: better for code, unusual for prose
    """

    path: str | None = None
    bos: str | None = None
    eos: str | None = None
    lossy: bool = False
    vocab_size: int = 32000
    sample_bytes: int = 32 * 2**20
    scan_bytes: int = 2 * 2**30
    split_by_unicode_script: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < LEAST_VOCABULARY:
            raise ValueError(f"tokenizer.vocab_size is {self.vocab_size}, expected at least {LEAST_VOCABULARY}")
        if self.path is not None:
            try:
                find_tokenizer_file(self.path)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"tokenizer.path is {self.path}, which does not exist or has none: expected a tokenizer.json of "
                    "the Hugging Face hub, a SentencePiece model, or a folder with either, such as a prepared corpus; "
                    "without tokenizer.path one is trained"
                ) from error
        given = {"bos": self.bos, "eos": self.eos, "lossy": self.lossy or None}
        for name, value in given.items():
            if self.path is None and value is not None:
                raise ValueError(
                    f"tokenizer.{name} is {value!r} without tokenizer.path: a tokenizer that is trained here has its "
                    "own bos and eos and is lossless; leave it out, or name a tokenizer"
                )
        for name in ("sample_bytes", "scan_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"tokenizer.{name} is {value}, expected at least 1")


@dataclasses.dataclass
class PrepareConfig:
    """What to prepare, and where.

    Args:
        corpus: reader of the documents
        output: folder of the prepared corpus
        tokenizer: tokenizer to use or to train
        heldout_groups: groups (packages) whose documents are held out; "torch" covers "torch/nn"
        heldout_fraction: share of the documents to hold out, chosen by a hash of their text, when no groups are named
        max_documents: read no more documents than this; None for all
        shard_bytes: text of a group of documents, so at most about this much per shard; a worker holds a few times it
        workers: processes that encode; None takes one per usable core
        overwrite: replace what an earlier run left in the output folder. It stays until the new corpus, prepared in
            OUTPUT/.replacement, is complete: disk space for both is needed. Stopped, the same command continues
    """

    corpus: Corpus
    output: str
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    heldout_groups: list[str] = dataclasses.field(default_factory=list)
    heldout_fraction: float = 0.0
    max_documents: int | None = None
    shard_bytes: int = 64 * 2**20
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; name a folder")
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction is {self.heldout_fraction}, expected a number in [0, 1)")
        if self.heldout_groups and self.heldout_fraction:
            raise ValueError("heldout_groups and heldout_fraction are both set; set one of them")
        limits = {"max_documents": 2**62, "shard_bytes": 2**34, "workers": max(64, 4 * (os.cpu_count() or 1))}
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} is {value}, expected at least 1 and at most {most}")


def in_group(group: str, name: str) -> bool:
    return group == name or group.startswith(name + "/")


def is_heldout(config: PrepareConfig, document: Document) -> bool:
    """By group, or by a hash of the text, so that equal documents are on one side."""
    if config.heldout_groups:
        return any(in_group(document.group, name) for name in config.heldout_groups)
    digest = hashlib.blake2b((document.text or "").encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < config.heldout_fraction * 2**64


def read_documents(config: PrepareConfig, skip: int) -> Iterator[Document]:
    stop = None if config.max_documents is None else max(config.max_documents - skip, 0)
    return itertools.islice(config.corpus.documents(skip), stop)


def check_heldout_groups(config: PrepareConfig) -> None:
    """Raises ValueError for a group that the corpus does not have."""
    known = sorted(config.corpus.groups()) if config.heldout_groups else []
    for name in config.heldout_groups:
        if any(in_group(group, name) for group in known):
            continue
        if not known:
            raise ValueError(
                f"heldout_groups names {name!r}, but the documents of {type(config.corpus).__name__} are in no groups: "
                "hold out some of them by heldout_fraction instead"
            )
        more = ", ..." * (len(known) > 5)
        raise ValueError(
            f"heldout_groups names {name!r}, which the corpus does not have: name some of {', '.join(known[:5])}{more}"
        )
