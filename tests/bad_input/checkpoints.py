"""Checkpoints as train.py --resume, --init_from and the evaluations read them, and model.export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.cases import Case, Place
from tests.bad_input.training import train


def resume(*options: str) -> list[str]:
    """Continue {run}."""
    return ["train.py", "--config", "{tiny}", "--run_dir", "{run}", "--resume", "auto", *options]


def no_marker(place: Place) -> None:
    for marker in place.run.glob("checkpoints/step-*/complete.json"):
        marker.unlink()


def newest(place: Place) -> Path:
    return place.run / "checkpoints/step-00000010"


def marker(*steps: int, **change: Any) -> Callable[[Place], None]:
    """Change keys of complete.json in these checkpoints."""

    def damage(place: Place) -> None:
        for step in steps:
            path = place.run / f"checkpoints/step-{step:08d}/complete.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return damage


def flipped(name: str) -> Callable[[Place], None]:
    """Flip the last bit of a file in the newest checkpoint."""

    def damage(place: Place) -> None:
        path = newest(place) / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return damage


def trainer_state(content: Any) -> Callable[[Place], None]:
    """A trainer.ckpt with other content, in a checkpoint without checksums."""

    def damage(place: Place) -> None:
        path = newest(place) / "trainer.ckpt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        meta = json.loads((newest(place) / "complete.json").read_text())
        marker(10, files={**meta["files"], "trainer.ckpt": {"bytes": path.stat().st_size}})(place)

    return damage


def both(content: str) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        for path in place.run.glob("checkpoints/step-*/complete.json"):
            path.write_text(content)

    return damage


RESUMING = {"notes": ["resuming"]}
LONGER = ("--trainer.max_steps", "12")
STATE = "{tmp}/run/checkpoints/step-00000010/"
CASES = [
    Case("resume of another format", resume(*LONGER), [f"{STATE}complete.json has format 9"], marker(10, format=9)),
    Case(
        "start over another format",
        train("--run_dir", "{run}"),
        ["format 9", "another --run_dir"],
        marker(5, 10, format=9),
    ),
    Case("resume of damaged markers only", resume(*LONGER), ["not valid JSON"], both("{")),
    Case("resume of lists for markers", resume(*LONGER), ["holds a list, expected an object"], both("[]")),
    Case("resume of markers without a step", resume(*LONGER), ["lacks 'step'"], both('{"format": 2}')),
    Case("resume of samples as text", resume(*LONGER), ["a string as 'samples'"], marker(10, samples="4")),
    Case("resume of a model as a list", resume(*LONGER), ["a list as 'model'"], marker(10, model=[]), **RESUMING),
    Case(
        "resume of no tokenizer",
        resume(*LONGER),
        ["lacks 'fingerprint'"],
        marker(10, tokenizer={"path": "x"}),
        **RESUMING,
    ),
    Case(
        "resume of settings as a list", resume(*LONGER), ["a list as 'settings'"], marker(10, settings=[]), **RESUMING
    ),
    Case(
        "resume of a flipped trainer.ckpt",
        resume(*LONGER),
        [f"{STATE}trainer.ckpt is damaged"],
        flipped("trainer.ckpt"),
        **RESUMING,
    ),
    Case(
        "resume of garbage for trainer.ckpt",
        resume(*LONGER),
        [f"{STATE}trainer.ckpt cannot be read"],
        trainer_state(b"garbage"),
        **RESUMING,
    ),
    Case(
        "resume of a list for trainer.ckpt",
        resume(*LONGER),
        ["trainer.ckpt holds a list"],
        trainer_state([1]),
        **RESUMING,
    ),
    Case(
        "resume of an empty trainer.ckpt",
        resume(*LONGER),
        ["trainer.ckpt lacks 'PackedDataModule'"],
        trainer_state({}),
        **RESUMING,
    ),
    Case(
        "resume with another schedule",
        resume(*LONGER),
        ["max_steps 10 (config: 12)", '--allow_changes "[trainer.max_steps]"'],
        **RESUMING,
    ),
    Case("leave for no option", resume("--allow_changes", "[lr]"), ["'lr'", "trainer.max_steps"]),
    Case("verify as nobody knows", resume("--checkpoint.verify", "sometimes"), ["checkpoint.verify", "sometimes"]),
    Case(
        "init_from a flipped tensor",
        train("--init_from", "{run}"),
        ["is damaged: weight/", "checksum"],
        flipped("state-00000.safetensors"),
    ),
    Case(
        "export of a flipped tensor",
        ["-m", "model.export", "{run}", "{tmp}/hf"],
        ["is damaged: weight/"],
        flipped("state-00000.safetensors"),
    ),
    Case(
        "export of a damaged newest one",
        ["-m", "model.export", "{run}", "{tmp}/hf"],
        ["step-00000005"],
        marker(10, tensors=3),
    ),
    Case("resume of no folder", train("--resume", "{tmp}/none"), ["{tmp}/none"]),
    Case("resume and init_from", train("--resume", "{run}", "--init_from", "{run}"), ["--init_from {run}", "use one"]),
    Case("resume of another model", resume("--model.network.d_ff", "48"), ["d_ff 32", "48"], notes=["resuming"]),
    Case("init_from without a checkpoint", train("--init_from", "{run}"), ["{run}"], no_marker),
    Case("export of no run", ["-m", "model.export", "{tmp}/none", "{tmp}/hf"], ["{tmp}/none"]),
]
