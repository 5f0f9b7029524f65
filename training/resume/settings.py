"""What else than model and data decides a run, and what of it a run that resumes may change."""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from common.nested import flatten
from model.checkpoint import WAY_OUT, CheckpointInfo
from training.module import LanguageModule
from training.step.optim import OptimizerConfig, lr_factor
from training.tracking import say

OPTIMIZER = "model.optimizer."
MAX_STEPS = "trainer.max_steps"
# Options in tokens, which a run counts in steps (training/length.py).
IN_STEPS = {"trainer.max_tokens": MAX_STEPS, f"{OPTIMIZER}warmup_tokens": f"{OPTIMIZER}warmup_steps"}
# These shape the learning rate over a run. Other settings may change at any step, which is said.
SCHEDULE = (
    MAX_STEPS,
    *(f"{OPTIMIZER}{key}" for key in ("schedule", "warmup_steps", "decay_fraction", "final_lr_fraction")),
)


NAME = f"{OPTIMIZER}name"
TEACHER = "model.distill.teacher"


def run_settings(trainer: Trainer, module: LanguageModule, global_batch_size: int) -> dict[str, Any]:
    """By option of train.py, JSON-able; recorded in each checkpoint. What only decides where and how fast a run
    computes is not among them."""
    distill: dict[str, Any] = {"teacher": None}
    if module.teacher:  # by what it is: a run's newest checkpoint changes while that run goes on
        distill = {**asdict(module.distill), "teacher": module.teacher.identity}
    settings = {
        "trainer": {
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
        "data": {"global_batch_size": global_batch_size},
        "model": {
            "z_loss": module.z_loss,
            "float8": module.float8,
            "distill": distill,
            "optimizer": {**asdict(module.optimizer_config), "betas": list(module.optimizer_config.betas)},
        },
    }
    if module.guard:
        guard = module.guard.config
        settings["guard"] = {"skip_nonfinite": guard.skip_nonfinite, "spike_deviations": guard.spike_deviations}
    return flatten(settings)


def check_allowed(allowed: Collection[str]) -> None:
    """Raises ValueError for what --allow_changes does not know."""
    for key in allowed:
        if IN_STEPS.get(key, key) not in (*SCHEDULE, TEACHER):
            known = ", ".join((*SCHEDULE, *IN_STEPS, TEACHER))
            raise ValueError(f"--allow_changes has {key!r}: expected some of {known}")


def warmup_of(checkpoint: CheckpointInfo | None) -> int | None:
    """The warm-up's steps that a checkpoint records; None where it records none."""
    settings = checkpoint.meta.get("settings") if checkpoint else None
    steps = settings.get(f"{OPTIMIZER}warmup_steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


def check_settings(checkpoint: CheckpointInfo, settings: dict[str, Any], allowed: Collection[str]) -> None:
    """Say what this session changes for a run that resumes.

    A schedule that agrees with the recorded one in all steps that were taken is an extension. One that does not would
    leave a run that neither schedule describes, and needs leave: `allowed`, the options in which it may differ. What
    either makes of the next step's learning rate is said. Another teacher, or none, needs leave too.

    Raises ValueError that lists the options without leave, with both values.
    """
    if "settings" not in checkpoint.meta:
        say(
            f"warning: {checkpoint.path} is older than the record of settings: if {MAX_STEPS}, learning rate, schedule "
            "or batch have changed, that goes unnoticed"
        )
        return
    saved = {TEACHER: None, **checkpoint.require(settings=dict)["settings"]}  # older records have none
    before, now = saved.get(NAME, "adamw"), settings.get(NAME, "adamw")  # older records have none
    if before != now:
        raise ValueError(
            f"{NAME} {before} (config: {now}): {checkpoint.path} has the state of {before}, which {now} cannot go on "
            "with; restore it, or start a new run from its weights with --init_from"
        )
    teachers = saved[TEACHER], settings.get(TEACHER)
    if teachers[0] != teachers[1] and TEACHER not in allowed:
        back = "leave it out" if teachers[0] is None else "give that one"
        raise ValueError(
            f"{TEACHER} {teachers[0]} (config: {teachers[1]}): not what {checkpoint.path} was trained with; "
            f'{back}, or go on with the change: --allow_changes "[{TEACHER}]"'
        )
    changed = [key for key in sorted(settings.keys() & saved.keys()) if settings[key] != saved[key]]
    if not changed:
        return
    both = {key: f"{key} {saved[key]} (config: {settings[key]})" for key in changed}
    rates = _rates(checkpoint, saved, settings) if set(changed) & set(SCHEDULE) else None
    given = {IN_STEPS.get(key, key) for key in allowed}
    refused = [key for key in changed if key in SCHEDULE and key not in given]
    if rates and refused and not rates.agree:
        raise ValueError(
            f"{', '.join(both[key] for key in refused)}: not the schedule that {checkpoint.path} was trained with "
            f"(its next learning rate is {rates.old:.3g}, the config's {rates.new:.3g}); restore it, or go "
            f'on with the new one: --allow_changes "[{",".join(refused)}]"'
        )
    say(f"changed since {checkpoint.path.name}: {', '.join(both.values())}")
    if rates:
        why = "they agree in all steps so far" if rates.agree else "by --allow_changes"
        say(
            f"learning rate of step {checkpoint.step + 1}: {rates.new:.3g} by the new schedule, {rates.old:.3g} by the "
            f"one so far ({why})"
        )


class _Rates(NamedTuple):
    """Learning rates of the next step, by the recorded schedule and by the config's; agree: in every step so far."""

    old: float
    new: float
    agree: bool


def _rates(checkpoint: CheckpointInfo, saved: dict[str, Any], settings: dict[str, Any]) -> _Rates:
    try:
        (old, old_peak), (new, new_peak) = (_schedule(values) for values in (saved, settings))
        agree = all(math.isclose(old(step), new(step), rel_tol=1e-9) for step in range(checkpoint.step))
        return _Rates(old_peak * old(checkpoint.step), new_peak * new(checkpoint.step), agree)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"settings in {checkpoint.path} are none of train.py ({error}); {WAY_OUT}") from error


def _schedule(settings: dict[str, Any]) -> tuple[Callable[[int], float], float]:
    """The rate of a step as a multiple of the peak, and the peak."""
    known = {field.name for field in fields(OptimizerConfig)}
    options = {key.removeprefix(OPTIMIZER): value for key, value in settings.items() if key.startswith(OPTIMIZER)}
    config = OptimizerConfig(**{key: value for key, value in options.items() if key in known})
    return lr_factor(config, settings[MAX_STEPS]), config.lr
