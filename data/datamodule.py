"""Batches of sequences for Lightning, in an order that does not depend on workers, ranks or restarts.

Optimizer step s of the run consumes the global samples [s * G, (s + 1) * G), G the global batch size; micro-batch a of
rank r out of W takes micro_batch_size samples from s * G + (a * W + r) * micro_batch_size on. Where documents of
different lengths make sequences of different cost, balance_ranks exchanges samples within the step (data/balance.py).
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import lightning
from torch.utils.data import DataLoader, DistributedSampler

from common.checks import LARGEST_SEED, check_number
from common.files import check_keys
from data.balance import Cost
from data.length_generalisation import NO_TASK, TaskConfig, TaskSource
from data.loading import Batch, BatchLoader, MicroBatchSampler, PackedDataset, ValidationSampler
from data.mixture import Mixture, SourceConfig
from data.packing import Packing, Sequences
from data.store import Verify
from data.workers import start_worker, worker_context

NO_SOURCES: list[SourceConfig] = []
SAME_DATA = "restore it, or start a new run from the checkpoint's weights"


class TokenSource(Protocol):
    """Where sequences come from; data.mixture.Mixture and data.length_generalisation.TaskSource are the two."""

    @property
    def tokenizer_path(self) -> str: ...
    @property
    def tokenizer_fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    def prepare(self) -> None:
        """Check what lies on disk, once per node."""

    def open(self) -> None:
        """In every process, before anything else is asked for."""

    def train_sequences(self) -> Sequences: ...
    def heldout_sequences(self) -> Sequences: ...
    def order(self) -> dict[str, Any]:
        """What decides, besides seed, sequence_length and intra_document, what the sequences hold; plain values."""
        ...


def check_sizes(sequence_length: int, global_batch_size: int, micro_batch_size: int) -> None:
    """Raises ValueError for sizes that no batch can have."""
    check_number("data.sequence_length", sequence_length, least=2, most=2**27, whole=True)
    check_number("data.global_batch_size", global_batch_size, least=1, most=2**27, whole=True)
    check_number("data.micro_batch_size", micro_batch_size, least=1, most=2**27, whole=True)


class PackedDataModule(lightning.LightningDataModule):
    """Mixture of prepared corpora, packed, or the samples of a task; see the module's docstring for the order.

    The training side sets `consumed_samples` after each optimizer step (global samples, not fetched ones); it is the
    whole state. Batches: see PackedDataset.

    Args:
        sources: corpora of the mixture; all prepared with one tokenizer
        task: length-generalisation task to train on instead, each sample a sequence of its own
        sequence_length: tokens of a sequence
        global_batch_size: sequences of an optimizer step, over all ranks and accumulated micro-batches
        micro_batch_size: sequences that one rank computes at once
        seed: of the order
        intra_document: attention and loss stay within documents; False lets them cross
        balance_ranks: several ranks share each step's sequences out by their cost, so that none waits for the one that
            drew the long documents; the step's sequences stay the same
        num_workers: loader processes per rank
        val_sequences: held-out sequences of a validation, over all ranks, the same for every seed; 0 for no validation
        verify: "checksum" reads every shard that has changed since it was last read so, "size" compares sizes only
    """

    def __init__(
        self,
        sources: list[SourceConfig] = NO_SOURCES,
        task: TaskConfig = NO_TASK,
        sequence_length: int = 1024,
        global_batch_size: int = 64,
        micro_batch_size: int = 8,
        seed: int = 0,
        intra_document: bool = True,
        balance_ranks: bool = True,
        num_workers: int = 1,
        val_sequences: int = 64,
        verify: Verify = "checksum",
    ) -> None:
        super().__init__()
        if not sources and task.name is None:
            raise ValueError("data.sources is empty; give at least one prepared corpus, or a task: data.task.name")
        if sources and task.name is not None:
            raise ValueError(f"data.task.name is {task.name}, but data.sources has corpora too; leave one of them out")
        check_sizes(sequence_length, global_batch_size, micro_batch_size)
        check_number("data.num_workers", num_workers, least=0, most=1024, whole=True)
        check_number("data.val_sequences", val_sequences, least=0, whole=True, zero="no validation")
        check_number("data.seed", seed, least=0, most=LARGEST_SEED, whole=True)
        self.sources, self.task = sources, task
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.intra_document = intra_document
        self.balance_ranks = balance_ranks
        self.sequence_cost: Cost | None = None  # of the model in training, which train.py knows
        self.num_workers = num_workers
        self.val_sequences = val_sequences
        self.consumed_samples = 0
        self._packing: Packing | None = None  # once training reads it
        self._heldout: Sequences | None = None  # once validation_packing was asked for
        self._content: TokenSource
        if task.name is None:
            self._content = Mixture(
                sources, sequence_length=sequence_length, seed=seed, intra_document=intra_document, verify=verify,
                heldout=val_sequences > 0,
            )  # fmt: skip
        else:
            self._content = TaskSource(task, sequence_length=sequence_length, seed=seed)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step. Raises ValueError when they do not divide the global batch."""
        together = self.micro_batch_size * world_size
        if self.global_batch_size % together:
            raise ValueError(
                f"data.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} ranks; change one of them"
            )
        return self.global_batch_size // together

    def prepare_data(self) -> None:
        """Verify every shard once per node."""
        self._content.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the corpora. Raises FileNotFoundError or ValueError for missing, damaged or mismatching ones."""
        self._content.open()

    @property
    def tokenizer_path(self) -> str:
        """Fingerprint of the corpora's tokenizer; "task:NAME" for a task."""
        return self._content.tokenizer_path

    @property
    def tokenizer_fingerprint(self) -> str:
        return self._content.tokenizer_fingerprint

    @property
    def vocab_size(self) -> int:
        return self._content.vocab_size

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Rank and number of the ranks that see different data, as Lightning's strategy says; (0, 1) on one device."""
        share = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return (share["rank"], share["num_replicas"]) if share else (0, 1)

    @property
    def balanced_by(self) -> Cost | None:
        """What a step's sequences are shared out by; None where they are not."""
        return self.sequence_cost if self.balance_ranks else None

    def train_packing(self) -> Sequences:
        """The sequences of the run."""
        return self._content.train_sequences()

    def passes_done(self, samples: int) -> float | None:
        """Passes behind `samples` samples, over the documents that come round most often; None for sequences that are
        made, not read."""
        return self._packing.passes_done(samples) if self._packing else None

    def _samples_of_run(self, packing: Sequences) -> int:
        """Global samples of max_steps steps; without max_steps, the whole steps of one pass over every stream."""
        max_steps = self.trainer.max_steps if self.trainer else -1
        steps = max_steps if max_steps > 0 else packing.sequences_per_pass // self.global_batch_size
        if steps == 0:
            raise ValueError(
                f"one pass over the sources has {packing.sequences_per_pass} sequences, fewer than global_batch_size "
                f"{self.global_batch_size}; set trainer.max_steps or a smaller global_batch_size"
            )
        return steps * self.global_batch_size

    def _loader(self, dataset: PackedDataset, sampler: DistributedSampler[Batch]) -> DataLoader[Batch]:
        return BatchLoader(
            dataset,
            sampler=sampler,  # gives whole micro-batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=start_worker,
            multiprocessing_context=worker_context() if self.num_workers else None,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches of this rank from `consumed_samples` on."""
        rank, world_size = self._rank_and_world_size()
        self.accumulation(world_size)
        if self.consumed_samples % self.global_batch_size:
            raise ValueError(
                f"consumed_samples {self.consumed_samples} is no whole number of global batches of "
                f"{self.global_batch_size}; resume with the global_batch_size of the checkpoint's run"
            )
        # The position is kept here and not in the loader, which Lightning takes for a loader that starts over.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        packing = self.train_packing()
        dataset = PackedDataset(packing, self._samples_of_run(packing))
        self._packing = packing if isinstance(packing, Packing) else None
        if rank == 0 and self._packing:
            for line in self._packing.passes(len(dataset), self.consumed_samples):
                print(line, flush=True)
        return self._loader(dataset, MicroBatchSampler(self, dataset, rank, world_size))

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The first val_sequences held-out sequences, in an order that does not depend on the seed."""
        if not self.val_sequences:
            return []
        rank, world_size = self._rank_and_world_size()
        packing = self.validation_packing(world_size)
        dataset = PackedDataset(packing, self.val_sequences)
        return self._loader(dataset, ValidationSampler(dataset, self.micro_batch_size, rank, world_size))

    def validation_packing(self, world_size: int) -> Sequences:
        """The held-out sequences. Raises ValueError where ranks cannot share val_sequences, or there are fewer."""
        if self._heldout is None:
            self._heldout = self._content.heldout_sequences()
        packing = self._heldout
        if self.val_sequences % (self.micro_batch_size * world_size):
            raise ValueError(
                f"data.val_sequences {self.val_sequences} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} ranks; change one of them"
            )
        if self.val_sequences > packing.sequences_per_pass:
            raise ValueError(
                f"data.val_sequences is {self.val_sequences}, but the held-out splits give only "
                f"{packing.sequences_per_pass} sequences of {self.sequence_length} tokens; use fewer or hold out more"
            )
        return packing

    def _order(self) -> dict[str, Any]:
        """Everything besides the number of a sample that decides what it holds."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "intra_document": self.intra_document,
            **self._content.order(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the consumed samples. Raises ValueError when the data or their order were others."""
        self.setup()
        check_keys(
            state_dict, {"consumed_samples": int, "order": dict}, "the data's state in the checkpoint", SAME_DATA
        )
        check_order(state_dict["order"], self._order(), [source.path for source in self.sources])
        self.consumed_samples = state_dict["consumed_samples"]


def check_order(trained: dict[str, Any], found: dict[str, Any], paths: list[str]) -> None:
    """Raises ValueError that says in what the data of a checkpoint differ from those found. paths: of found's sources.

    The content of a source does not count where it was not recorded, in checkpoints from before it was.
    """
    before, now = trained.get("sources"), found.get("sources", [])
    if isinstance(before, list) and len(before) == len(now):
        before = [{"content": new["content"], **old} for old, new in zip(before, now, strict=True)]
        trained = {**trained, "sources": before}
        for path, old, new in zip(paths, before, now, strict=True):
            if old != new and {**old, "content": new["content"]} == new:
                raise ValueError(
                    f"the checkpoint was trained on other shards of {path} ({old['content'][:12]}, now "
                    f"{new['content'][:12]}): it was prepared again, from other text or with other options; {SAME_DATA}"
                )
    for key, value in found.items():
        if trained.get(key) != value:
            raise ValueError(
                f"the checkpoint was trained with data.{key} {trained.get(key)}, the config has {value}; {SAME_DATA}"
            )
