"""All that is measured of one checkpoint on held-out text, before statistics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from eval.common import provenance
from eval.common.results import result_key, reuse
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, choose_autocast, file_fingerprint
from eval.held_out.attention_profile import LayerProfile, measure_attention
from eval.held_out.config import EvalConfig
from eval.held_out.multi_needle import MultiNeedleCell, measure_multi_needles
from eval.held_out.needle import NeedleCell, measure_needles
from eval.held_out.perplexity import PerplexityPlan, PerplexityResult, bytes_of_tokens, measure_perplexity
from eval.held_out.texts import HeldOut
from model.loading import load_model
from model.policies.bsfa import use_thresholds
from model.policies.dual_chunk import DualChunk
from model.policies.policy import use_policy
from model.policies.thresholds import read_thresholds
from model.transformer import Transformer

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one checkpoint, before statistics.

    Args:
        label: Short name in tables and plots.
        checkpoint: Its folder.
        training: Facts of the checkpoint's complete.json: samples, tokens, code_version, created.
        model: The model's configuration.
        policy: The sparse attention it ran under and what that kept, in words; empty for its own attention.
        seconds: Wall time of each part of the evaluation.
    """

    label: str
    checkpoint: str
    step: int
    training: dict[str, Any]
    model: dict[str, Any]
    parameters: int
    policy: str
    training_length: int
    precision: str
    hardware: str
    date: str
    seconds: dict[str, float]
    plan: PerplexityPlan
    perplexity: PerplexityResult
    needles: list[NeedleCell]
    multi_needles: list[MultiNeedleCell]
    needle_notes: list[str]
    attention: list[LayerProfile]


def measure_or_reuse(
    subject: Subject, held_out: HeldOut, output: Path, config: EvalConfig, device: torch.device
) -> Measurement:
    """What output/results keeps of this checkpoint, else measured and kept there."""
    kind = provenance.hardware(device)
    # settings hold the name of the thresholds' file, not what is in it
    read = held_out.fingerprint + (file_fingerprint(Path(config.thresholds)) if config.thresholds else "")
    key = result_key(subject.checkpoint.path, read, config, held_out.base_length, kind, (__name__,))
    path = output / "results" / f"{subject.label}-{key}.json"
    return reuse(path, Measurement, lambda: measure(subject, held_out, config, device))


def measure(subject: Subject, held_out: HeldOut, config: EvalConfig, device: torch.device) -> Measurement:
    """Runs every task on one checkpoint."""
    loaded = load_model(subject.checkpoint.path, device)
    autocast = choose_autocast(config.precision, subject, device)
    runtime = Runtime(device, autocast, config.row_tokens)
    seconds: dict[str, float] = {}
    store, plan, label, model = held_out.store, held_out.plan, subject.label, loaded.model
    token_bytes = bytes_of_tokens(held_out.tokenizer)
    with _attention(model, subject, config) as said:
        perplexity = _timed(
            seconds,
            "perplexity",
            lambda: measure_perplexity(model, store, plan, token_bytes, runtime, label, lossy=held_out.tokenizer.lossy),
        )
        needles = _timed(seconds, "needles", lambda: measure_needles(model, held_out.samples, runtime, label))
        multi_needles = _timed(
            seconds, "several needles", lambda: measure_multi_needles(model, held_out.multi_samples, runtime, label)
        )
    documents, length = plan.documents[: config.profile_documents], held_out.base_length
    attention = _timed(
        seconds,
        "attention",
        lambda: measure_attention(model, store, documents, plan.multiples, length, config, runtime, label),
    )
    meta = subject.checkpoint.meta
    return Measurement(
        label=label,
        checkpoint=str(subject.checkpoint.path),
        step=loaded.step,
        training={name: meta.get(name) for name in ("samples", "tokens", "code_version", "created")},
        model=asdict(loaded.config),
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        policy=said(),
        training_length=loaded.training_length,
        precision="float32" if autocast is None else "bfloat16 autocast",
        hardware=provenance.hardware(device),
        date=provenance.now(),
        seconds=seconds,
        plan=plan,
        perplexity=perplexity,
        needles=needles,
        multi_needles=multi_needles,
        needle_notes=held_out.needle_notes,
        attention=attention,
    )


@contextmanager
def _attention(model: Transformer, subject: Subject, config: EvalConfig) -> Iterator[Callable[[], str]]:
    """Inside, the model attends as the subject does; afterwards the function says how, in words."""
    if subject.dual_chunk is not None:
        policy = DualChunk.of_trained_length(subject.dual_chunk)
        distances = f"no distance above {policy.farthest:,} tokens and true ones up to {policy.local:,}"
        said = f"attention is Dual Chunk Attention, with {distances}; its profile below is that of the model's own."
        with use_policy(model, policy):
            yield lambda: said
        return
    path, k = (config.thresholds, config.keep_blocks) if model.config.attention.is_softmax else (None, None)
    with use_thresholds(model, path, k) as record:
        yield lambda: "" if record is None else _describe(path, k, float(record.density("prefill").mean()))


def _describe(path: str | None, k: int | None, density: float) -> str:
    assert path is not None and k is not None
    calibration = read_thresholds(Path(path))[1]
    predicted = calibration.predicted[calibration.ks.index(k)]
    return (
        f"attention is Block-Sparse FlashAttention with k = {k} of {path} (density {predicted:.2f} predicted at "
        f"{calibration.length} tokens, {density:.2f} measured over all contexts); its profile below is that of dense "
        "attention."
    )


def _timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    result = work()
    seconds[name] = round(time.monotonic() - started, 2)
    return result
