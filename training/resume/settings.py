"""What else than model and data decides a run, and what of it a run that resumes may change."""

import math
from collections.abc import Collection
from dataclasses import asdict, fields
from typing import Any

from lightning.pytorch import Trainer

from common.nested import flatten
from model.checkpoint import WAY_OUT, CheckpointInfo
from training.module import LanguageModule
from training.step.optim import OptimizerConfig, lr_factor
from training.tracking import say

OPTIMIZER = "model.optimizer."
MAX_STEPS = "trainer.max_steps"
# These shape the learning rate over a run. Other settings may change at any step, which is said.
SCHEDULE = (
    MAX_STEPS,
    *(f"{OPTIMIZER}{key}" for key in ("schedule", "warmup_steps", "decay_fraction", "final_lr_fraction")),
)


def run_settings(trainer: Trainer, module: LanguageModule, global_batch_size: int) -> dict[str, Any]:
    """By option of train.py, JSON-able; recorded in each checkpoint. What only decides where and how fast a run
    computes is not among them."""
    settings = {
        "trainer": {
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
        "data": {"global_batch_size": global_batch_size},
        "model": {"optimizer": {**asdict(module.optimizer_config), "betas": list(module.optimizer_config.betas)}},
    }
    if module.guard:
        guard = module.guard.config
        settings["guard"] = {"skip_nonfinite": guard.skip_nonfinite, "spike_deviations": guard.spike_deviations}
    return flatten(settings)


def check_allowed(allowed: Collection[str]) -> None:
    """Raises ValueError for what --allow_changes does not know."""
    for key in allowed:
        if key not in SCHEDULE:
            raise ValueError(f"--allow_changes has {key!r}: expected some of {', '.join(SCHEDULE)}")


def check_settings(checkpoint: CheckpointInfo, settings: dict[str, Any], allowed: Collection[str]) -> None:
    """Say what this session changes for a run that resumes.

    A schedule that agrees with the recorded one in all steps that were taken is an extension. One that does not would
    leave a run that neither schedule describes, and needs leave: `allowed`, the options in which it may differ.

    Raises ValueError that lists the options without leave, with both values.
    """
    if "settings" not in checkpoint.meta:
        say(
            f"warning: {checkpoint.path} is older than the record of settings: if {MAX_STEPS}, learning rate, schedule "
            "or batch have changed, that goes unnoticed"
        )
        return
    saved = checkpoint.require(settings=dict)["settings"]
    changed = [key for key in sorted(settings.keys() & saved.keys()) if settings[key] != saved[key]]
    if not changed:
        return
    both = {key: f"{key} {saved[key]} (config: {settings[key]})" for key in changed}
    refused = [key for key in changed if key in SCHEDULE and key not in allowed]
    if refused and (rates := _rates_that_differ(checkpoint, saved, settings)):
        raise ValueError(
            f"{', '.join(both[key] for key in refused)}: not the schedule that {checkpoint.path} was trained with "
            f"(its next learning rate is {rates[0]:.3g} of the peak, the config's {rates[1]:.3g}); restore it, or go "
            f'on with the new one: --allow_changes "[{",".join(refused)}]"'
        )
    say(f"changed since {checkpoint.path.name}: {', '.join(both.values())}")


def _rates_that_differ(
    checkpoint: CheckpointInfo, saved: dict[str, Any], settings: dict[str, Any]
) -> tuple[float, float] | None:
    """The recorded schedule's and the config's rate of the next step, as multiples of the peak; None where the two have
    agreed in every step so far."""
    try:
        old, new = (_schedule(values) for values in (saved, settings))
        if all(math.isclose(old(step), new(step), rel_tol=1e-9) for step in range(checkpoint.step)):
            return None
        return old(checkpoint.step), new(checkpoint.step)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"settings in {checkpoint.path} are none of train.py ({error}); {WAY_OUT}") from error


def _schedule(settings: dict[str, Any]) -> Any:
    known = {field.name for field in fields(OptimizerConfig)}
    options = {key.removeprefix(OPTIMIZER): value for key, value in settings.items() if key.startswith(OPTIMIZER)}
    return lr_factor(
        OptimizerConfig(**{key: value for key, value in options.items() if key in known}), settings[MAX_STEPS]
    )
