"""Which checkpoints a run keeps, and what is never removed."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from model.checkpoint import (
    MARKER,
    CheckpointInfo,
    checkpoint_folder,
    find_checkpoints,
    resolve_checkpoint,
)
from tests.training.checkpoints import make_checkpoint, remove_old
from training.callbacks.checkpointing import CheckpointConfig, RunCheckpoint, checkpoints_to_keep, make_room
from training.faults.progress import Progress
from training.resume.start_point import choose_start
from training.throughput import StepClock


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


def test_ranks_that_found_different_checkpoints_name_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = choose_start(tmp_path / "b", str(make_checkpoint(tmp_path / "a", 5)))
    callback = RunCheckpoint(tmp_path / "b", CheckpointConfig(), start, "v", StepClock(), Progress())
    monkeypatch.setattr("training.callbacks.checkpointing.gather_objects", lambda own: [own, "step 0"])
    with pytest.raises(ValueError, match="rank 0 starts from .*step-00000005, rank 1 from step 0: .* nodes share"):
        callback.setup(None, None, "fit")  # type: ignore[arg-type]
