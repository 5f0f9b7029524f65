"""Checkpoints with a flipped bit: --resume auto sets them aside and takes the one before; nothing is removed."""

import shutil
from pathlib import Path

import pytest

from common.exits import INTERRUPTED
from model.checkpoint import MARKER, TRAINER_STATE, checkpoint_folder, find_checkpoints
from tests.training.conftest import TrainProcess, assert_same_weights

DAMAGED = "step-00000020.damaged-1"


@pytest.fixture
def run_dir(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished run with the checkpoints of steps 15 and 20."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def flip(run_dir: Path, step: int, name: str = "state-00000.safetensors") -> bytes:
    """Flip a bit in the last byte of a checkpoint's file, which belongs to a tensor; returns the file's content."""
    path = checkpoint_folder(run_dir, step) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return bytes(content)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["state-00000.safetensors", TRAINER_STATE])
def test_a_finished_run_whose_last_checkpoint_is_damaged_trains_its_end_again(
    name: str, run_dir: Path, undisturbed: Path, train: TrainProcess
) -> None:
    flipped = flip(run_dir, 20, name)
    done = train("--run_dir", run_dir, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert f"step-00000020/{name} is damaged" in line
    assert line.endswith(f"; it stays as {DAMAGED}, and the run goes on from step-00000015"), line
    assert_same_weights(run_dir, undisturbed)
    assert names(run_dir) == ["step-00000015", "step-00000020", DAMAGED]
    aside = run_dir / "checkpoints" / DAMAGED
    assert (aside / name).read_bytes() == flipped and (aside / MARKER).is_file()
    again = train("--run_dir", run_dir, "--resume", "auto")
    assert again.returncode == 0 and "already at step 20" in again.stderr and "damaged" not in again.stderr


def test_it_stays_beside_later_saves(run_dir: Path, train: TrainProcess) -> None:
    flip(run_dir, 20)
    longer = ("--trainer.max_steps", 40, "--allow_changes", "[trainer.max_steps]")
    done = train("--run_dir", run_dir, "--resume", "auto", *longer)
    assert done.returncode == 0, done.stderr
    assert names(run_dir) == [DAMAGED, "step-00000035", "step-00000040"]


def test_several_ranks_set_it_aside_and_the_same_command_goes_on(run_dir: Path, train: TrainProcess) -> None:
    longer = ("--trainer.max_steps", 25, "--allow_changes", "[trainer.max_steps]", "--trainer.devices", 2)
    for options in (longer, ("--trainer.devices", 2)):  # with something to train, and at the last step
        flip(run_dir, max(step for step in (20, 25) if checkpoint_folder(run_dir, step).exists()))
        newest = find_checkpoints(run_dir)[0][-1].path
        first = train("--run_dir", run_dir, "--resume", "auto", *options, "--checkpoint.keep_last", 3)
        assert first.returncode == INTERRUPTED, first.stderr
        (line,) = [line for line in first.stderr.splitlines() if line.startswith("warning: ")]
        assert f"it stays as {newest.name}.damaged-1: the same command with --resume auto goes on from step-" in line
        assert not newest.exists() and newest.with_name(f"{newest.name}.damaged-1").is_dir()
        second = train("--run_dir", run_dir, "--resume", "auto", *longer, "--checkpoint.keep_last", 3)
        assert second.returncode == 0, second.stderr


def test_where_none_is_whole_no_run_starts_over(run_dir: Path, train: TrainProcess) -> None:
    for step in (15, 20):
        flip(run_dir, step)
    before = names(run_dir)
    for more in ((), ("--trainer.devices", 2)):
        if more:
            shutil.rmtree(checkpoint_folder(run_dir, 15))
            before = ["step-00000020"]
        done = train("--run_dir", run_dir, "--resume", "auto", *more)
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ") and "step-00000020/state-00000.safetensors is damaged" in line
        assert names(run_dir) == before


def test_a_path_is_what_was_asked_for_and_is_refused(run_dir: Path, train: TrainProcess) -> None:
    flip(run_dir, 20)
    done = train("--run_dir", run_dir, "--resume", checkpoint_folder(run_dir, 20))
    assert done.returncode == 2 and "step-00000020/state-00000.safetensors is damaged" in done.stderr, done.stderr
    assert names(run_dir) == ["step-00000015", "step-00000020"]
    unchecked = train("--run_dir", run_dir, "--resume", "auto", "--checkpoint.verify", "size")
    assert unchecked.returncode == 0 and "already at step 20" in unchecked.stderr
