"""What a run that resumes may change: said, or refused where it leaves the schedule it was trained with."""

from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import CheckpointInfo
from training.resume.settings import check_allowed, check_settings

BASE: dict[str, Any] = {
    "trainer.max_steps": 100, "trainer.gradient_clip_val": 1.0, "data.global_batch_size": 8, "model.optimizer.lr": 1e-3,
    "model.optimizer.schedule": "wsd", "model.optimizer.warmup_steps": 10, "model.optimizer.decay_fraction": 0.2,
}  # fmt: skip


def resumed(step: int, allowed: tuple[str, ...] = (), saved: object = BASE, **changes: Any) -> None:
    changed = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    check_settings(CheckpointInfo(Path("run/step"), step, {"settings": saved}), changed, allowed)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_nothing_changed_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    resumed(90)
    assert said(capsys) == ""


def test_a_run_in_its_stable_phase_is_extended(capsys: pytest.CaptureFixture[str]) -> None:
    resumed(80, trainer__max_steps=200)
    assert said(capsys) == (
        "changed since step: trainer.max_steps 100 (config: 200)\n"
        # the first of 20 steps from 1 to the default final_lr_fraction 0.1
        "learning rate of step 81: 0.001 by the new schedule, 0.000955 by the one so far "
        "(they agree in all steps so far)\n"
    )


def test_leave_says_what_the_learning_rate_becomes(capsys: pytest.CaptureFixture[str]) -> None:
    resumed(100, ("trainer.max_tokens",), trainer__max_steps=200, model__optimizer__lr=2e-3)
    assert said(capsys).splitlines()[1] == (
        "learning rate of step 101: 0.002 by the new schedule, 0.0001 by the one so far (by --allow_changes)"
    )
    resumed(90, model__optimizer__lr=5e-4)
    assert "learning rate of step" not in said(capsys)  # the schedule is as it was


@pytest.mark.parametrize(
    ("step", "changes", "option"),
    [
        (100, {"trainer__max_steps": 200}, "trainer.max_steps"),  # it has decayed
        (60, {"trainer__max_steps": 70}, "trainer.max_steps"),  # it would have decayed by now
        (50, {"model__optimizer__schedule": "cosine"}, "model.optimizer.schedule"),
        (50, {"model__optimizer__warmup_steps": 60}, "model.optimizer.warmup_steps"),
    ],
)
def test_another_schedule_needs_leave(
    step: int, changes: dict[str, Any], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{option} \w+ \(config: \w+\).*run/step.*next learning rate is [\d.e-]+, the config's [\d.e-]+\)"
        rf".* --allow_changes \"\[{option}\]\"$",
    ):
        resumed(step, **changes)
    resumed(step, (option,), **changes)
    assert f"changed since step: {option}" in said(capsys)


def test_all_options_without_leave_are_listed() -> None:
    changes = {"trainer__max_steps": 50, "model__optimizer__warmup_steps": 5}
    with pytest.raises(ValueError, match=r"\[model.optimizer.warmup_steps,trainer.max_steps\]"):
        resumed(50, **changes)
    with pytest.raises(ValueError, match=r"\[model.optimizer.warmup_steps\]"):
        resumed(50, ("trainer.max_steps",), **changes)


def test_other_changes_are_said_with_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    resumed(90, model__optimizer__lr=5e-4, data__global_batch_size=16, trainer__gradient_clip_val=None)
    text = said(capsys)
    assert "model.optimizer.lr 0.001 (config: 0.0005)" in text and "data.global_batch_size 8 (config: 16)" in text
    assert "trainer.gradient_clip_val 1.0 (config: None)" in text


def test_a_checkpoint_without_the_record_says_what_goes_unnoticed(capsys: pytest.CaptureFixture[str]) -> None:
    check_settings(CheckpointInfo(Path("run/step"), 5, {}), BASE, ())
    assert said(capsys).startswith("warning: run/step is older than the record of settings")


@pytest.mark.parametrize("saved", [[], {"trainer.max_steps": "x"}, {"model.optimizer.warmup_steps": None}])
def test_damaged_records_are_one_line(saved: object) -> None:
    with pytest.raises(ValueError, match="run/step"):
        resumed(50, saved=saved, trainer__max_steps=50)


def test_another_optimizer_is_refused() -> None:
    """Its state is another; no leave changes that. Records from before there was a choice are AdamW's."""
    for saved in (BASE, {**BASE, "model.optimizer.name": "adamw"}):
        resumed(50, saved=saved, model__optimizer__name="adamw")
        with pytest.raises(
            ValueError, match=r"name adamw \(config: muon\): run/step has the state of adamw.*init_from"
        ):
            resumed(50, ("trainer.max_steps",), saved=saved, model__optimizer__name="muon")
    with pytest.raises(ValueError, match=r"name muon \(config: adamw\)"):
        resumed(50, saved={**BASE, "model.optimizer.name": "muon"})


TEACHER = "model.distill.teacher"


@pytest.mark.parametrize(("before", "now"), [("a (step 1)", "b (step 2)"), ("a (step 1)", None), (None, "b (step 2)")])
def test_another_teacher_needs_leave(before: str | None, now: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Records from before there were teachers have none."""
    for saved in [{**BASE, TEACHER: before}] + ([BASE] if before is None else []):
        with pytest.raises(ValueError) as refused:
            resumed(50, ("trainer.max_steps",), saved=saved, model__distill__teacher=now)
        assert str(refused.value).startswith(f"{TEACHER} {before} (config: {now}): not what run/step was trained with")
        assert said(capsys) == ""
        resumed(50, (TEACHER,), saved=saved, model__distill__teacher=now)
        assert said(capsys) == f"changed since step: {TEACHER} {before} (config: {now})\n"
        resumed(50, saved=saved, model__distill__teacher=before)
        assert said(capsys) == ""


def test_leave_for_what_does_not_exist() -> None:
    check_allowed(["trainer.max_steps", "trainer.max_tokens", "model.optimizer.warmup_tokens", TEACHER])
    with pytest.raises(ValueError, match="--allow_changes has 'max_steps': expected some of trainer.max_steps, model"):
        check_allowed(["max_steps"])
