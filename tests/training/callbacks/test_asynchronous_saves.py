"""Saves that are written while training goes on: the same files, at most one at a time, none lost at the end."""

import csv
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.exits import INTERRUPTED
from model.checkpoint import MARKER, checkpoint_folder, find_checkpoints, read_complete, write_complete
from model.loading import StoredTensors
from tests.training.conftest import TrainProcess, assert_same_weights, callbacks
from training.callbacks.checkpointing import CheckpointConfig, RunCheckpoint
from training.distributed import checkpoint_writer
from training.distributed.checkpoint_state import Fragment, SaveError, TrainingState
from training.distributed.checkpoint_writer import BackgroundSave, HostCopy, begin_copy, take_share

ASYNCHRONOUS = ("--checkpoint.asynchronous", "true")
CPU = torch.device("cpu")


def steps_of(run_dir: Path) -> list[int]:
    return [info.step for info in find_checkpoints(run_dir)[0]]


def contents(folder: Path) -> dict[str, object]:
    """Bytes of all files of a checkpoint, but of its marker what does not depend on when and by which code."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    marker = json.loads((folder / MARKER).read_bytes())
    return found | {MARKER: {key: marker[key] for key in marker.keys() - {"created", "checksum", "code_version"}}}


@pytest.mark.parametrize(
    ("processes", "stage", "held", "optimizer"),
    [(1, 0, None, "muon"), (2, 0, 1, "adamw"), (2, 0, 0, "adamw"), (2, 3, None, "adamw")],
)
def test_training_goes_on_and_the_files_are_those_of_a_synchronous_save(
    processes: int, stage: int, held: int | None, optimizer: str, train: TrainProcess, tmp_path: Path
) -> None:
    """The writer is held for three steps, whose changes it must not see."""
    options = ("--trainer.devices", processes, "--data.micro_batch_size", 2 // processes, "--trainer.max_steps", 12)
    options += (
        "--parallel.zero_stage",
        stage,
        "--checkpoint.milestones",
        "[5,10]",
        "--model.optimizer.name",
        optimizer,
    )
    plain = train("--run_dir", tmp_path / "plain", *options)
    assert plain.returncode == 0, plain.stderr
    hold = callbacks(("HoldWriter", {"step": 5, "until": 8, "seconds": 0.2, "rank": held}))
    done = train("--run_dir", tmp_path / "run", *options, *ASYNCHRONOUS, hold)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert steps_of(tmp_path / "run") == [5, 10, 12]
    for step in (5, 10, 12):
        ours, theirs = (contents(checkpoint_folder(tmp_path / name, step)) for name in ("run", "plain"))
        assert ours == theirs
    resumed = train("--run_dir", tmp_path / "resumed", "--resume", checkpoint_folder(tmp_path / "run", 5), *options)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(tmp_path / "resumed", tmp_path / "plain")


def test_the_next_save_and_the_end_wait_and_their_time_is_logged(train: TrainProcess, tmp_path: Path) -> None:
    """HoldWriter sees to it that no two saves are under way."""
    held = [("HoldWriter", {"step": 5, "until": 10, "seconds": 1}), ("HoldWriter", {"step": 15, "until": 20})]
    done = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, callbacks(*held))  # type: ignore[arg-type]
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert steps_of(tmp_path / "run") == [15, 20]
    with (tmp_path / "run" / "metrics" / "step-00000000" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["checkpoint/stall_seconds"]]
    stalls = [float(row["checkpoint/stall_seconds"]) for row in rows]
    writes = [float(row["checkpoint/write_seconds"] or 0) for row in rows]
    assert len(rows) == 4 and writes[0] > stalls[0] >= 1 and rows[0]["step"] == "10"
    assert stalls[1] < 1 and writes[3] == 0  # the last save of a session is synchronous


def test_a_signal_waits_for_the_save_under_way(train: TrainProcess, tmp_path: Path) -> None:
    hold = {"step": 5, "until": 8, "seconds": 0.5}
    signalled = callbacks(("HoldWriter", hold), ("SignalInStep", {"step": 7, "rank": 0, "name": "SIGTERM"}))
    stopped = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, "--interruption.grace_seconds", 0.1, signalled)
    assert stopped.returncode == INTERRUPTED, stopped.stderr
    assert steps_of(tmp_path / "run") == [5, 8] and "at step 8, which is saved" in stopped.stderr


def test_a_step_that_does_not_end_in_time_is_left_when_the_writer_has_ended(
    train: TrainProcess, tmp_path: Path
) -> None:
    stuck = ("SignalInStep", {"step": 7, "rank": 0, "name": "SIGTERM"}), ("Hang", {"step": 7, "rank": 0})
    hold = callbacks(("HoldWriter", {"step": 5, "until": 7, "seconds": 1.5}), *stuck)
    stopped = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, "--interruption.grace_seconds", 0.1, hold)
    assert stopped.returncode == INTERRUPTED and "(interruption.grace_seconds)" in stopped.stderr, stopped.stderr
    assert steps_of(tmp_path / "run") == [5]


def test_training_that_ends_without_another_save_waits_for_the_one_under_way(
    train: TrainProcess, tmp_path: Path
) -> None:
    hold = callbacks(("HoldWriter", {"step": 5, "until": 5, "seconds": 0.5}), ("StopInValidation", {}))
    options = ("--trainer.devices", 2, "--data.micro_batch_size", 1, "--validation.every_n_steps", 5)
    stopped = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, *options, hold)
    assert stopped.returncode == 0 and "step 6/" not in stopped.stderr, stopped.stderr
    assert steps_of(tmp_path / "run") == [5]


def test_a_crash_of_training_lets_the_writer_end(train: TrainProcess, tmp_path: Path) -> None:
    disturbed = callbacks(("HoldWriter", {"step": 5, "until": 7, "seconds": 0.5}), ("Crash", {"step": 7}))
    crashed = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, disturbed)
    assert crashed.returncode == 1 and "crashed as asked" in crashed.stderr
    assert steps_of(tmp_path / "run") == [5] and "warning" not in crashed.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_crash_of_training_says_so_where_the_save_is_lost(
    processes: int, train: TrainProcess, tmp_path: Path
) -> None:
    disturbed = callbacks(("FullDisk", {"rank": 0, "steps": [5] * (processes == 1)}), ("Crash", {"step": 6}))
    options = ("--trainer.devices", processes, "--data.micro_batch_size", 2 // processes)
    crashed = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, *options, disturbed)
    assert crashed.returncode == 1 and "crashed as asked" in crashed.stderr
    why = {1: "rank 0: [Errno 28] No space left on device", 2: "training has failed while it was being written"}
    assert f"warning: no checkpoint of step 5: {why[processes]}" in crashed.stderr
    assert steps_of(tmp_path / "run") == []


def test_a_full_disk_ends_the_run_at_the_next_boundary_and_names_the_step(train: TrainProcess, tmp_path: Path) -> None:
    full = callbacks(("FullDisk", {"rank": 0, "steps": [10]}))
    options = ("--checkpoint.max_failed_saves", 1, "--trainer.max_steps", 100)
    stopped = train("--run_dir", tmp_path / "run", *ASYNCHRONOUS, *options, full)
    assert stopped.returncode == 1
    assert "warning: no checkpoint of step 10 (1 of checkpoint.max_failed_saves 1 in a row): rank 0: " in stopped.stderr
    assert "No space left on device" in stopped.stderr and "step 20/" not in stopped.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def state() -> TrainingState:
    shapes = {"weight/a": (2, 3), "weight/b": (4,)}
    fragments = [Fragment(key, 0, torch.arange(float(torch.Size(shape).numel()))) for key, shape in shapes.items()]
    return TrainingState(shapes, fragments, replicated=True, steps={})


def test_what_is_copied_stays_as_it_was_and_memory_is_used_again(tmp_path: Path) -> None:
    trained, copy = state(), HostCopy()
    taken = take_share(tmp_path, trained, CPU, b"rest", copy)
    for fragment in trained.fragments:
        fragment.values.zero_()
    ((_, tensors),) = taken.files
    assert tensors["weight/a"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["weight/b"].tolist() == [0, 1, 2, 3]
    ((_, again),) = take_share(tmp_path, trained, CPU, b"rest", copy).files
    assert again["weight/b"].data_ptr() == tensors["weight/b"].data_ptr() and not again["weight/b"].any()


def test_room_begun_ahead_is_the_room_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, host_memory, copy = [], checkpoint_writer.host_memory, HostCopy()
    monkeypatch.setattr(checkpoint_writer, "host_memory", lambda n, device: asked.append(n) or host_memory(n, device))
    assert not copy.begun
    begin_copy(state(), CPU, copy)
    assert copy.begun
    ((_, tensors),) = take_share(tmp_path, state(), CPU, b"rest", copy).files
    assert asked == [10] and tensors["weight/b"].tolist() == [0, 1, 2, 3]


def test_the_marker_comes_last_and_is_there_when_finished(tmp_path: Path) -> None:
    taken, go, there = take_share(tmp_path, state(), CPU, b"rest", HostCopy()), threading.Event(), []

    def complete(checksums: dict[str, str]) -> None:
        go.wait(30)
        there.append(sorted(path.name for path in tmp_path.iterdir()))
        write_complete(tmp_path, {"step": 3}, checksums=checksums)

    save = BackgroundSave(taken, complete)
    assert not save.written
    go.set()
    save.finish()
    assert save.written and save.seconds > 0 and there == [["state-00000.safetensors", "trainer.ckpt"]]
    assert StoredTensors(read_complete(tmp_path))["weight/b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(5, "Input/output error", "x"), SaveError), (ZeroDivisionError(), ZeroDivisionError)]
)
def test_what_goes_wrong_in_the_thread_is_raised_by_finish(
    error: Exception, raised: type[Exception], tmp_path: Path
) -> None:
    def complete(checksums: dict[str, str]) -> None:
        raise error

    with pytest.raises(raised):
        BackgroundSave(take_share(tmp_path, state(), CPU, None, HostCopy()), complete).finish()
    with pytest.raises(SaveError, match="rank 0: .*No such file"):
        BackgroundSave(take_share(tmp_path / "missing", state(), CPU, None, HostCopy()), lambda _: None).finish()


@pytest.mark.parametrize(
    ("start", "max_steps", "milestones", "first"),
    [(0, 12, [], 1), (0, 6, [], 1), (0, 5, [], None), (0, 4, [], None), (0, 4, [3], 1), (0, 5, [5], None),
     (10, 16, [], 11), (10, 14, [], None), (10, 14, [3], None), (11, 14, [12], 12)],
)  # fmt: skip
def test_host_memory_is_taken_where_a_save_in_the_background_follows(
    start: int, max_steps: int, milestones: list[int], first: int | None, tmp_path: Path
) -> None:
    """Saves every 5 steps; that of the session's last step is written at once."""
    config = CheckpointConfig(every_n_steps=5, milestones=milestones, asynchronous=True)
    begun: list[int] = []
    trainer: Any = SimpleNamespace(max_steps=max_steps, should_stop=False)
    trainer.strategy = SimpleNamespace(begin_copy=lambda _: begun.append(trainer.global_step))
    stub: Any = SimpleNamespace(step=start, paused=nullcontext)
    ours = RunCheckpoint(tmp_path, config, stub, "version", stub, stub)
    ours.save = lambda *_: None  # type: ignore[method-assign]
    for step in range(start, max_steps + 1):
        trainer.global_step = step
        ours.on_train_batch_end(trainer, None, None, None, 0)
    assert begun[:1] == ([] if first is None else [first])
