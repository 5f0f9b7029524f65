"""Checkpoints as train.py --resume, --init_from and the evaluations read them, and model.export."""

from tests.bad_input.cases import Case, Place
from tests.bad_input.training import train


def resume(*options: str) -> list[str]:
    """Continue {run}."""
    return ["train.py", "--config", "{tiny}", "--run_dir", "{run}", "--resume", "auto", *options]


def no_marker(place: Place) -> None:
    for marker in place.run.glob("checkpoints/step-*/complete.json"):
        marker.unlink()


def flipped(place: Place) -> None:
    """A bit of the newest checkpoint's last tensor."""
    path = place.run / "checkpoints" / "step-00000010" / "state-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def flipped_step(place: Place) -> None:
    path = place.run / "checkpoints" / "step-00000010" / "complete.json"
    path.write_text(path.read_text().replace('"sequence_length": 64', '"sequence_length": 65'))


MOVED_AWAY = "choose another checkpoint (once this one is moved away, its run stands for the one before)"
EXPORT = ["-m", "model.export", "{run}", "{tmp}/hf"]
GENERATE = ["-m", "eval.generate", "{run}", "--prompt", "a", "--device", "cpu"]
MARKER = "{run}/checkpoints/step-00000010/complete.json is damaged: its content has checksum"
STATE = "{run}/checkpoints/step-00000010/state-00000.safetensors is damaged: "

CASES = [
    Case("export of a flipped bit", EXPORT, [STATE, MOVED_AWAY], flipped),
    Case("export of a changed marker", EXPORT, [MARKER, MOVED_AWAY], flipped_step),
    Case("generate from a flipped bit", GENERATE, [STATE, MOVED_AWAY], flipped),
    Case("generate from a changed marker", GENERATE, [MARKER, MOVED_AWAY], flipped_step),
    Case(
        "resume from a changed marker",
        resume("--trainer.max_steps", "12"),
        [MARKER, MOVED_AWAY],
        flipped_step,
        ["resuming"],
    ),
    Case("resume of no folder", train("--resume", "{tmp}/none"), ["{tmp}/none"]),
    Case("resume and init_from", train("--resume", "{run}", "--init_from", "{run}"), ["--init_from {run}", "use one"]),
    Case("resume of another model", resume("--model.network.d_ff", "48"), ["d_ff 32", "48"], notes=["resuming"]),
    Case(
        "resume of the same weights with another alpha",
        resume("--model.network.attention.alpha", "1.25"),
        ["was trained with model.network.attention.alpha 1.5 (config: 1.25)", "--init_from {run}/checkpoints/step-"],
        notes=["resuming"],
    ),
    Case("init_from without a checkpoint", train("--init_from", "{run}"), ["{run}"], no_marker),
    Case("export of no run", ["-m", "model.export", "{tmp}/none", "{tmp}/hf"], ["{tmp}/none"]),
]
