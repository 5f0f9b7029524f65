"""Held-out text, and what of it every model is scored on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.store import TokenStore
from data.tokenizer import Tokenizer, load_tokenizer
from eval.common.subjects import Subject, check_tokenizer
from eval.held_out.config import EvalConfig
from eval.held_out.multi_needle import MultiNeedleSample, build_multi_samples
from eval.held_out.needle import NeedleSample, build_samples
from eval.held_out.perplexity import PerplexityPlan, plan_perplexity


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, its tokenizer, and what of it every model is scored on."""

    store: TokenStore
    tokenizer: Tokenizer
    fingerprint: str
    base_length: int
    plan: PerplexityPlan
    samples: list[NeedleSample]
    multi_samples: list[MultiNeedleSample]
    needle_notes: list[str]


def open_held_out(data: Path, subjects: Sequence[Subject], config: EvalConfig) -> HeldOut:
    """Opens the held-out split, checks that it fits every checkpoint, and plans what is scored."""
    store = TokenStore(data / "heldout", verify="size")
    for subject in subjects:
        check_tokenizer(subject, data, store)
    base_length = config.base_length or _common_length(subjects, config)
    plan = plan_perplexity(store, base_length, config)
    tokenizer = load_tokenizer(store.tokenizer_path)
    samples, notes = build_samples(store, tokenizer, base_length, plan.multiples, config)
    several, more_notes = build_multi_samples(store, tokenizer, base_length, plan.multiples, config)
    fingerprint = data_fingerprint(data)
    return HeldOut(store, tokenizer, fingerprint, base_length, plan, samples, several, [*notes, *more_notes])


def data_fingerprint(data: Path) -> str:
    """sha256 over the manifest and the held-out shards' records, which hold the checksums of their tokens."""
    digest = hashlib.sha256((data / "manifest.json").read_bytes())
    for path in sorted((data / "heldout").glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _common_length(subjects: Sequence[Subject], config: EvalConfig) -> int:
    lengths = {
        subject.label: subject.checkpoint.require(sequence_length=int)["sequence_length"] for subject in subjects
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{label} {length}" for label, length in lengths.items())
        option = config.option("base_length")
        raise ValueError(f"the runs were trained at different lengths ({said}): say which is 1x with {option}")
    return next(iter(lengths.values()))
