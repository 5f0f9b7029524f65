"""Checkpoints as train.py --resume, --init_from and the evaluations read them, and model.export."""

from tests.bad_input.cases import Case, Place
from tests.bad_input.training import train


def resume(*options: str) -> list[str]:
    """Continue {run}."""
    return ["train.py", "--config", "{tiny}", "--run_dir", "{run}", "--resume", "auto", *options]


def no_marker(place: Place) -> None:
    for marker in place.run.glob("checkpoints/step-*/complete.json"):
        marker.unlink()


CASES = [
    Case("resume of no folder", train("--resume", "{tmp}/none"), ["{tmp}/none"]),
    Case("resume and init_from", train("--resume", "{run}", "--init_from", "{run}"), ["--init_from {run}", "use one"]),
    Case("resume of another model", resume("--model.network.d_ff", "48"), ["d_ff 32", "48"], notes=["resuming"]),
    Case("init_from without a checkpoint", train("--init_from", "{run}"), ["{run}"], no_marker),
    Case("export of no run", ["-m", "model.export", "{tmp}/none", "{tmp}/hf"], ["{tmp}/none"]),
]
