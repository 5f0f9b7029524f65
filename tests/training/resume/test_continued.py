"""Runs that were killed, ran out of disk or were changed: what they continue from, and that they end the same."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from model.checkpoint import (
    MARKER,
    TRAINER_STATE,
    checkpoint_folder,
    find_checkpoints,
)
from model.loading import load_model
from tests.training.conftest import TrainProcess, callbacks, stored_tensors


def trained_state(run_dir: Path, step: int) -> dict[str, object]:
    state = torch.load(checkpoint_folder(run_dir, step) / TRAINER_STATE, weights_only=True)
    lightning = {key: state[key] for key in ("lr_schedulers", "PackedDataModule", "optimizer_steps")}
    return {**lightning, "tensors": stored_tensors(run_dir, step)}


def assert_same_bits(ours: object, theirs: object, where: str = "") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert isinstance(theirs, dict) and ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same_bits(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert isinstance(theirs, list | tuple) and len(ours) == len(theirs), where
        for index, value in enumerate(ours):
            assert_same_bits(value, theirs[index], f"{where}/{index}")
    else:
        assert ours == theirs, where


def test_ten_steps_sigkill_ten_steps_equals_twenty_steps(
    undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("--run_dir", run_dir, "--checkpoint.every_n_steps", 10)
    killed = train(*options, callbacks(("KillAfterStep", {"step": 12})))
    assert killed.returncode == -signal.SIGKILL
    assert [info.step for info in find_checkpoints(run_dir)[0]] == [10]
    resumed = train(*options, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000010 (step 10)" in resumed.stderr
    assert_same_bits(trained_state(run_dir, 20), trained_state(undisturbed, 20))
    # Lightning's hyper_parameters would be restored over the config; the rest of the run is recorded by session.
    assert "hyper_parameters" not in torch.load(checkpoint_folder(run_dir, 20) / TRAINER_STATE, weights_only=True)
    assert {p.parent.name for p in run_dir.glob("metrics/*/metrics.csv")} == {
        "step-00000000",
        "step-00000010",
    }
    loaded = load_model(run_dir)
    assert (loaded.step, loaded.training_length) == (20, 64)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_sigkill_during_a_save_leaves_the_previous_checkpoint(
    asynchronous: bool, undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    run_dir, left = tmp_path / "run", checkpoint_folder(tmp_path / "run", 10)
    options = ("--run_dir", run_dir, "--resume", "auto", "--checkpoint.asynchronous", asynchronous)
    state = "state-00000.safetensors"
    stages = {"nothing": set(), "part": {state}, "state": {state}, "marker": {state, TRAINER_STATE}}
    for stage, files in stages.items():
        killed = train(*options, callbacks(("KillDuringSave", {"step": 10, "stage": stage})))
        assert killed.returncode == -signal.SIGKILL
        complete, incomplete = find_checkpoints(run_dir)
        assert [info.step for info in complete] == [5]
        assert len(incomplete) == 1 and left.name in incomplete[0]
        assert {path.name for path in left.iterdir()} == files
    resumed = train(*options)
    assert resumed.returncode == 0, resumed.stderr
    assert f"passing over: {left}" in resumed.stderr and "step-00000005 (step 5)" in resumed.stderr
    assert_same_bits(trained_state(run_dir, 20), trained_state(undisturbed, 20))
    assert [info.step for info in find_checkpoints(run_dir)[0]] == [15, 20]
    assert not find_checkpoints(run_dir)[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_costs_a_checkpoint_and_then_the_run(
    asynchronous: bool, undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    run_dir, two = tmp_path / "run", ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    two = (*two, "--checkpoint.asynchronous", asynchronous)  # type: ignore[assignment]
    options = ("--run_dir", run_dir, "--resume", "auto", "--checkpoint.max_failed_saves", 2, *two)
    full = callbacks(("FullDisk", {"rank": 1, "steps": [10, 15]}))
    stopped = train(*options, full, "--checkpoint.every_n_steps", 5)
    assert stopped.returncode == 1
    for number, step in ((1, 10), (2, 15)):
        said = f"warning: no checkpoint of step {step} ({number} of checkpoint.max_failed_saves 2 in a row): rank 1: "
        assert said in stopped.stderr
    assert "Traceback" not in stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {checkpoint_folder(run_dir, 15)} could not be written (rank 1: ")
    assert "No space left on device" in line and "): make room (up to 1 MiB for each checkpoint) or repair" in line
    assert line.endswith(f"the newest complete checkpoint is {checkpoint_folder(run_dir, 5)}")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005"]
    # one failure, then room again; of its last checkpoints one is truncated and one has lost the file of a rank
    done = train(*options, callbacks(("FullDisk", {"rank": 1, "steps": [10]})), "--checkpoint.keep_last", 3)
    assert done.returncode == 0, done.stderr
    assert [info.step for info in find_checkpoints(run_dir)[0]] == [5, 15, 20]
    (checkpoint_folder(run_dir, 20) / "state-00001.safetensors").unlink()
    (checkpoint_folder(run_dir, 15) / "state-00000.safetensors").write_bytes(b"cut")
    # what was complete once stays, beside what is trained again
    again = train(*options)
    assert again.returncode == 0, again.stderr
    passed_over = [line for line in again.stderr.splitlines() if line.startswith("passing over")]
    assert "step-00000015/state-00000.safetensors has 3 bytes" in passed_over[0]
    assert "step-00000020/state-00001.safetensors is missing" in passed_over[1]
    assert "step-00000005 (step 5)" in again.stderr
    assert (checkpoint_folder(run_dir, 15).with_name("step-00000015.replaced-1") / MARKER).is_file()
    ours, theirs = stored_tensors(run_dir, 20), stored_tensors(undisturbed, 20)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_flipped_byte_ends_the_resume_with_file_and_tensor(
    undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    half = shutil.copytree(checkpoint_folder(undisturbed, 15), tmp_path / "copy")
    state, options = half / "state-00000.safetensors", ("--run_dir", tmp_path / "run", "--resume", half)
    position = state.read_bytes().index(stored_tensors(undisturbed, 15)["weight/norm.weight"].numpy().tobytes())
    with state.open("r+b") as file:
        file.seek(position)
        file.write(bytes([state.read_bytes()[position] ^ 1]))
    refused = train(*options)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(
        f"error: {state} is damaged: weight/norm.weight has checksum "
    )
    assert train(*options, "--checkpoint.verify", "size").returncode == 0


def test_resume_with_another_micro_batch_size_keeps_steps_whole(
    undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    half = checkpoint_folder(undisturbed, 15)
    done = train("--run_dir", tmp_path / "run", "--resume", half, "--data.micro_batch_size", 1)
    assert done.returncode == 0, done.stderr
    ours, theirs = (stored_tensors(run, 20) for run in (tmp_path / "run", undisturbed))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    meta = find_checkpoints(tmp_path / "run")[0][-1].meta
    assert (meta["samples"], meta["tokens"]) == (80, 80 * 64)
