"""Training steps of runs' checkpoints on held-out documents, beside fresh ones in benchmarks.train_speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.train_speed import Trial
from data.store import TokenStore
from eval.common.scoring import shifted
from eval.common.subjects import Subject, check_tokenizer, find_subjects
from model.loading import load_model


def open_runs(runs: Sequence[str], data: Path | None) -> tuple[list[Subject], TokenStore]:
    """The runs and the held-out split that they read.

    Raises FileNotFoundError, ValueError: no checkpoint, no corpus, another tokenizer than a run's.
    """
    if data is None:
        raise ValueError("--runs needs --data: the prepared corpus whose held-out documents are read")
    subjects, store = find_subjects(runs), TokenStore(data / "heldout")
    for subject in subjects:
        check_tokenizer(subject, data, store)
    return subjects, store


def windows(
    store: TokenStore, length: int, count: int, options: str = "--lengths or --tokens"
) -> list[tuple[int, int]]:
    """Document and first token of `count` windows of `length` tokens, each inside one document and followed by a token,
    evenly among all that do not overlap.

    Raises ValueError: there are fewer; `options` ask for less.
    """
    found = [
        (document, start)
        for document, tokens in enumerate(store.lengths.tolist())
        for start in range(0, int(tokens) - length, length)
    ]
    if len(found) < count:
        raise ValueError(
            f"{store.folder} has {len(found)} windows of {length} tokens inside documents, expected {count}: "
            f"set {options} lower, or hold out longer documents (data.prepare)"
        )
    return [found[len(found) * i // count] for i in range(count)]


class TrainedTrial(Trial):
    """A checkpoint in training. Its learning rate is 0: a step does all its work and leaves the weights, and with them
    what is sparse, as they were trained."""

    def __init__(self, subject: Subject, store: TokenStore, loss_backend: str, options: dict[str, Any]) -> None:
        self.store = store
        super().__init__(subject.checkpoint.architecture, loss_backend, 1, options)
        weights = load_model(subject.checkpoint.path, self.device).model.state_dict()
        self.module.model.load_state_dict(weights)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def documents(self, tokens: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, (sequences, length): each of one document."""
        found = [
            shifted(self.store.document(document), start, start + length)
            for document, start in windows(self.store, length, tokens // length)
        ]
        return np.stack([one.tokens for one in found]), np.stack([one.targets for one in found])

    def batch(self, tokens: int, length: int) -> dict[str, Any]:
        batch = super().batch(tokens, length)
        inputs, targets = (torch.from_numpy(x).reshape(batch["tokens"].shape) for x in self.documents(tokens, length))
        return batch | dict(tokens=inputs, labels=targets)

    def sample(self, length: int) -> Tensor:
        return torch.from_numpy(self.documents(length, length)[0])
