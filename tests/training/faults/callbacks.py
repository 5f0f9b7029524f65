"""Callbacks that disturb or watch their own training process, named by class_path in the tests' configs."""

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from lightning.pytorch import Callback
from torch import Tensor

import training.callbacks.checkpointing
import training.distributed.checkpoint_writer
from model.checkpoint import MARKER, TRAINER_STATE, checkpoint_folder, write_complete


def die(*_: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


class StopAfterStep(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class StopInValidation(Callback):
    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


class KillDuringSave(Callback):
    """In the save of a step, when of what it writes there is: "nothing" but the folder; "part" of a state file; the
    "state" files; all but the "marker"."""

    def __init__(self, step: int, stage: Literal["nothing", "part", "state", "marker"]) -> None:
        self.step, self.stage = step, stage

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step != self.step:
            return
        if self.stage == "nothing":
            die()
        if self.stage == "part":
            training.distributed.checkpoint_writer.save_file = write_part  # type: ignore[assignment]
        if self.stage == "state":
            training.distributed.checkpoint_writer.write_trainer_state = die
        training.callbacks.checkpointing.write_complete = die  # type: ignore[assignment]


def write_part(tensors: Any, path: Path) -> None:
    path.write_bytes(b"half of a file")
    die()


class FullDisk(Callback):
    """The disk of one rank refuses the files of some steps."""

    def __init__(self, rank: int, steps: list[int]) -> None:
        self.rank, self.steps = rank, steps

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        full = trainer.global_rank == self.rank and trainer.global_step in self.steps
        training.distributed.checkpoint_writer.save_file = refuse if full else safetensors.torch.save_file


def refuse(tensors: Any, path: Path) -> None:
    path.write_bytes(b"half of a file")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


class HoldWriter(Callback):
    """Whoever writes the save of a step waits until training has come to the step `until`, and `seconds` longer. No
    part of it is complete before, and all of it is when the next save begins.

    Args:
        rank: whose writer waits; None for all.
    """

    def __init__(self, step: int, until: int, seconds: float = 0.0, rank: int | None = None) -> None:
        self.step, self.until, self.seconds, self.rank = step, until, seconds, rank
        self.released = threading.Event()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            training.distributed.checkpoint_writer.save_file = self.wait_and_save
        folder = checkpoint_folder(trainer.default_root_dir, self.step)
        done = (folder / MARKER).exists() or not folder.exists()  # complete, or old and removed
        assert trainer.global_step <= self.step or done, "two saves at a time"

    def wait_and_save(self, tensors: Any, path: Path) -> None:
        training.distributed.checkpoint_writer.save_file = safetensors.torch.save_file
        if not self.released.wait(30):
            raise OSError(errno.EIO, "training has not gone on", str(path))
        safetensors.torch.save_file(tensors, path)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.until and not self.released.is_set():
            marker = checkpoint_folder(trainer.default_root_dir, self.step) / MARKER
            assert not marker.exists(), "complete while it is being written"
            threading.Timer(self.seconds, self.released.set).start()


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crashed as asked")


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.10 GiB is "
    "free. Process 7 has 40.00 GiB memory in use. Including non-PyTorch memory, this process has 38.00 GiB memory in "
    "use. Of the allocated memory 37.00 GiB is allocated by PyTorch, and 0.50 GiB is reserved but unallocated."
)
ILLEGAL_ACCESS = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia"
    ".com/cuda for more information.\nCUDA kernel errors might be asynchronously reported at some other API call"
)


class FailDevice(Callback):
    """The device of one rank fails behind a step: out of "memory", or with an "access" that its driver refuses, after
    which nothing can be moved away from it either; a "kernel" that says so itself is no error of torch's. Behind step
    -1: before training begins."""

    def __init__(self, step: int, kind: Literal["memory", "access", "kernel"], rank: int = 0) -> None:
        self.step, self.kind, self.rank = step, kind, rank

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        self._fail_behind(-1, trainer)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._fail_behind(trainer.global_step, trainer)

    def _fail_behind(self, step: int, trainer: Any) -> None:
        if (step, trainer.global_rank) != (self.step, self.rank):
            return
        if self.kind == "memory":
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        trainer.strategy.teardown = self.fail
        if self.kind == "kernel":
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        self.fail()

    def fail(self) -> None:
        raise torch.AcceleratorError(ILLEGAL_ACCESS)


class SaveAtStart(Callback):
    """Writes the restored state before the first step, as a checkpoint of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        trainer.strategy.barrier()
        trainer.strategy.save_checkpoint({}, self.folder / TRAINER_STATE)
        if trainer.is_global_zero:
            write_complete(self.folder, {"step": trainer.global_step})


class RecordSamples(Callback):
    """Writes the global numbers of the samples that this rank trains on."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        samples = " ".join(map(str, batch["sample_ids"].tolist()))
        with (self.folder / f"samples-{trainer.global_rank}").open("a") as file:
            file.write(f"{samples} ")


class Note(Callback):
    """Does nothing; its argument becomes a part of the config."""

    def __init__(self, text: str) -> None:
        self.text = text


class Pause(Callback):
    """Makes optimizer steps slow enough to be met by a signal."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


def on_rank(rank: int) -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == rank


class SignalInStep(Callback):
    """One rank gets a signal, `times` over, in the optimizer step after `step`: a stop signal meets one rank first."""

    def __init__(self, step: int, rank: int, name: str, times: int = 1) -> None:
        self.step, self.rank, self.signal, self.times = step, rank, signal.Signals[name], times

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and on_rank(self.rank):
            for _signal in range(self.times):
                os.kill(os.getpid(), self.signal)
            self.times = 0  # not once more for each micro-batch of the step


class SignalInValidation(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        if on_rank(self.rank):
            os.kill(os.getpid(), signal.SIGTERM)


class BadGradient(Callback):
    """A gradient that is not a number in the given optimizer steps (1 is the first), on one rank, before reduction."""

    def __init__(self, steps: list[int], rank: int) -> None:
        self.steps, self.rank = steps, rank

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def poison(gradient: Tensor) -> Tensor:
            bad = on_rank(self.rank) and trainer.global_step + 1 in self.steps
            return torch.full_like(gradient, torch.nan) if bad else gradient

        pl_module.model.blocks[0].attention_norm.weight.register_hook(poison)


class BadWeight(Callback):
    """A weight that is not a number after an optimizer step, on one rank, as a step that overflows leaves it."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and on_rank(self.rank):
            pl_module.model.blocks[0].attention_norm.weight.data[3] = torch.nan


class BadLoss(Callback):
    """A loss that is not a number in the given optimizer steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        whole = pl_module.loss_sum
        pl_module.loss_sum = lambda batch: whole(batch) * (torch.nan if trainer.global_step + 1 in self.steps else 1)


class Hang(Callback):
    """One rank stops doing anything in a step: asleep, or stopped by the kernel, so that no thread of it runs."""

    def __init__(self, step: int, rank: int, stopped: bool = False) -> None:
        self.step, self.rank, self.stopped = step, rank, stopped

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and on_rank(self.rank):
            if self.stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)


class EndWandb(Callback):
    """SIGTERM to wandb's own process, as a scheduler that signals all processes of a job sends it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            (service,) = [int(pid) for pid in children if "wandb" in Path(f"/proc/{pid}/comm").read_text()]
            os.kill(service, signal.SIGTERM)
            while Path(f"/proc/{service}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)


class KillRank(Callback):
    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and on_rank(self.rank):
            die()


class KillAtRandom(Callback):
    """SIGKILL at a random moment: of the process's life, or of one of its saves. Each rank has its own moment.

    A file named "saving" stands in `folder` from the start of each save to the first batch behind its end, so that
    whoever finds it there knows what the kill has interrupted.

    Args:
        seed: of the moment.
        during_save: count the moment from the start of a save.
        seconds: the moment is less than this after where the count starts.
    """

    def __init__(self, seed: int, during_save: bool, seconds: float, folder: str) -> None:
        self.during_save = during_save
        self.saves_before = random.Random(seed).randrange(3)
        self.delay = random.Random(f"{seed} {os.environ.get('LOCAL_RANK', '0')}").uniform(0, seconds)
        self.saving, self.saved = Path(folder) / "saving", Path(folder) / "nothing yet"
        if not during_save:
            self._start()

    def _start(self) -> None:
        def wait_and_die() -> None:
            time.sleep(self.delay)
            die()

        threading.Thread(target=wait_and_die, daemon=True).start()

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        self.saving.touch()
        self.saved = checkpoint_folder(trainer.default_root_dir, trainer.global_step)
        if self.during_save:
            if self.saves_before == 0:
                self._start()
            self.saves_before -= 1

    def on_train_batch_start(self, *_: Any) -> None:
        if (self.saved / MARKER).exists() or not self.saved.exists():  # complete, or failed and removed
            self.saving.unlink(missing_ok=True)
