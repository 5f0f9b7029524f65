"""Several needles in held-out text, where finding one is not enough. Kinds, as in RULER (arXiv 2404.06654):

multi_key: needles of different names, one is asked for: the others distract.
multi_value: one name gets several values, all are asked for in their order:  assert NAME in (482913, 105572, ...
multi_query: needles of different names, all are asked for, in another order.

Needles as in needle.py, at random depths. Scored teacher-forced: a value's token counts when it is the model's
first choice after the true ones before it; a sample is exact when all of its tokens are, which is when greedy decoding
would write the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.common.scoring import Context, LanguageModel, Runtime, score
from eval.held_out.config import EvalConfig
from eval.held_out.needle import WORDS, haystack, line_start
from eval.held_out.perplexity import Documents, TextCodec

KINDS = ("multi_key", "multi_value", "multi_query")


@dataclass(frozen=True)
class MultiNeedleSample:
    """One context. multiple: its length, of the training length. needles: name and value of each, by place."""

    kind: str
    multiple: int
    needles: list[tuple[str, str]]
    context: Context


@dataclass(frozen=True)
class MultiNeedleCell:
    """Outcomes of a kind at a length: for each sample the value tokens that were hit and how many there are."""

    kind: str
    multiple: int
    hits: list[int]
    tokens: list[int]


def samples_per_length(length: int, config: EvalConfig) -> int:
    """Samples of each kind: a quarter of the tokens of the single needles, at most as many samples, at least one."""
    return max(1, min(config.needle_samples * config.needle_depths, config.needle_tokens // (4 * length)))


def build_multi_samples(
    store: Documents, codec: TextCodec, base_length: int, multiples: Sequence[int], config: EvalConfig
) -> tuple[list[MultiNeedleSample], list[str]]:
    """Samples of every kind and length, each with text, names and values of its own; notes on what does not fit."""
    samples: list[MultiNeedleSample] = []
    notes: list[str] = []
    available = int(np.maximum(np.asarray(store.lengths) - 2, 0).sum())
    for multiple in multiples:
        length = multiple * base_length
        if available < length:
            continue  # noted for the single needles
        for place, kind in enumerate(KINDS):
            for index in range(samples_per_length(length, config)):
                generator = np.random.default_rng([config.seed, 3, multiple, place, index])
                sample = _sample(store, codec, kind, multiple, length, config, generator)
                if sample is None:
                    notes.append(
                        f"No {kind} needles at {multiple}x: {length} tokens cannot hold {config.needle_count}."
                    )
                    break
                samples.append(sample)
    return samples, notes


def _sample(
    store: Documents,
    codec: TextCodec,
    kind: str,
    multiple: int,
    length: int,
    config: EvalConfig,
    generator: np.random.Generator,
) -> MultiNeedleSample | None:
    """None where needles and questions would take more than half of the context."""
    count = config.needle_count
    words = generator.permutation(len(WORDS))[: 1 if kind == "multi_value" else count].tolist()
    names = [f"ACCESS_CODE_{WORDS[word]}" for word in words] * (count if kind == "multi_value" else 1)
    values = ["".join(map(str, generator.integers(0, 10, config.needle_digits))) for _ in names]
    # Values are encoded on their own, so that the same tokens stand in the needle and are asked for.
    needles = [
        [*codec.encode(f"\n{name} = "), *codec.encode(value), *codec.encode("\n")]
        for name, value in zip(names, values, strict=True)
    ]
    asked, targets = _questions(codec, kind, names, values, generator)
    room = length - 1 - len(asked)
    if room < 2 * sum(map(len, needles)):
        return None
    text = haystack(store, room - sum(map(len, needles)), generator)
    cuts = sorted(line_start(codec, text, int(cut)) for cut in generator.integers(0, len(text) + 1, count))
    parts: list[Sequence[int] | NDArray[np.int64]] = [[codec.bos_id]]
    for needle, start, stop in zip(needles, [0, *cuts], cuts, strict=False):
        parts += [text[start:stop], needle]
    tokens = np.concatenate([np.asarray(part, np.int64) for part in [*parts, text[cuts[-1] :], asked]])
    whole = np.full(length, -100, np.int64)
    whole[-len(targets) :] = targets
    return MultiNeedleSample(kind, multiple, list(zip(names, values, strict=True)), Context(tokens, whole))


def _questions(
    codec: TextCodec, kind: str, names: list[str], values: list[str], generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Tokens behind the text, without the last value's last one, and the target of each: -100 but for values."""
    if kind == "multi_value":
        asked = [(f"\nassert {names[0]} in (" if place == 0 else ", ", value) for place, value in enumerate(values)]
    else:
        order = generator.permutation(len(names))[: 1 if kind == "multi_key" else None].tolist()
        asked = [(f"\nassert {names[place]} == ", values[place]) for place in order]
    tokens: list[int] = []
    scored: list[bool] = []
    for prompt, value in asked:
        for text, is_value in ((prompt, False), (value, True)):
            ids = codec.encode(text)
            tokens += ids
            scored += [is_value] * len(ids)
    following = zip(tokens[1:], scored[1:], strict=True)
    return tokens[:-1], [token if is_value else -100 for token, is_value in following]


def measure_multi_needles(
    model: LanguageModel, samples: Sequence[MultiNeedleSample], runtime: Runtime, label: str
) -> list[MultiNeedleCell]:
    """Scores one model on the samples: one cell for each kind and length."""
    scored = score(model, [sample.context for sample in samples], runtime, f"{label}: several needles")
    cells: dict[tuple[str, int], MultiNeedleCell] = {}
    for sample, one in zip(samples, scored, strict=True):
        key = (sample.kind, sample.multiple)
        cell = cells.setdefault(key, MultiNeedleCell(*key, [], []))
        cell.hits.append(int(one.hit.sum()))
        cell.tokens.append(len(one.hit))
    return list(cells.values())
