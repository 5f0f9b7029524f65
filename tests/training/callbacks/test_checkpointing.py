"""Choosing, comparing, keeping and surviving checkpoints."""

import errno
import json
import os
import shutil
import signal
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from common.errors import error_line
from model.checkpoint import (
    EXPORT_CONFIG,
    MARKER,
    TRAINER_STATE,
    CheckpointInfo,
    checkpoint_folder,
    find_checkpoints,
    resolve_checkpoint,
)
from model.checkpoint import write_complete as mark
from model.config import ModelConfig
from model.loading import load_model
from tests.training.conftest import TrainProcess, callbacks, stored_tensors
from training.callbacks.checkpointing import CheckpointConfig, RunCheckpoint, checkpoints_to_keep, make_room
from training.resume.start_point import StartPoint, check_architecture, check_tokenizer, choose_start, read_data_state
from training.throughput import StepClock


def make_checkpoint(run_dir: Path, step: int, complete: bool = True) -> Path:
    folder = checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE).write_bytes(b"0123456789")
    if complete:
        mark(folder, {"step": step, "samples": 4 * step, "tokens": 64 * step})
    return folder


def test_a_new_run_starts_at_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resume in ("none", "auto"):
        start = choose_start(tmp_path / "new", resume)
        assert (start.step, start.samples, start.tokens, start.trainer_state) == (0, 0, 0, None)
    assert "has no complete checkpoint, starting from step 0" in capsys.readouterr().err


def test_auto_takes_the_newest_complete_one_and_names_those_it_passes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 15, complete=False)
    (make_checkpoint(tmp_path, 20) / TRAINER_STATE).write_bytes(b"cut")
    start = choose_start(tmp_path, "auto")
    assert (start.step, start.samples, start.tokens) == (10, 40, 640)
    assert start.trainer_state == checkpoint_folder(tmp_path, 10) / TRAINER_STATE
    printed = capsys.readouterr().err
    assert "resuming from" in printed and "step-00000010 (step 10)" in printed
    passed_over = [line for line in printed.splitlines() if line.startswith("passing over")]
    assert len(passed_over) == 2 and "step-00000015" in passed_over[0] and "step-00000020" in passed_over[1]


def of_another_format(run_dir: Path, step: int) -> Path:
    marker = make_checkpoint(run_dir, step) / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 3}))
    return marker.parent


def test_a_newest_one_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    newest = of_another_format(tmp_path, 10)
    with pytest.raises(ValueError, match=rf"{newest}/{MARKER} has format 3, expected 2: .* takes --resume .*00000005"):
        choose_start(tmp_path, "auto")
    with pytest.raises(ValueError, match="format 3"):
        resolve_checkpoint(tmp_path)
    assert choose_start(tmp_path, str(checkpoint_folder(tmp_path, 5))).step == 5
    remove_old(tmp_path)
    assert newest.exists()
    shutil.rmtree(checkpoint_folder(tmp_path, 5))
    for resume in ("auto", "none"):
        with pytest.raises(ValueError, match="format 3.* another --run_dir"):
            choose_start(tmp_path, resume)
    make_checkpoint(tmp_path, 15)  # an older one is in nobody's way
    assert choose_start(tmp_path, "auto").step == resolve_checkpoint(tmp_path).step == 15


def test_where_all_are_damaged_no_run_starts_over(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 5) / MARKER).write_text("{}")
    (make_checkpoint(tmp_path, 10) / TRAINER_STATE).write_bytes(b"cut")
    for resume in ("auto", "none", str(make_checkpoint(tmp_path / "other", 3))):
        with pytest.raises(ValueError, match="trainer.ckpt has 3 bytes, expected 10.* another --run_dir"):
            choose_start(tmp_path, resume)


def test_damaged_ones_are_never_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15):
        make_checkpoint(tmp_path, step)
    for content in ("", "[]", '{"format": 2}', "\x00"):
        (checkpoint_folder(tmp_path, 15) / MARKER).write_text(content)
        assert choose_start(tmp_path, "auto").step == 10
        remove_old(tmp_path)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    with pytest.raises(ValueError, match="the newest complete one is .*step-00000010"):
        resolve_checkpoint(tmp_path)
    for number in (1, 2):  # trained again up to there
        make_room(checkpoint_folder(tmp_path, 15))
        assert f"stays as step-00000015.replaced-{number}" in capsys.readouterr().err
        make_checkpoint(tmp_path, 15)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5


REFUSED = OSError(errno.EIO, os.strerror(errno.EIO))  # of a read, which names no file


def refused(*_: object, **__: object) -> NoReturn:
    raise REFUSED


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("pathlib.Path.read_bytes", MARKER),
        ("model.loading.file_checksum", TRAINER_STATE),
        ("model.loading.safe_open", "state-00000.safetensors"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged_and_stays(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        folder = make_checkpoint(tmp_path, step, complete=False)
        save_file({"weight/a": torch.zeros(3)}, folder / "state-00000.safetensors")
        mark(folder, {"step": step, "samples": 4 * step, "tokens": 64 * step})
    assert choose_start(tmp_path, "auto", "checksum").step == 10
    monkeypatch.setattr(place, refused)
    with pytest.raises(OSError) as caught:
        choose_start(tmp_path, "auto", "checksum")
    line = error_line(caught.value)
    assert f"/{name}" in line and "Input/output error" in line and "is damaged" not in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no archive", "cannot be read"),
        ([1], "holds a list, expected an object"),
        ({}, "lacks 'Data', expected an object"),
        ({"Data": {}, "global_step": "5"}, "has a string as 'global_step', expected a whole number"),
    ],
)
def test_a_trainer_state_without_what_a_run_needs_is_named(content: object, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5, complete=False)
    if isinstance(content, bytes):
        (folder / TRAINER_STATE).write_bytes(content)
    else:
        torch.save(content, folder / TRAINER_STATE)
    mark(folder, {"step": 5, "samples": 20, "tokens": 320})
    with pytest.raises(ValueError, match=f"{folder / TRAINER_STATE} {message}.*; choose another checkpoint"):
        read_data_state(resolve_checkpoint(folder), "Data")


def test_names_that_are_not_ours_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        make_checkpoint(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    copies = ["step-00000005-best", "step-best", "step-5", "step-000000005", "best"]
    for name in copies:
        shutil.copytree(checkpoint_folder(tmp_path, 5), checkpoints / name)
    (checkpoints / "step-00000005.txt").write_text("notes")
    (checkpoints / "step-00000003").symlink_to(checkpoint_folder(tmp_path, 5), target_is_directory=True)
    remove_old(tmp_path)
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {*copies, "step-00000010", "step-00000015", "step-00000005.txt"}
    assert [info.step for info in find_checkpoints(tmp_path)[0]] == [10, 15]
    assert resolve_checkpoint(checkpoints / "step-best").step == 5


def remove_old(run_dir: Path) -> None:
    RunCheckpoint(run_dir, CheckpointConfig(keep_last=2), StartPoint(), "v", StepClock()).remove_old()


def test_starting_over_existing_checkpoints_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=rf"{tmp_path} already has .* step 5: .*--resume auto, or choose another"):
        choose_start(tmp_path, "none")


def test_paths(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path / "a", 5), make_checkpoint(tmp_path / "a", 10)
    broken = make_checkpoint(tmp_path / "a", 15, complete=False)
    assert choose_start(tmp_path / "b", str(old)).step == 5
    assert choose_start(tmp_path / "b", str(tmp_path / "a")).step == 10
    assert choose_start(tmp_path / "a", str(new)).step == 10
    with pytest.raises(ValueError, match="step-00000005 is not the newest .* step-00000010"):
        choose_start(tmp_path / "a", str(old))
    with pytest.raises(ValueError, match=f"no complete checkpoint.*{MARKER}"):
        choose_start(tmp_path / "b", str(broken))
    with pytest.raises(FileNotFoundError, match="missing"):
        choose_start(tmp_path / "b", str(tmp_path / "missing"))


def test_another_architecture_lists_the_differing_keys() -> None:
    saved = {"n_layers": 2, "d_model": 8, "attention": {"kind": "softmax", "backend": "torch"}}
    checkpoint = CheckpointInfo(Path("x"), 1, {"model": saved})
    check_architecture(checkpoint, {**saved, "attention": {"kind": "softmax", "backend": "auto"}})
    other = {"n_layers": 3, "d_model": 8, "attention": {"kind": "entmax", "backend": "auto"}, "new": 1}
    with pytest.raises(ValueError) as caught:
        check_architecture(checkpoint, other)
    message = str(caught.value)
    assert "attention.kind 'softmax' (config: 'entmax'), n_layers 2 (config: 3), new None (config: 1);" in message
    assert "d_model" not in message and "backend" not in message


def test_keys_that_are_newer_than_a_checkpoint_have_their_defaults() -> None:
    architecture = asdict(ModelConfig())
    old = {**architecture, "attention": {k: v for k, v in architecture["attention"].items() if k != "anneal_steps"}}
    check_architecture(CheckpointInfo(Path("x"), 1, {"model": old}), architecture)
    architecture["attention"] = {**architecture["attention"], "anneal_steps": 5}
    with pytest.raises(ValueError, match=r"attention.anneal_steps 0 \(config: 5\)"):
        check_architecture(CheckpointInfo(Path("x"), 1, {"model": old}), architecture)


def test_another_tokenizer() -> None:
    checkpoint = CheckpointInfo(Path("x"), 1, {"tokenizer": {"path": "a.model", "fingerprint": "1" * 64}})
    check_tokenizer(checkpoint, "elsewhere.model", "1" * 64)
    with pytest.raises(ValueError, match="a.model.*the data has b.model"):
        check_tokenizer(checkpoint, "b.model", "2" * 64)


@pytest.mark.parametrize(("field", "value"), [("keep_last", 1), ("every_n_steps", 0)])
def test_bad_config(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{field} is {value}: expected .*at least"):
        CheckpointConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("keep_every_hours", -1, r".*at least 0 .*\(0: never\)"),
        ("keep_every_hours", 1e30, ".* at most 1,000,000"),
        ("keep_every_hours", float("nan"), "expected a finite number"),
        ("milestones", [0], "expected steps, at least 1"),
        ("max_failed_saves", 0, "expected a whole number at least 1"),
    ],
)
def test_bad_policy(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint.{field} is .*: {message}"):
        CheckpointConfig(**{field: value})  # type: ignore[arg-type]


def test_hourly_ones_and_milestones_are_kept_whenever_the_policy_is_applied() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    made = [
        CheckpointInfo(Path(str(step)), step, {"created": (begin + timedelta(minutes=30 * step)).isoformat()})
        for step in range(1, 21)
    ]
    config = CheckpointConfig(keep_last=2, keep_every_hours=4, milestones=[3, 12])
    alive: list[CheckpointInfo] = []
    for info in made:
        kept = {one.step for one in checkpoints_to_keep([*alive, info], config)}
        alive = [one for one in [*alive, info] if one.step in kept]
    assert [info.step for info in alive] == [1, 3, 9, 12, 17, 19, 20]
    assert [info.step for info in checkpoints_to_keep(made, CheckpointConfig(keep_last=2))] == [19, 20]


@pytest.mark.parametrize("record", [{}, {"created": 3}, {"created": "yesterday"}])
def test_what_has_no_time_is_kept(record: dict[str, object]) -> None:
    made = [CheckpointInfo(Path(str(step)), step, record) for step in range(4)]
    kept = checkpoints_to_keep(made, CheckpointConfig(keep_last=2, keep_every_hours=1))
    assert {info.step for info in kept} == {0, 1, 2, 3}


def test_a_marker_without_the_trainers_state_is_one_line(tmp_path: Path) -> None:
    marker = make_checkpoint(tmp_path, 5) / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": {}}))
    with pytest.raises(ValueError, match=f"step-00000005 has no {TRAINER_STATE} among its files; choose another"):
        choose_start(tmp_path, "auto")


def test_an_exported_model_is_no_checkpoint(tmp_path: Path) -> None:
    mark(tmp_path, {"step": 5}, marker=EXPORT_CONFIG)
    with pytest.raises(ValueError, match="is an exported model: it has weights only"):
        choose_start(tmp_path / "run", str(tmp_path))


def test_ranks_that_found_different_checkpoints_name_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = choose_start(tmp_path / "b", str(make_checkpoint(tmp_path / "a", 5)))
    callback = RunCheckpoint(tmp_path / "b", CheckpointConfig(), start, "v", StepClock())
    monkeypatch.setattr("training.callbacks.checkpointing.gather_objects", lambda own: [own, "step 0"])
    with pytest.raises(ValueError, match="rank 0 starts from .*step-00000005, rank 1 from step 0: .* nodes share"):
        callback.setup(None, None, "fit")  # type: ignore[arg-type]


def test_old_ones_are_removed_marker_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10, 15, 20):
        make_checkpoint(tmp_path, step, complete=step != 10)
    seen: list[tuple[str, bool]] = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        "training.callbacks.checkpointing.shutil.rmtree",
        lambda f: (seen.append((f.name, (f / MARKER).exists())), rmtree(f)),
    )
    remove_old(tmp_path)
    assert sorted(seen) == [("step-00000005", False), ("step-00000010", False)]
    assert [info.step for info in find_checkpoints(tmp_path)[0]] == [15, 20]


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


@pytest.fixture(scope="module")
def undisturbed(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train("--run_dir", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


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


def test_sigkill_during_a_save_leaves_the_previous_checkpoint(
    undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    run_dir, left = tmp_path / "run", checkpoint_folder(tmp_path / "run", 10)
    options, state = ("--run_dir", run_dir, "--resume", "auto"), "state-00000.safetensors"
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


def test_a_full_disk_on_one_rank_costs_a_checkpoint_and_then_the_run(
    undisturbed: Path, train: TrainProcess, tmp_path: Path
) -> None:
    run_dir, two = tmp_path / "run", ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    options = ("--run_dir", run_dir, "--resume", "auto", "--checkpoint.max_failed_saves", 2, *two)
    full = callbacks(("FullDisk", {"rank": 1, "steps": [10, 15]}))
    stopped = train(*options, full, "--checkpoint.every_n_steps", 5)
    assert stopped.returncode == 1
    for number, step in ((1, 10), (2, 15)):
        said = f"warning: no checkpoint of step {step} ({number} of checkpoint.max_failed_saves 2 in a row): rank 1: "
        assert said in stopped.stderr
    assert "No space left on device" in stopped.stderr
    assert f"the newest complete checkpoint is {checkpoint_folder(run_dir, 5)}" in stopped.stderr
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
