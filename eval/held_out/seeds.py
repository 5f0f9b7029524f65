"""Configurations that were trained with several seeds, compared over seeds and documents."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.held_out.analysis import PairSummary, choose_baseline, pair
from eval.held_out.measurement import Measurement
from eval.held_out.perplexity import Sums
from eval.reporting.document import Block, Heading, Paragraph, Table
from eval.reporting.formatting import interval_text

SEED = "seed_everything"
OF_A_RUN = (SEED, "data.seed", "run_dir", "resume", "wandb.", "debug")
NUMBER = re.compile(r"\d+")
SEPARATORS = re.compile(r"([-_/. ]+)")
SEED_IN_LABEL = re.compile(r"(?:seed|s)?\d+")
Settings = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class SeedSummary:
    """One configuration against the baseline's.

    Args:
        pair: of the losses' means over seeds; its intervals are over documents, of these seeds.
        seeds: that both were trained with.
        ratios: of bits per byte, seed by seed.
    """

    pair: PairSummary
    seeds: list[str]
    ratios: list[float]

    def said(self) -> str:
        each = ", ".join(f"{ratio:.3f}" for ratio in self.ratios)
        times = f"{interval_text(self.pair.bits_per_byte_ratio, 3)} times {self.pair.baseline}'s bits per byte"
        return f"{self.pair.label}: {times} over {len(self.seeds)} seeds ({each})"


def compare_seeds(measurements: Sequence[Measurement], settings: Settings) -> list[SeedSummary]:
    """Of runs whose settings differ in nothing but seeds and folders, after as many steps, where two configurations or
    more have two seeds or more in common.

    Args:
        settings: as in settings_report.run_blocks. Numbers in init_from are taken for seeds.
    """
    groups: dict[tuple[object, ...], dict[str, Measurement]] = {}
    for one in measurements:
        own = dict(settings.get(one.label, {}))
        own["init_from"] = NUMBER.sub("", own.get("init_from", ""))
        key = (one.step, *sorted((name, value) for name, value in own.items() if not name.startswith(OF_A_RUN)))
        if SEED in own:
            groups.setdefault(key, {}).setdefault(own[SEED], one)
    several = [group for group in groups.values() if len(group) > 1]
    if len(several) < 2:
        return []
    first = choose_baseline([next(iter(group.values())) for group in several])
    baseline = next(group for group in several if first in group.values())
    found = []
    for group in several:
        seeds = [seed for seed in group if seed in baseline]
        if group is not baseline and len(seeds) > 1:
            ours, theirs = [group[seed] for seed in seeds], [baseline[seed] for seed in seeds]
            each = [pair(a, b).bits_per_byte_ratio.value for a, b in zip(ours, theirs, strict=True)]
            means = _mean(ours), _mean(theirs)
            if means[0].label == means[1].label:
                means = replace(means[0], label=_all_names(ours)), replace(means[1], label=_all_names(theirs))
            found.append(SeedSummary(pair(*means), seeds, each))
    return found


def _mean(runs: Sequence[Measurement]) -> Measurement:
    """A run whose losses are the means of these."""
    first = runs[0]
    results = [run.perplexity for run in runs]
    by_length = {m: _mean_sums([result.by_length[m] for result in results]) for m in first.perplexity.by_length}
    headline = _mean_sums([result.headline for result in results])
    perplexity = replace(first.perplexity, headline=headline, by_length=by_length)
    return replace(first, label=_shared_name([run.label for run in runs]) or _all_names(runs), perplexity=perplexity)


def _all_names(runs: Sequence[Measurement]) -> str:
    return "mean of " + ", ".join(run.label for run in runs)


def _shared_name(labels: Sequence[str]) -> str:
    """What labels share that differ in one number, their seeds; empty for others."""
    apart = [SEPARATORS.split(label) for label in labels]  # pieces at even places, between them separators
    if len({len(pieces) for pieces in apart}) == 1:
        columns = list(zip(*apart, strict=True))
        own = [len(set(column)) > 1 for column in columns]
        seeds = [piece for column, differs in zip(columns, own, strict=True) if differs for piece in column]
        word = [column[0] == "seed" and any(own[i + 2 : i + 3]) for i, column in enumerate(columns)]
        kept = [i for i in range(0, len(columns), 2) if not own[i] and not word[i]]
        name = "".join((columns[i - 1][0] if i > kept[0] else "") + columns[i][0] for i in kept).strip("-_/. ")
        if name and sum(own) == 1 and all(map(SEED_IN_LABEL.fullmatch, seeds)):
            return name
    return ""


def _mean_sums(sums: Sequence[Sums]) -> Sums:
    return replace(sums[0], loss=np.mean([one.loss for one in sums], axis=0).tolist())


def seed_blocks(summaries: Sequence[SeedSummary], base_length: int) -> list[Block]:
    """The report's part on them; nothing where there are none. base_length: tokens of 1x."""
    if not summaries:
        return []
    lengths = [one.multiple for one in summaries[0].pair.lengths]
    rows = [
        [
            f"{one.pair.label} / {one.pair.baseline}",
            ", ".join(one.seeds),
            interval_text(one.pair.bits_per_byte_ratio, 3),
            ", ".join(f"{ratio:.3f}" for ratio in one.ratios),
            *(interval_text(length.perplexity_ratio, 3) for length in one.pair.lengths),
        ]
        for one in summaries
    ]
    names = [f"perplexity at {m}x ({m * base_length:,})" for m in lengths]
    return [
        Heading("Over several seeds"),
        Paragraph(
            "Ratios of losses averaged over seeds (below 1 the configuration named first is better). The intervals are "
            "over documents, paired, for these seeds; how much seeds matter is shown by the ratios of each."
        ),
        Table(["pair", "seeds", "bits per byte", "seed by seed", *names], rows),
    ]
