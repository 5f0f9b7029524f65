"""Gradients of a run by kernels and precision against the PyTorch path in float32, its temperatures and its scores.

    python -m benchmarks.analysis.gradients RUN --data FOLDER

For each of three batches of two documents of the train split: the gradient's norm by the backend in float32 and under
bfloat16 autocast, its cosine with the exact one, and the relative error. Then for each layer the mean and largest
temperature of each head over the last batch's tokens, and each head's largest score of every 64th query.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.analysis.reading import configured, long_documents
from common.errors import UsageError, run_command
from eval.common.subjects import choose_device
from model.checkpoint import resolve_checkpoint
from model.layers import AdaptiveTemperature
from model.loading import load_model
from model.override import override_attention
from model.transformer import Transformer

FIRST, STEP, DOCUMENTS, IN_A_BATCH = 11, 37, 6, 2  # which documents, as in results/temperatures


@dataclass(frozen=True)
class Gradient:
    """One batch: norm of the exact gradient and of the found one, their cosine, and the relative error."""

    precision: str
    exact_norm: float
    norm: float
    cosine: float
    error: float


@dataclass(frozen=True)
class Layer:
    """temperatures, largest_temperatures: of each position-free head. largest_scores: of each head."""

    temperatures: list[float]
    largest_temperatures: list[float]
    largest_scores: list[float]


def gradient(model: Transformer, batch: Tensor, backend: str, dtype: torch.dtype | None) -> Tensor:
    """float64 (parameters,) of the mean loss. batch: int64 (B, T + 1). dtype: of autocast; None for float32."""
    config = replace(model.config, attention=replace(model.config.attention, backend=backend))
    with (
        configured(model, config),
        torch.autocast(batch.device.type, dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        logits = model.logits(model(batch[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return torch.cat([one.double().flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])


def compare(model: Transformer, batch: Tensor, backend: str) -> list[Gradient]:
    """In float32 and under bfloat16 autocast."""
    exact = gradient(model, batch, "torch", None)
    found = []
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        one = gradient(model, batch, backend, dtype)
        error = float((one - exact).norm() / exact.norm())
        cosine = float(F.cosine_similarity(one, exact, 0))
        found.append(Gradient(name, float(exact.norm()), float(one.norm()), cosine, error))
    return found


@torch.no_grad()
def layers(model: Transformer, tokens: Tensor, dtype: torch.dtype | None) -> list[Layer]:
    """Of a model with adaptive temperatures. tokens: int64 (B, T)."""
    temperatures: list[Tensor] = []
    scores: list[list[float]] = []

    def keep(_module: Any, _inputs: Any, found: Tensor) -> None:
        temperatures.append(found)  # [B, H - free, T]

    def watch(q: Tensor, k: Tensor, v: Tensor, metadata: Any, extension: Any) -> None:
        keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        found = q[:, :, ::64].float() @ keys.mT / q.shape[-1] ** 0.5
        scores.append(found.abs().amax((0, 2, 3)).tolist())

    own = [block.attention for block in model.layers()]
    hooks = [one.temperature.register_forward_hook(keep) for one in own if one.temperature is not None]
    autocast = torch.autocast(tokens.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    try:
        with override_attention(model, [watch] * len(own)), autocast:
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Layer(found.mean((0, 2)).tolist(), found.amax((0, 2)).tolist(), largest)
        for found, largest in zip(temperatures, scores, strict=True)
    ]


def analyse(run: str, data: Path, tokens: int, backend: str, device: torch.device) -> list[str]:
    """The lines of the terminal. Raises ValueError, FileNotFoundError for what cannot be analysed."""
    model = load_model(resolve_checkpoint(run).path, device).model.requires_grad_()
    if not isinstance(model.layers()[0].attention.temperature, AdaptiveTemperature):
        raise UsageError(f"{run} has attention kind {model.config.attention.kind!r}: expected asentmax")
    documents = long_documents(data / "train", tokens + 1, DOCUMENTS, FIRST, STEP).to(device)
    batches = documents.split(IN_A_BATCH)
    lines = ["batch  precision  exact norm  norm      cosine   relative error"]
    for index, batch in enumerate(batches):
        for one in compare(model, batch, backend):
            numbers = f"{one.exact_norm:<10.4g}  {one.norm:<8.4g}  {one.cosine:<7.4f}  {one.error:.2g}"
            lines.append(f"{index:<5}  {one.precision:<9}  {numbers}")
    for index, layer in enumerate(layers(model, batches[-1][:, :-1], torch.bfloat16)):
        lines.append(
            f"layer {index}: mean temperatures {_listed(layer.temperatures)}; largest "
            f"{_listed(layer.largest_temperatures)}; largest scores {_listed(layer.largest_scores)}"
        )
    return lines


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        device = choose_device(options.device)
        backend = options.backend or ("triton" if device.type == "cuda" else "torch")
        return analyse(options.run, options.data, options.tokens, backend, device)

    return run_command(work, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis.gradients", description=__doc__)
    parser.add_argument("run", help="run folder (newest complete checkpoint) or checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus")
    parser.add_argument("--tokens", type=int, default=4096, help="of a document")
    parser.add_argument("--backend", help="that is compared: triton on CUDA, else torch")
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
