"""From raw sums to numbers with 95 % intervals: per run, and paired between runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from eval.held_out.measurement import Measurement
from eval.held_out.multi_needle import MultiNeedleCell
from eval.held_out.needle import NeedleCell
from eval.held_out.perplexity import Sums
from eval.reporting.statistics import LEAST_UNITS, Interval, paired_sums, ratio_of_sums, share

INTERVAL_METHODS = (
    "All intervals are 95 %. Bits per byte and perplexity: jackknife over documents with Student's t, on logs; "
    "differences paired over documents. Needles: Clopper-Pearson, with samples, not tokens, as the independent trials. "
    f"None below {LEAST_UNITS} documents or samples, nor where one document has nearly all tokens. Where losses differ "
    "by more than 2.7 times from document to document (log-normal, sigma 1), intervals over documents hold in about 9 "
    "of 10 cases."
)


@dataclass(frozen=True)
class LengthScore:
    """Perplexity (per token) and bits per byte with contexts of multiple * training length tokens."""

    multiple: int
    tokens: int
    perplexity: Interval
    bits_per_byte: Interval


@dataclass(frozen=True)
class PositionScore:
    """Perplexity of the tokens predicted at positions start ... stop - 1 of the longest context."""

    start: int
    stop: int
    perplexity: Interval


@dataclass(frozen=True)
class NeedleScore:
    """One cell: depth None is the controls; pooled cells over all depths have depth "all"."""

    multiple: int
    depth: float | str | None
    samples: int
    token_accuracy: Interval
    exact_match: Interval


@dataclass(frozen=True)
class RunSummary:
    """The numbers of one run. perplexity and bits_per_byte are the headline: held-out text in contexts of 1x."""

    label: str
    perplexity: Interval
    bits_per_byte: Interval
    tokens: int
    bytes: int
    documents: int
    lengths: list[LengthScore]
    positions: list[PositionScore]
    needles: list[NeedleScore]
    needles_by_length: list[NeedleScore]
    chance: NeedleScore | None
    several: dict[str, list[NeedleScore]]  # by kind of eval.held_out.multi_needle


@dataclass(frozen=True)
class LengthPair:
    """Paired comparison at one length: difference in bits per byte, ratio of perplexities."""

    multiple: int
    bits_per_byte_difference: Interval
    perplexity_ratio: Interval


@dataclass(frozen=True)
class PairSummary:
    """A run against the baseline over the same documents; below zero or one, the run is better."""

    label: str
    baseline: str
    bits_per_byte_difference: Interval
    bits_per_byte_ratio: Interval
    lengths: list[LengthPair]


def summarise(measurement: Measurement) -> RunSummary:
    """Intervals of one run."""
    plan, perplexity = measurement.plan, measurement.perplexity
    headline = perplexity.headline
    controls = [cell for cell in measurement.needles if cell.depth is None]
    return RunSummary(
        label=measurement.label,
        perplexity=_perplexity(headline),
        bits_per_byte=_bits_per_byte(headline),
        tokens=sum(headline.tokens),
        bytes=sum(headline.bytes),
        documents=len(headline.documents),
        lengths=[
            LengthScore(m, m * plan.base_length, _perplexity(sums), _bits_per_byte(sums))
            for m, sums in perplexity.by_length.items()
        ],
        positions=_positions(measurement),
        needles=[_needle_score([cell], cell.depth) for cell in measurement.needles],
        needles_by_length=_needles_by_length(measurement.needles),
        chance=_needle_score(controls, None) if controls else None,
        several={
            kind: [_needle_score([c], "all") for c in measurement.multi_needles if c.kind == kind]
            for kind in dict.fromkeys(cell.kind for cell in measurement.multi_needles)
        },
    )


def pair(run: Measurement, baseline: Measurement) -> PairSummary:
    """Paired comparison of two runs.

    Raises:
        ValueError: the two were not scored on the same documents.
    """
    ours, theirs = run.perplexity, baseline.perplexity
    if run.plan != baseline.plan:
        raise ValueError(f"{run.label} and {baseline.label} were scored on different documents and cannot be paired")
    difference = paired_sums(ours.headline.loss, theirs.headline.loss, ours.headline.bytes)
    ratio = ratio_of_sums(ours.headline.loss, theirs.headline.loss)
    lengths = []
    for multiple, sums in ours.by_length.items():
        other = theirs.by_length[multiple]
        bits = paired_sums(sums.loss, other.loss, sums.bytes)
        nats = paired_sums(sums.loss, other.loss, sums.tokens)
        lengths.append(LengthPair(multiple, bits.map(_bits), nats.map(math.exp)))
    return PairSummary(run.label, baseline.label, difference.map(_bits), ratio, lengths)


class HasModel(Protocol):
    """A run with its model's configuration."""

    @property
    def model(self) -> dict[str, Any]: ...


Run = TypeVar("Run", bound=HasModel)


def choose_baseline(runs: Sequence[Run]) -> Run:
    """The only softmax run where there is exactly one, else the first run."""
    softmax = [one for one in runs if attention_kind(one) == "softmax"]
    return softmax[0] if len(softmax) == 1 else runs[0]


def attention_kind(run: HasModel) -> str:
    return str(run.model["attention"]["kind"])


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _perplexity(sums: Sums) -> Interval:
    return ratio_of_sums(sums.loss, sums.tokens).map(math.exp)


def _bits_per_byte(sums: Sums) -> Interval:
    return ratio_of_sums(sums.loss, sums.bytes).map(_bits)


def _positions(measurement: Measurement) -> list[PositionScore]:
    losses = np.array(measurement.perplexity.position_loss)  # (documents, bins)
    edges = measurement.plan.edges
    scores = []
    for i, tokens in enumerate(measurement.perplexity.position_tokens):
        interval = ratio_of_sums(losses[:, i], np.full(len(losses), tokens))
        scores.append(PositionScore(edges[i], edges[i + 1], interval.map(math.exp)))
    return scores


def _needles_by_length(cells: Sequence[NeedleCell]) -> list[NeedleScore]:
    multiples = list(dict.fromkeys(cell.multiple for cell in cells))
    return [_needle_score([c for c in cells if c.multiple == m and c.depth is not None], "all") for m in multiples]


def _needle_score(cells: Sequence[NeedleCell | MultiNeedleCell], depth: float | str | None) -> NeedleScore:
    hits = [hit for cell in cells for hit in cell.hits]
    tokens = [count for cell in cells for count in cell.tokens]
    exact = sum(hit == count for hit, count in zip(hits, tokens, strict=True))
    return NeedleScore(
        cells[0].multiple,
        depth,
        len(hits),
        share(sum(hits) / sum(tokens), len(hits)),
        share(exact / len(hits), len(hits)),
    )
