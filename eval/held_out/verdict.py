"""What an evaluation on held-out text found, in a sentence."""

from collections.abc import Sequence

from eval.held_out.analysis import NeedleScore, PairSummary, RunSummary
from eval.reporting.formatting import fixed, interval_text
from eval.reporting.verdict import above, listed, sentence, standing


def verdict(runs: Sequence[RunSummary], pairs: Sequence[PairSummary]) -> str:
    """Against the baseline, at the training length and at the longest; then needles."""
    quality = [_against(runs[0], pair) for pair in pairs] if pairs else [_alone(run) for run in runs]
    return sentence([*quality, needle_verdict(runs)])


def _against(run: RunSummary, pair: PairSummary) -> str:
    ratio, longest = pair.bits_per_byte_ratio, pair.lengths[-1]
    said = (
        f"{pair.label} is {standing(ratio, 1, 'low')} {pair.baseline} in bits per byte of held-out text "
        f"({interval_text(ratio, 3)} times)"
    )
    if longest.multiple == 1:
        return said
    tokens = run.lengths[-1].tokens
    return (
        f"{said} and {standing(longest.perplexity_ratio, 1, 'low')} it in perplexity at {tokens:,} tokens, "
        f"{longest.multiple}x ({interval_text(longest.perplexity_ratio, 3)} times)"
    )


def _alone(run: RunSummary) -> str:
    first, last = run.lengths[0], run.lengths[-1]
    return (
        f"{run.label} has {interval_text(run.bits_per_byte, 3)} bits per byte of held-out text, and a perplexity of "
        f"{fixed(first.perplexity.value, 2)} in contexts of {first.tokens:,} tokens and "
        f"{fixed(last.perplexity.value, 2)} in those of {last.tokens:,}"
    )


def needle_verdict(runs: Sequence[RunSummary]) -> str:
    """Which runs find needles above chance, and up to what length."""
    measured = [run for run in runs if run.chance is not None]
    if not measured:
        return "needles were not measured"
    found = {run.label: above_chance(run) for run in measured}
    clauses = [f"{label} up to {max(at)}x the training length" for label, at in found.items() if at]
    if clauses:
        return f"needles are found above chance by {listed(clauses)}"
    if all(cell.token_accuracy.low is None for run in measured for cell in run.needles_by_length):
        return "too few samples to say whether needles are found above chance"
    return "no run finds needles above chance"


def above_chance(run: RunSummary) -> list[int]:
    """Multiples at which more tokens of one needle or of several are right than without the needle."""
    cells: list[NeedleScore] = [*run.needles_by_length, *(cell for scores in run.several.values() for cell in scores)]
    chance = run.chance
    return [] if chance is None else [c.multiple for c in cells if above(c.token_accuracy, chance.token_accuracy)]
