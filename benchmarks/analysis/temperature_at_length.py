"""Evaluates ASEntmax or entmax runs as python -m eval.run does, with another temperature beyond the training length.

    python -m benchmarks.analysis.temperature_at_length --clamp 4096 -- RUN --data FOLDER --output FOLDER
    python -m benchmarks.analysis.temperature_at_length --power 1 --trained 256 -- RUN --data FOLDER --output FOLDER

What follows -- are eval.run's arguments. --clamp N: positions in the temperature stop at N. --power P: scores of
position-free heads with n visible keys are multiplied by (N / n) ** (P (alpha - 1)) beyond N = --trained keys: where n
keys share an entmax head's weight evenly, d log p / d score = n ** (alpha - 1). What is measured is kept under
OUTPUT/results-changed, where eval.run does not take it for the unchanged model's.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import UsageError
from eval import run
from model.attention import Attention, AttentionMetadata
from model.layers import AdaptiveTemperature


def clamped(length: int) -> tuple[type, str, Callable[..., Any]]:
    """AdaptiveTemperature.forward with positions that stop at length - 1."""
    forward, last = AdaptiveTemperature.forward, math.log(2 + length - 1)

    def changed(self: AdaptiveTemperature, x: Tensor, log_position: Tensor) -> Tensor:
        return forward(self, x, log_position.clamp(max=last))

    return AdaptiveTemperature, "forward", changed


def scaled(power: float, trained: int) -> tuple[type, str, Callable[..., Any]]:
    """Attention's temperatures times (trained / n) ** (power (alpha - 1)) in position-free heads, n > trained keys."""
    temperatures = Attention._head_temperatures

    def changed(self: Attention, x: Tensor, metadata: AttentionMetadata) -> Tensor | None:
        found = temperatures(self, x, metadata)  # [B, H, T], 1 for heads without one
        if self.alpha is None:
            return found
        free = self.config.n_alibi_heads
        keys = metadata.log_position.exp() - 1  # [T] or [B, T]
        exponent = power * (self.alpha(x.device)[free:] - 1)  # [H - free]
        factor = (trained / keys).clamp(max=1)[..., None, :] ** exponent[:, None]
        factor = nn.functional.pad(factor, (0, 0, free, 0), value=1.0)
        return factor.expand(x.shape[0], -1, -1) if found is None else found * factor

    return Attention, "_head_temperatures", changed


@contextmanager
def replaced(owner: type, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Inside, the class has another method."""
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns eval.run's exit code, or 2 after one "error:" line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = _parser().parse_args(own)
    try:
        output = _output(rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    change = scaled(options.power, options.trained) if options.clamp is None else clamped(options.clamp)
    kept, changed = output / "results", output / "results-changed"
    if changed.is_dir():
        changed.rename(kept)
    with replaced(*change):
        try:
            return run.main(rest)
        finally:
            if kept.is_dir():
                kept.rename(changed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis.temperature_at_length", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--clamp", type=int, help="positions in the temperature stop at this length")
    which.add_argument("--power", type=float, help="of the factor on scores beyond the trained length")
    parser.add_argument("--trained", type=int, default=256, help="training length, of --power")
    return parser


def _output(rest: Sequence[str]) -> Path:
    """eval.run's. Raises UsageError where it is not given, or has results of unchanged models."""
    if "--output" not in rest[:-1]:
        raise UsageError("no --output behind --: give eval.run's arguments, with an output folder of their own")
    output = Path(rest[rest.index("--output") + 1])
    if (output / "results").exists():
        raise UsageError(f"--output {output} has results of models without the change: choose another folder")
    return output


if __name__ == "__main__":
    sys.exit(main())
