"""The prepared corpora of a run: opened, checked against one another, and packed into sequences."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.packing import Packing
from data.store import TokenStore, Verify, read_manifest
from data.tokenizer import load_tokenizer


@dataclass
class SourceConfig:
    """A prepared corpus in the mixture; see data.packing.Packing for what the numbers mean exactly.

    Args:
        path: folder that data.prepare wrote (with train/, heldout/, manifest.json)
        weight: share of the sequences, relative to the other sources
        length_buckets: lower bound of a document's tokens -> factor; {0: 1.0, 8192: 2.0} shows each token of documents
            of at least 8192 tokens twice as often as the others; factor 0 leaves documents out
    """

    path: str
    weight: float = 1.0
    length_buckets: dict[int, float] = field(default_factory=lambda: {0: 1.0})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight of source {self.path} is {self.weight}, expected a number above 0")
        bounds, factors = sorted(self.length_buckets), self.length_buckets.values()
        if not bounds or bounds[0] != 0:
            raise ValueError(
                f"length_buckets of source {self.path} are {self.length_buckets}, expected a bucket from 0 on"
            )
        if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or not any(factors):
            raise ValueError(
                f"length_buckets of source {self.path} are {self.length_buckets}, expected factors >= 0, one above 0"
            )


class Mixture:
    """Sequences of `sequence_length` tokens from prepared corpora. See data.packing.Packing for the packing.

    sources: at least one; all prepared with one tokenizer. seed: of the order. verify: how `prepare` checks shards.
    heldout: open the held-out splits too, where there are any.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        sequence_length: int,
        seed: int,
        intra_document: bool,
        verify: Verify,
        heldout: bool,
    ) -> None:
        self.sources = sources
        self.sequence_length, self.seed, self.intra_document = sequence_length, seed, intra_document
        self.verify, self.heldout = verify, heldout
        self._stores: dict[str, list[TokenStore]] = {}

    def prepare(self) -> None:
        """Verify every shard and the tokenizer. Raises as `open`."""
        for source in self.sources:
            for split in self._splits_of(source):
                store = TokenStore(Path(source.path) / split, verify=self.verify)
            load_tokenizer(store.tokenizer_path)  # refuses one that changes text, where that was not allowed

    def open(self) -> None:
        """Open the corpora. Raises FileNotFoundError or ValueError for missing, damaged or mismatching ones."""
        if self._stores:
            return
        stores: dict[str, list[TokenStore]] = {"train": [], "heldout": []}
        for source in self.sources:
            for split in self._splits_of(source):
                stores[split].append(TokenStore(Path(source.path) / split, verify="size"))
        first = stores["train"][0]
        for store in stores["train"]:
            if store.fingerprint_of_tokenizer != first.fingerprint_of_tokenizer:
                raise ValueError(
                    f"sources have different tokenizers: {first.folder.parent} {first.fingerprint_of_tokenizer[:12]}, "
                    f"{store.folder.parent} {store.fingerprint_of_tokenizer[:12]}; prepare one with --tokenizer.path "
                    f"{first.tokenizer_path}"
                )
        self._stores = stores

    def _splits_of(self, source: SourceConfig) -> list[str]:
        """The splits to open: train always, heldout where it is wanted and the source has held out anything."""
        way_out = f"prepare the corpus first: python -m data.prepare --config ... --output {source.path}"
        splits = read_manifest(Path(source.path), way_out)["splits"]
        return ["train"] + ["heldout"] * bool(self.heldout and splits["heldout"]["documents"])

    def _store(self) -> TokenStore:
        if not self._stores:
            raise RuntimeError("the corpora are not open; call setup() first")
        return self._stores["train"][0]

    @property
    def tokenizer_path(self) -> str:
        return os.fspath(self._store().tokenizer_path)

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._store().fingerprint_of_tokenizer

    @property
    def vocab_size(self) -> int:
        return self._store().vocab_size

    def train_sequences(self) -> Packing:
        """The sequences of the run."""
        self._store()
        return Packing(
            self._stores["train"],
            weights=[source.weight for source in self.sources],
            length_buckets=[source.length_buckets for source in self.sources],
            names=[source.path for source in self.sources],
            sequence_length=self.sequence_length,
            seed=self.seed,
            intra_document=self.intra_document,
        )

    def heldout_sequences(self) -> Packing:
        """Sequences of the held-out splits, in an order that does not depend on the seed."""
        self._store()
        heldout = {store.folder.parent: store for store in self._stores["heldout"]}
        sources = [source for source in self.sources if Path(source.path) in heldout]
        if not sources:
            raise ValueError("no source has held-out documents; prepare one with them or set data.val_sequences to 0")
        return Packing(
            [heldout[Path(source.path)] for source in sources],
            weights=[source.weight for source in sources],
            length_buckets=[{0: 1.0} for _ in sources],
            names=[f"{source.path} (heldout)" for source in sources],
            sequence_length=self.sequence_length,
            seed=0,
            intra_document=self.intra_document,
        )

    def order(self) -> dict[str, Any]:
        """What decides, besides seed, sequence_length and intra_document, what the sequences hold."""
        sources = [
            {
                "weight": source.weight,
                "length_buckets": {str(bound): source.length_buckets[bound] for bound in sorted(source.length_buckets)},
                "tokens": store.num_tokens,
                "content": store.content,
                "tokenizer_fingerprint": store.fingerprint_of_tokenizer,
            }
            for source, store in zip(self.sources, self._stores["train"], strict=True)
        ]
        return {"sources": sources}
