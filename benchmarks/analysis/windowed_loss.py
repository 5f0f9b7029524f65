"""Loss by position of runs read as they are, within a window in all layers, and by the PyTorch path.

    python -m benchmarks.analysis.windowed_loss RUN [RUN ...] --data FOLDER --window 4096

Over the starts of held-out documents; positions by ranges whose ends are --edges. One document is one forward pass.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.analysis.reading import configured, long_documents
from common.errors import UsageError, run_command
from eval.common.subjects import choose_device
from eval.reporting.formatting import count
from model.checkpoint import resolve_checkpoint
from model.config import ModelConfig
from model.loading import load_model
from model.transformer import Transformer

CHUNK = 8192  # positions whose logits are in memory at once


@torch.no_grad()
def losses(model: Transformer, config: ModelConfig, documents: Tensor, edges: Sequence[int]) -> list[float]:
    """Mean loss in nats of each range of positions [edges[i], edges[i + 1]), over documents.

    Args:
        documents: int64 (documents, T + 1), on the model's device.
        config: of the same weights, under which they are read.
        edges: rising, at most T.
    """
    cuda, found = documents.is_cuda, []
    with configured(model, config), torch.autocast(documents.device.type, torch.bfloat16, enabled=cuda):
        for document in documents:
            hidden, targets = model(document[None, :-1])[0], document[1:]
            parts = [
                F.cross_entropy(model.logits(hidden[i : i + CHUNK]).float(), targets[i : i + CHUNK], reduction="none")
                for i in range(0, len(hidden), CHUNK)
            ]
            loss = torch.cat(parts)
            found.append(torch.stack([loss[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]))
    mean: list[float] = torch.stack(found).double().mean(0).tolist()
    return mean


def analyse(run: str, documents: Tensor, edges: Sequence[int], window: int, few: int) -> list[str]:
    """few: documents that the PyTorch path reads, which is slow."""
    model = load_model(resolve_checkpoint(run).path, documents.device).model
    config = model.config
    by_torch = replace(config, attention=replace(config.attention, backend="torch"))
    rows = [
        ("as it is", config, documents),
        (f"window {window:,}", replace(config, window=window), documents),
        ("as it is", config, documents[:few]),
        ("PyTorch path", by_torch, documents[:few]),
    ]
    return [
        f"{run}, {count(len(read), 'document')}, {name}: "
        + ", ".join(f"{loss:.4f}" for loss in losses(model, changed, read, edges))
        for name, changed, read in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        edges = options.edges
        if len(edges) < 2 or sorted(set(edges)) != edges:
            raise UsageError(f"edges is {edges}: expected two rising positions or more")
        documents = long_documents(options.data / "heldout", edges[-1] + 1, options.documents)
        documents = documents.to(choose_device(options.device))
        lines = [f"positions {' '.join(map(str, edges))}, nats"]
        for run in options.runs:
            lines += analyse(run, documents, edges, options.window, options.few)
        return lines

    return run_command(work, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis.windowed_loss", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders (newest complete checkpoint) or checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus with a heldout split")
    parser.add_argument("--window", type=int, default=4096, help="keys that a query sees in the second reading")
    parser.add_argument("--edges", type=int, nargs="+", default=[0, 4096, 8192, 16384, 32767])
    parser.add_argument("--documents", type=int, default=12, help="most documents")
    parser.add_argument("--few", type=int, default=4, help="documents that the PyTorch path reads")
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
