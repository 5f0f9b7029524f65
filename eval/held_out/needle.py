"""A needle in held-out text: an assignment is hidden at a depth, its value is asked for at the end.

    <bos> held-out text ... ACCESS_CODE_RIVER = 482913 ... held-out text  assert ACCESS_CODE_RIVER == 482913
                                                                                                    ~~~~~~
Only the underlined tokens are scored, teacher-forced: a value token counts when it is the model's first choice after
the true ones before it. Controls ask the same questions of the same texts without their needles: that is chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.common.scoring import Context, LanguageModel, Runtime, score
from eval.held_out.config import EvalConfig
from eval.held_out.perplexity import Documents, TextCodec

WORDS = (
    "AMBER", "ANCHOR", "BEACON", "BRIDGE", "CANYON", "CEDAR", "COMET", "CORAL", "DELTA", "EMBER", "FALCON", "FOREST",
    "GARNET", "GLACIER", "HARBOR", "HORIZON", "ISLAND", "JASPER", "LAGOON", "LANTERN", "MAPLE", "MEADOW", "METEOR",
    "NEBULA", "OCEAN", "ORCHID", "PRAIRIE", "QUARTZ", "RIVER", "SADDLE", "THUNDER", "WILLOW",
)  # fmt: skip
# A needle starts at a line's start where one lies within this many tokens before its depth.
LINE_SEARCH = 64


@dataclass(frozen=True)
class NeedleSample:
    """One context and where its value is asked.

    Args:
        multiple: Length as a multiple of the training length.
        depth: Wanted place of the needle, 0 at the start and 1 at the end; None for the control without a needle.
        needle_start: Index of the needle's first token in the context, -1 for the control.
        tokens: int64 (T,) with T = multiple * training length: prompt, then all value tokens but the last.
        value: The value's tokens; tokens[-len(value) + 1 :] are all but its last.
    """

    multiple: int
    depth: float | None
    needle_start: int
    tokens: NDArray[np.int64]
    value: list[int]


@dataclass(frozen=True)
class NeedleCell:
    """Outcomes of one cell: for each sample the value tokens that were hit and how many there are."""

    multiple: int
    depth: float | None
    hits: list[int]
    tokens: list[int]


def depths(count: int) -> list[float]:
    """`count` depths from 0 to 1, rounded so that they print and compare exactly."""
    return [round(float(depth), 4) for depth in np.linspace(0, 1, count)]


def build_samples(
    store: Documents, codec: TextCodec, base_length: int, multiples: Sequence[int], config: EvalConfig
) -> tuple[list[NeedleSample], list[str]]:
    """The samples of every length and depth, and notes on lengths that the split is too small for.

    Every sample has a text, name and value of its own, so that samples are independent trials. The shortest length has
    a control for every sample: what a model guesses without the needle does not hang on the length of the text before.

    Raises:
        ValueError: the training length cannot hold the needle and its question.
    """
    samples: list[NeedleSample] = []
    notes: list[str] = []
    available = int(np.maximum(np.asarray(store.lengths) - 2, 0).sum())
    for multiple in multiples:
        if available < multiple * base_length:
            notes.append(
                f"No needles at {multiple}x ({multiple * base_length} tokens): held-out text has {available} tokens."
            )
            continue
        for place, depth in enumerate(depths(config.needle_depths)):
            for index in range(samples_per_cell(multiple * base_length, config)):
                generator = np.random.default_rng([config.seed, 2, multiple, place, index])
                sample, control = _pair(store, codec, multiple, multiple * base_length, depth, config, generator)
                samples.extend([sample, control] if multiple == multiples[0] else [sample])
    return samples, notes


def samples_per_cell(length: int, config: EvalConfig) -> int:
    """needle_samples, or fewer where the contexts of all depths would exceed needle_tokens; at least 1."""
    return max(1, min(config.needle_samples, config.needle_tokens // (config.needle_depths * length)))


def _pair(
    store: Documents,
    codec: TextCodec,
    multiple: int,
    length: int,
    depth: float,
    config: EvalConfig,
    generator: np.random.Generator,
) -> tuple[NeedleSample, NeedleSample]:
    """One sample and its control."""
    name = f"ACCESS_CODE_{WORDS[int(generator.integers(len(WORDS)))]}"
    digits = "".join(str(digit) for digit in generator.integers(0, 10, config.needle_digits))
    # The value is encoded on its own, so that the same tokens stand in the needle and are asked for.
    value = codec.encode(digits)
    needle = codec.encode(f"\n{name} = ") + value + codec.encode("\n")
    question = codec.encode(f"\nassert {name} == ")
    room = length - 1 - len(question) - (len(value) - 1)
    if room < 2 * len(needle):
        asking = length - room
        raise ValueError(
            f"a context of {length} tokens cannot hold a needle of {len(needle)} tokens, as much other text and a "
            f"question with its answer of {asking}, which are {asking + 2 * len(needle)} tokens: set a larger "
            f"{config.option('base_length')} or fewer {config.option('needle_digits')}"
        )
    text = haystack(store, room, generator)
    asked = np.array(question + value[:-1], np.int64)
    bos = np.array([codec.bos_id], np.int64)
    control = NeedleSample(multiple, None, -1, np.concatenate([bos, text, asked]), value)
    shorter = text[: room - len(needle)]
    cut = line_start(codec, shorter, round(depth * len(shorter)))
    parts = [bos, shorter[:cut], np.array(needle, np.int64), shorter[cut:], asked]
    return NeedleSample(multiple, depth, 1 + cut, np.concatenate(parts), value), control


def haystack(store: Documents, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`size` tokens of held-out documents in random order, each from its start and without <bos> and <eos>."""
    parts: list[NDArray[np.int64]] = []
    missing = size
    for document in generator.permutation(len(store.lengths)).tolist():
        part = store.document(document)[1:-1][:missing].astype(np.int64)
        parts.append(part)
        missing -= len(part)
        if missing == 0:
            break
    return np.concatenate(parts)


def line_start(codec: TextCodec, text: NDArray[np.int64], wanted: int) -> int:
    """The last start of a line at or up to LINE_SEARCH tokens before `wanted`; `wanted` where there is none."""
    for cut in range(wanted, max(0, wanted - LINE_SEARCH), -1):
        if codec.decode([int(text[cut - 1])]).endswith("\n"):
            return cut
    return wanted if wanted > LINE_SEARCH else 0


def context_of(sample: NeedleSample) -> Context:
    """The sample as a context that is scored at the value's tokens only."""
    targets = np.full(len(sample.tokens), -100, np.int64)
    targets[-len(sample.value) :] = sample.value
    return Context(sample.tokens, targets)


def measure_needles(
    model: LanguageModel, samples: Sequence[NeedleSample], runtime: Runtime, label: str
) -> list[NeedleCell]:
    """Scores one model on the samples: one cell for each length and depth, and one for the controls."""
    scored = score(model, [context_of(sample) for sample in samples], runtime, f"{label}: needles")
    cells: dict[tuple[int, float | None], NeedleCell] = {}
    for sample, one in zip(samples, scored, strict=True):
        cell = cells.setdefault((sample.multiple, sample.depth), NeedleCell(sample.multiple, sample.depth, [], []))
        cell.hits.append(int(one.hit.sum()))
        cell.tokens.append(len(sample.value))
    return list(cells.values())
