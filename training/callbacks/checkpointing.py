"""Saving checkpoints that are complete or absent, and removing those that the config does not keep."""

import functools
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from common.checks import check_number, check_numbers
from data.datamodule import PackedDataModule
from model.checkpoint import (
    MARKER,
    TRAINER_STATE,
    CheckpointInfo,
    InterruptedSave,
    checkpoint_folder,
    list_checkpoints,
    move_aside,
    named_step,
    write_complete,
)
from model.checksums import Verify
from training.callbacks.metrics import log
from training.distributed.checkpoint_state import SAVED_BYTES, SaveError, agreement, gather_objects
from training.distributed.checkpoint_writer import BackgroundSave, HostCopy
from training.distributed.config import ElasticCheckpoints
from training.faults.interruption import stop
from training.faults.progress import Progress
from training.module import LanguageModule
from training.resume.settings import run_settings
from training.resume.start_point import StartPoint, check_start
from training.throughput import StepClock
from training.tracking import say


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept. The last step of a session is always saved.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep_last: newest complete checkpoints that are kept; two, so that one is whole while another is removed.
        keep_every_hours: of wall time; in addition one checkpoint for each such period is kept. 0 for none.
        milestones: steps that are saved and always kept, such as the ends of stages.
        asynchronous: training stands still only while what is saved is copied to host memory (12 bytes a parameter,
            divided among the ranks), and goes on while the copy is written. The last save of a session is not.
        max_failed_saves: the run ends when so many saves in a row have failed; until then training goes on.
        verify: what a checkpoint is compared with before a run starts from it: "checksum" of each tensor (divided among
            the ranks; model/checksums.py has the cost), or only the "size" of each file.
    """

    every_n_steps: int = 500
    keep_last: int = 2
    keep_every_hours: float = 0.0
    milestones: list[int] = field(default_factory=list)
    asynchronous: bool = False
    max_failed_saves: int = 3
    verify: Verify = "checksum"

    def __post_init__(self) -> None:
        check_numbers("checkpoint.", self, ("every_n_steps", "max_failed_saves"), least=1, whole=True)
        check_number("checkpoint.keep_every_hours", self.keep_every_hours, least=0, most=10**6, zero="never")
        if any(step < 1 for step in self.milestones):
            raise ValueError(f"checkpoint.milestones is {self.milestones}: expected steps, at least 1")
        if self.verify not in get_args(Verify):
            raise ValueError(f"checkpoint.verify is {self.verify!r}: expected checksum or size")
        if self.keep_last < 2:
            raise ValueError(
                f"checkpoint.keep_last is {self.keep_last}: expected at least 2, or a crash could leave none"
            )

    def due_from(self, step: int) -> int:
        """The first step from this one on that is saved, however long the run is."""
        regular = -(-step // self.every_n_steps) * self.every_n_steps
        return min([regular, *(milestone for milestone in self.milestones if milestone >= step)])


class NotSaved(RuntimeError):
    """A run ends because its checkpoints cannot be written; the message says where, why and what to do."""


class RunCheckpoint(Checkpoint):
    """Writes RUN/checkpoints/step-XXXXXXXX every n optimizer steps and at the end, and removes old ones.

    All saves begin in on_train_batch_end, so that Lightning's loop counters are always saved in the same state. At most
    one is under way: the next one, and the end of training, wait for it. Logs checkpoint/stall_seconds, the time that
    training stood still for a save, and of asynchronous ones checkpoint/write_seconds, of rank 0's files.

    Args:
        run_dir: the run folder.
        config: when to save, how many to keep.
        start: where this session started.
        code_version: recorded in each checkpoint.
        clock: paused while training stands still.
        progress: told of saves under way, and when one is waited for.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        start: StartPoint,
        code_version: str,
        clock: StepClock,
        progress: Progress,
    ) -> None:
        self.run_dir, self.config, self.start, self.code_version = run_dir, config, start, code_version
        self.clock, self.progress = clock, progress
        self.tried_step, self.failed_saves = start.step, 0  # the step comes again with each micro-batch behind it
        self.copy, self.under_way, self.stall = HostCopy(), None, 0.0
        self.asked_step = start.step
        progress.writing = lambda: self.under_way is not None and not self.under_way.written

    under_way: BackgroundSave | None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Raises ValueError when the ranks found different checkpoints to start from, and as check_start does."""
        found = gather_objects(str(self.start.checkpoint.path) if self.start.checkpoint else "step 0")
        for rank, path in enumerate(found):
            if path != found[0]:
                raise ValueError(
                    f"rank 0 starts from {found[0]}, rank {rank} from {path}: --run_dir must be a folder that all "
                    "nodes share, and nothing else may write to it"
                )
        if self.config.verify == "checksum":
            check_start(self.start, self.run_dir)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, due = trainer.global_step, self.config.due_from(trainer.global_step)
        in_background = self.config.asynchronous and due < trainer.max_steps  # the last save is not
        if in_background and step > self.start.step and not self.copy.begun:
            cast(ElasticCheckpoints, trainer.strategy).begin_copy(self.copy)
        last = step == trainer.max_steps or trainer.should_stop
        if (due == step or last) and step > self.tried_step:
            with self.clock.paused():
                self.finish(trainer)
                self.save(trainer, pl_module, last)
        elif self.under_way and step > self.asked_step and self.is_written(trainer, self.under_way):
            with self.clock.paused():
                self.finish(trainer)
        self.asked_step = step

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.finish(trainer, last=True)  # where training has ended behind the save of its last step

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Training has failed. What one process was writing gets complete; several cannot agree any more."""
        save, self.under_way = self.under_way, None
        if save is None:
            return
        try:
            if not save.alone:
                raise SaveError("training has failed while it was being written")
            save.finish()
        except SaveError as error:
            say(f"warning: no checkpoint of step {named_step(save.folder)}: {error}")

    def save(self, trainer: Trainer, module: LanguageModule, last: bool) -> None:
        """Write the checkpoint of the current step, or begin to, and remove what is no longer kept; where weights or
        optimizer state are not finite, the run is told to end instead, and nothing is removed.

        Raises:
            NotSaved: on all ranks, when too many saves in a row have failed, or the last one of a session.
        """
        self.tried_step, began = trainer.global_step, time.perf_counter()
        if module.guard and module.guard.find_lost(trainer):
            stop(trainer)
            return
        folder = checkpoint_folder(self.run_dir, self.tried_step)
        try:
            # nothing is left to be trained during the last one
            self._write(trainer, module, folder, in_background=self.config.asynchronous and not last)
        except SaveError as error:
            self._failed(trainer, folder, error, last)
            return
        if self.under_way:
            self.stall = time.perf_counter() - began
        else:
            self._completed(trainer, began)

    def _write(self, trainer: Trainer, module: LanguageModule, folder: Path, in_background: bool) -> None:
        """All files, then the marker. Raises SaveError on all ranks when any of them cannot write."""
        with agreement():
            if trainer.is_global_zero:
                make_room(folder)
                folder.mkdir(parents=True)
        self.data(trainer).consumed_samples = self.samples(trainer)
        copy, strategy = self.copy if in_background else None, cast(ElasticCheckpoints, trainer.strategy)
        trainer.save_checkpoint(folder / TRAINER_STATE, weights_only=False, storage_options=copy)
        complete = functools.partial(write_complete, folder, self.meta(trainer, module))
        if in_background:
            assert strategy.copied is not None
            self.under_way = BackgroundSave(strategy.copied, lambda checksums: complete(checksums=checksums))
            return
        with agreement():
            if trainer.is_global_zero:
                complete(checksums=strategy.checksums)

    @staticmethod
    def is_written(trainer: Trainer, save: BackgroundSave) -> bool:
        """Whether all ranks have written their files. Asked by all of them at the same step."""
        flag = torch.tensor(float(not save.written), device=trainer.strategy.root_device)
        return not trainer.strategy.reduce(flag, reduce_op="sum")

    def finish(self, trainer: Trainer, last: bool = False) -> None:
        """Wait for the save under way, if there is one, and remove what is no longer kept. Raises as `save`."""
        if self.under_way is None:
            return
        self.progress.note("saving", trainer.global_step)
        save, self.under_way, began = self.under_way, None, time.perf_counter() - self.stall
        try:
            save.finish()
        except SaveError as error:
            self._failed(trainer, save.folder, error, last)
            return
        self._completed(trainer, began, {"checkpoint/write_seconds": save.seconds})

    def _failed(self, trainer: Trainer, folder: Path, error: SaveError, last: bool) -> None:
        self.failed_saves += 1
        if trainer.is_global_zero and not (folder / MARKER).exists():
            with suppress(OSError):  # without a marker it will be passed over
                remove_checkpoint(folder)
        count = f"{self.failed_saves} of checkpoint.max_failed_saves {self.config.max_failed_saves}"
        say(f"warning: no checkpoint of step {named_step(folder)} ({count} in a row): {error}")
        if last or self.failed_saves >= self.config.max_failed_saves:
            newest = list_checkpoints(self.run_dir).newest
            parameters = cast(LanguageModule, trainer.lightning_module).model.initial.count()
            mib = -(-SAVED_BYTES * parameters // 2**20)  # rounded up; of Muon's parameters it is less
            raise NotSaved(
                f"{folder} could not be written ({error}): make room (up to {mib:,} MiB for each checkpoint) or "
                "repair the disk, then continue with --resume auto; "
                + (f"the newest complete checkpoint is {newest.path}" if newest else "there is no complete one yet")
            ) from error

    def _completed(self, trainer: Trainer, began: float, metrics: Mapping[str, float] = {}) -> None:
        """began: time.perf_counter(), as if training had stood still since then."""
        self.failed_saves = 0
        if trainer.is_global_zero:
            try:
                self.remove_old()
            except OSError as error:
                say(f"warning: an old checkpoint could not be removed: {error}")
        log(trainer, {"checkpoint/stall_seconds": time.perf_counter() - began, **metrics})

    def meta(self, trainer: Trainer, module: LanguageModule) -> dict[str, Any]:
        data, samples = self.data(trainer), self.samples(trainer)
        return {
            "step": trainer.global_step,
            "samples": samples,
            "tokens": self.start.tokens + (samples - self.start.samples) * data.sequence_length,
            "model": asdict(module.network_config),
            "tokenizer": {"path": str(data.tokenizer_path), "fingerprint": data.tokenizer_fingerprint},
            "sequence_length": data.sequence_length,
            "settings": run_settings(trainer, module, data.global_batch_size),
            "code_version": self.code_version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @staticmethod
    def data(trainer: Trainer) -> PackedDataModule:
        return trainer.datamodule  # type: ignore[attr-defined]

    def samples(self, trainer: Trainer) -> int:
        return self.start.samples_at(trainer.global_step, self.data(trainer).global_batch_size)

    def remove_old(self) -> None:
        """Keep what the config says. Folders without marker are leftovers of interrupted saves; what was complete once
        and cannot be read now, and what has another name, is not ours to remove."""
        found = list_checkpoints(self.run_dir)
        kept = {info.path for info in checkpoints_to_keep(found.complete, self.config)}
        leftovers = [path for path, error in found.others.items() if isinstance(error, InterruptedSave)]
        for folder in (*leftovers, *(info.path for info in found.complete if info.path not in kept)):
            remove_checkpoint(folder)


def checkpoints_to_keep(complete: list[CheckpointInfo], config: CheckpointConfig) -> list[CheckpointInfo]:
    """The complete checkpoints that stay, oldest first: the last ones, milestones, one for each keep_every_hours.

    A period begins with the checkpoint that was kept for the one before, so that a later call keeps the same ones.
    """
    kept = [info for info in complete if info.step in config.milestones]
    if config.keep_every_hours:
        period, due = timedelta(hours=config.keep_every_hours), datetime.min.replace(tzinfo=UTC)
        for info in complete:
            try:
                created = datetime.fromisoformat(info.meta["created"]).astimezone(UTC)
            except (KeyError, TypeError, ValueError):  # a damaged record is no reason to remove it
                kept.append(info)
                continue
            if created >= due:
                kept.append(info)
                due = created + period
    return kept + complete[-config.keep_last :]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint folder, its marker first, so that it is never complete with files missing. Of a link only the
    link goes."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        with suppress(FileNotFoundError):
            (folder / MARKER).unlink()
        shutil.rmtree(folder)


def make_room(folder: Path) -> None:
    """Remove what an interrupted save has left in a folder; what was complete once moves aside."""
    if not (folder / MARKER).exists():
        remove_checkpoint(folder)
        return
    aside = move_aside(folder, "replaced")
    say(f"warning: {folder} is written again: the one that was there stays as {aside.name}, for you to remove")
