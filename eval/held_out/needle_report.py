"""The report's part on needles: folded where no run finds them above chance."""

from collections.abc import Sequence
from pathlib import Path

from eval.held_out import figures as plots
from eval.held_out.analysis import NeedleScore, RunSummary
from eval.held_out.config import EvalConfig
from eval.held_out.verdict import above_chance, needle_verdict
from eval.reporting.document import Block, Details, Heading, Paragraph, Picture, Table
from eval.reporting.formatting import count, percent_text


def needle_blocks(runs: Sequence[RunSummary], config: EvalConfig, base_length: int, output: Path) -> list[Block]:
    """Pictures, which are written below output/plots, and tables."""
    said = needle_verdict(runs)
    text = (
        f"{said[0].upper()}{said[1:]}. A line ACCESS_CODE_WORD = {'9' * config.needle_digits} (random digits) is "
        "hidden in held-out text and asked for at the end. Token accuracy: the value's tokens that are the model's "
        "first choice, teacher-forced. Exact: all of them. Chance: the same prompts without their needles, at the "
        "shortest length."
    )
    measured = [run for run in runs if run.chance is not None]
    head: list[Block] = [Heading("Needles"), Paragraph(text)]
    if not measured:
        return head
    blocks: list[Block] = [_heat_map(run, base_length, output) for run in measured]
    cells = measured[0].needles_by_length
    header = ["run", *(f"{cell.multiple}x, {count(cell.samples, 'sample')}" for cell in cells), "without needle"]
    tokens = [[run.label, *(percent_text(cell.token_accuracy) for cell in _with_chance(run))] for run in measured]
    exact = [[run.label, *(percent_text(cell.exact_match) for cell in _with_chance(run))] for run in measured]
    blocks += [Table(header, tokens, caption="One needle, token accuracy")]
    blocks += [Table(header, exact, caption="One needle, exact match"), *_several_needles(measured, config)]
    if any(above_chance(run) for run in measured):
        return head + blocks
    return [*head, Details("The needles' numbers", blocks)]


def _heat_map(run: RunSummary, base_length: int, output: Path) -> Picture:
    path = plots.needle_heat_map(run, base_length, output / "plots" / f"needle_{run.label}.png")
    cells = ", ".join(f"{100 * cell.token_accuracy.value:.0f} % at {cell.multiple}x" for cell in run.needles_by_length)
    alt = f"Heat map of the value's tokens that {run.label} gets right; over all depths: {cells}."
    return Picture(path, f"Needle accuracy of {run.label} by context length and depth.", alt)


def _with_chance(run: RunSummary) -> list[NeedleScore]:
    return [*run.needles_by_length, *([run.chance] if run.chance else [])]


def _several_needles(runs: Sequence[RunSummary], config: EvalConfig) -> list[Block]:
    """One row for each kind and run; nothing where no context could hold them."""
    cells = [cell for run in runs for scores in run.several.values() for cell in scores]
    if not cells:
        return []
    multiples = sorted({cell.multiple for cell in cells})
    tokens, exact = [], []
    for kind in dict.fromkeys(kind for run in runs for kind in run.several):
        for run in runs:
            found = {cell.multiple: cell for cell in run.several[kind]}
            row = [found.get(multiple) for multiple in multiples]
            tokens.append([kind, run.label, *(percent_text(cell.token_accuracy) if cell else "" for cell in row)])
            exact.append([kind, run.label, *(percent_text(cell.exact_match) if cell else "" for cell in row)])
    samples = {cell.multiple: cell.samples for cell in cells}
    header = ["kind", "run", *(f"{multiple}x, {count(samples[multiple], 'sample')}" for multiple in multiples)]
    text = (
        f"{config.needle_count} needles at random depths. multi_key: one of them is asked for; multi_value: one name "
        "with that many values, all asked for in their order; multi_query: all are asked for, in another order."
    )
    return [
        Paragraph(text),
        Table(header, tokens, caption="Several needles, token accuracy"),
        Table(header, exact, caption="Several needles, exact match of all values asked for"),
    ]
