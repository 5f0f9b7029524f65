"""Draws what α-entmax does: weights of one query under softmax and entmax, and the tiles that carry weight.

    python -m benchmarks.analysis.method results/method/method.png

Both panels are computed, with made-up scores: normal ones on the left, a few topics in blocks of keys on the right.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.workloads import topics
from common.errors import UsageError, run_command
from kernels import entmax

N_KEYS, TILE, N_TOKENS = 32, 64, 2048
ALPHAS = (1.25, 1.5, 2.0)


def weights_of_one_query() -> dict[str, Tensor]:
    """(N_KEYS,) weights of keys by falling score, by the name of the transformation."""
    generator = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(N_KEYS, generator=generator)).sort(descending=True).values
    return {"softmax": scores.softmax(0)} | {f"α = {alpha:g}": entmax(scores, alpha=alpha) for alpha in ALPHAS}


def live_tiles() -> Tensor:
    """(N_TOKENS / TILE, N_TOKENS / TILE) bool: tiles of queries and keys in which some pair has weight at α = 1.5."""
    q, k, _ = topics(N_TOKENS, 1, 64, 8, device="cpu", dtype=torch.float32)
    scores = (q[0, 0] @ k[0, 0].T) * 64**-0.5
    visible = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
    weights = entmax(scores.masked_fill(~visible, -torch.inf), alpha=1.5)
    return (weights > 0).unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).any(3).any(1)


def draw(path: Path) -> str:
    """Writes the picture. Returns the line for the terminal."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for name, weights in weights_of_one_query().items():
        kept = int((weights > 0).sum())
        left.plot(range(1, N_KEYS + 1), weights, marker=".", label=f"{name}: {kept} of {N_KEYS} keys have weight")
    left.set(title="one query's weights", xlabel="keys, by falling score", ylabel="weight")
    left.legend(frameon=False)
    tiles = live_tiles()
    seen = torch.ones_like(tiles).tril()
    shown = torch.where(seen, 0.25 + 0.75 * tiles, 0.0)
    right.imshow(shown, cmap="Blues", vmin=0, vmax=1, extent=(0, N_TOKENS, N_TOKENS, 0))
    share = float(tiles[seen].float().mean())
    right.set(
        title=f"{100 * share:.0f} % of the 64 x 64 tiles have weight (dark)",
        xlabel="keys", ylabel="queries",
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"drew {path}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        if len(given) != 1:
            raise UsageError(f"got {len(given)} arguments: expected the picture's path, results/method/method.png")
        return [draw(Path(given[0]))]

    return run_command(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
