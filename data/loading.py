"""Micro-batches of this rank: which samples, and how workers hand them over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data.balance import Cost, share_out
from data.packing import Sequences

Batch = dict[str, Tensor | int]


class PackedDataset(Dataset[Batch]):
    """Maps global sample indices to one micro-batch."""

    def __init__(self, packing: Sequences, num_samples: int) -> None:
        self.packing = packing
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, samples: Sequence[int]) -> Batch:
        """One micro-batch, its N = samples x sequence_length tokens flattened into one row.

        tokens, labels: (1, N) int64, labels -100 where nothing is to be predicted. cu_seqlens: (documents + 1,) int32.
        max_seqlen: int, the sequence length. sample_ids: (samples,) int64.
        """
        sequences = [self.packing.sequence(i) for i in samples]
        lengths = torch.cat([torch.from_numpy(sequence.lengths) for sequence in sequences])
        return {
            "tokens": torch.cat([torch.from_numpy(sequence.tokens) for sequence in sequences])[None],
            "labels": torch.cat([torch.from_numpy(sequence.labels) for sequence in sequences])[None],
            "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            "max_seqlen": self.packing.sequence_length,  # an upper bound that is the same for every batch
            "sample_ids": torch.tensor(samples, dtype=torch.int64),
        }


class RunPosition(Protocol):
    """Where a run is in its samples, how many a rank takes at a time and, where a step's are shared out by cost, what
    each costs; data.datamodule.PackedDataModule has it."""

    consumed_samples: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def balanced_by(self) -> Cost | None: ...


class MicroBatchSampler(DistributedSampler[Batch]):
    """Global samples for the micro-batches of one rank.

    A DistributedSampler, so that Lightning leaves it alone instead of putting its own in its place. Its length counts
    the micro-batches of the whole run, those already consumed included: Lightning's progress counters, which it
    restores from a checkpoint, count them too, and with a length it never fetches a batch ahead.
    """

    def __init__(self, data: RunPosition, dataset: PackedDataset, rank: int, world_size: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self._data = data
        self._stride = data.micro_batch_size * world_size
        self._offset = data.micro_batch_size * rank

    def __len__(self) -> int:
        return len(self.dataset) // self._stride  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sequence[int]]:  # type: ignore[override]
        run = len(self.dataset)  # type: ignore[arg-type]
        consumed = self._data.consumed_samples
        end = (consumed // run + 1) * run  # of this epoch; an epoch is the whole run where max_steps is given
        if (cost := self._data.balanced_by) and self.num_replicas > 1:
            for start in range(consumed, end, self._data.global_batch_size):
                yield from self._balanced(start, cost)
        else:
            for start in range(consumed + self._offset, end, self._stride):
                yield range(start, start + self._data.micro_batch_size)

    def _balanced(self, start: int, cost: Cost) -> list[list[int]]:
        """The micro-batches of this rank in the step that begins with sample `start`."""
        packing = self.dataset.packing  # type: ignore[attr-defined]
        samples = range(start, start + self._data.global_batch_size)
        costs = np.array([cost(lengths) for lengths in packing.document_lengths(samples)])
        return (start + share_out(costs, self.num_replicas, self._data.micro_batch_size)[self.rank]).tolist()


class ValidationSampler(DistributedSampler[Batch]):
    """Ranges of the first samples of the held-out split, each on one rank."""

    def __init__(self, dataset: PackedDataset, micro_batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        first, end = rank * micro_batch_size, len(dataset)
        starts = range(first, end, world_size * micro_batch_size)
        self._micro_batches = [range(start, start + micro_batch_size) for start in starts]

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[range]:  # type: ignore[override]
        return iter(self._micro_batches)


def as_arrays(batch: Any) -> dict[str, Any]:
    """A batch's tensors as arrays, without copying."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def as_tensors(batch: dict[str, Any]) -> Batch:
    """The inverse of `as_arrays`."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


class BatchLoader(DataLoader[Batch]):
    """Batches cross from the workers as arrays: each tensor would cost a socket and a file descriptor, which takes a
    small model's main process longer than its training step."""

    def __init__(self, dataset: Dataset[Batch], **options: Any) -> None:
        super().__init__(dataset, batch_size=None, collate_fn=as_arrays, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return map(as_tensors, super().__iter__())
