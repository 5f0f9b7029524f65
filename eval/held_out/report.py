"""The report of an evaluation: Markdown, one HTML page, PNG plots, and every number as JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_file, write_json
from eval.common.metrics import Series
from eval.held_out import figures as plots
from eval.held_out.analysis import INTERVAL_METHODS, NeedleScore, PairSummary, RunSummary, attention_kind
from eval.held_out.attention_report import attention_blocks, head_mean
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import Measurement
from eval.reporting.formatting import count, interval_text, percent_text
from eval.reporting.html_report import Block, Code, Heading, Items, Paragraph, Picture, Table, to_html, to_markdown

TITLE = "LongSplash evaluation"


@dataclass(frozen=True)
class Study:
    """All that a report is made of.

    Args:
        settings: Resolved training configuration of each run, flattened to dotted keys.
        metrics: Training metrics of each run, see eval.common.metrics.read_metrics.
        base_length: Tokens of 1x.
        notes: What was not measured, and why.
        seconds: Wall time of the whole evaluation, reused results not counted.
    """

    config: EvalConfig
    measurements: list[Measurement]
    runs: list[RunSummary]
    pairs: list[PairSummary]
    settings: dict[str, dict[str, str]]
    metrics: dict[str, dict[str, Series]]
    base_length: int
    data: str
    data_fingerprint: str
    code_version: str
    command: str
    hardware: str
    date: str
    notes: list[str]
    seconds: float


def write_report(study: Study, output: Path) -> tuple[Path, list[Picture]]:
    """Writes report.md, report.html, report.json and plots/ into `output`; returns the HTML page's path and what is
    pictured there."""
    attention = attention_blocks(study.measurements, study.config, study.base_length, output)
    blocks: list[Block] = [
        Heading(TITLE, 1), *_head(study), *_headline(study), *_lengths(study), *_positions(study, output),
        *_needles(study, output), *attention, *_training(study, output), *_method(study),
    ]  # fmt: skip
    write_file(output / "report.md", to_markdown(blocks, output).encode())
    page = output / "report.html"
    write_file(page, to_html(f"{TITLE}: {' and '.join(run.label for run in study.runs)}", blocks).encode())
    write_json(output / "report.json", asdict(study))
    return page, [block for block in blocks if isinstance(block, Picture)]


def summary_lines(study: Study, page: Path) -> list[str]:
    """The evaluation in a few lines: ten for two runs at four lengths."""
    trained = "; ".join(
        f"{one.label} ({attention_kind(one)}, {one.parameters / 1e6:.1f}M parameters, step {one.step:,}"
        + (f", {one.training['tokens'] / 1e6:.2f}M tokens)" if one.training.get("tokens") else ")")
        for one in study.measurements
    )
    lines = [f"Trained at {study.base_length} tokens: {trained}"]
    ratios = {pair.label: pair for pair in study.pairs}
    for run in study.runs:
        bits = interval_text(run.bits_per_byte, 3)
        line = f"{run.label}: {bits} bits per byte, perplexity {run.perplexity.value:.2f}"
        if run.label in ratios:
            pair = ratios[run.label]
            line += f", bits per byte {interval_text(pair.bits_per_byte_ratio, 3)} times {pair.baseline}'s"
        lines.append(line)
    for i, score in enumerate(study.runs[0].lengths):
        row = "; ".join(f"{run.label} {interval_text(run.lengths[i].perplexity)}" for run in study.runs)
        lines.append(f"Perplexity at {score.multiple}x ({score.tokens} tokens): {row}")
    lines.append("Needle tokens right: " + "; ".join(_needle_line(run) for run in study.runs))
    lines.append("Live 64x64 tiles: " + "; ".join(_live_line(one) for one in study.measurements))
    lines.append(f"Evaluated in {study.seconds:.0f} s; report: {page}")
    return lines


def _needle_line(run: RunSummary) -> str:
    if run.chance is None:
        return f"{run.label} not measured"
    cells = ", ".join(f"{cell.multiple}x {100 * cell.token_accuracy.value:.0f} %" for cell in run.needles_by_length)
    return f"{run.label} {cells} (without needle {100 * run.chance.token_accuracy.value:.0f} %)"


def _live_line(measurement: Measurement) -> str:
    layers = measurement.attention
    shares = {m: head_mean(layers, m, "live_share") for m in sorted({layer.multiple for layer in layers})}
    return f"{measurement.label} " + ", ".join(f"{m}x {100 * share:.0f} %" for m, share in shares.items())


def _head(study: Study) -> list[Block]:
    labels = [run.label for run in study.runs]
    measurements = study.measurements
    rows = [
        ["attention", *(attention_kind(one) for one in measurements)],
        ["parameters", *(f"{one.parameters:,}" for one in measurements)],
        ["optimizer steps", *(f"{one.step:,}" for one in measurements)],
        ["tokens trained on", *(_count(one.training.get("tokens")) for one in measurements)],
        ["training length (tokens)", *(f"{one.training_length:,}" for one in measurements)],
        ["checkpoint", *(one.checkpoint for one in measurements)],
        ["trained with code", *(str(one.training.get("code_version", "unknown")) for one in measurements)],
        ["evaluated in", *(one.precision for one in measurements)],
        ["evaluation (s)", *(f"{sum(one.seconds.values()):.0f}" for one in measurements)],
        ["evaluated on", *(f"{one.hardware}, {one.date}" for one in measurements)],
    ]
    blocks: list[Block] = [Table(["", *labels], rows, numeric=False)]
    if len(labels) > 1:
        differences = config_differences(study.settings)
        blocks.append(Heading("What differs between the runs"))
        if differences:
            blocks.append(Table(["setting", *labels], differences, numeric=False))
        else:
            blocks.append(Paragraph("Their resolved configurations are the same."))
    facts = [
        f"Held-out text: {study.data}, fingerprint {study.data_fingerprint[:16]}.",
        f"Code version of the evaluation: {study.code_version}. Hardware: {study.hardware}. Date: {study.date}.",
    ]
    return [*blocks, Items(facts), Code(study.command)]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def config_differences(settings: dict[str, dict[str, str]]) -> list[list[str]]:
    """Rows [key, value of each run] of the keys whose values are not all the same."""
    keys = sorted({key for one in settings.values() for key in one})
    # run_dir differs always and is the runs' name.
    rows = [[key, *(one.get(key, "not set") for one in settings.values())] for key in keys if key != "run_dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _headline(study: Study) -> list[Block]:
    first, plan = study.runs[0], study.measurements[0].plan
    share = first.tokens / plan.tokens_total
    blocks: list[Block] = [
        Heading(f"Held-out text in contexts of {plan.base_length:,} tokens"),
        Paragraph(
            f"{first.tokens:,} of {plan.tokens_total:,} held-out tokens ({100 * share:.0f} %, {first.bytes:,} bytes, "
            f"{count(first.documents, 'document')}) in windows of at most {plan.base_length} tokens within documents, "
            "each token " + ("scored once." if share == 1 else "scored at most once; the windows are a random sample.")
        ),
        Table(
            ["run", "bits per byte", "perplexity per token"],
            [[run.label, interval_text(run.bits_per_byte, 3), interval_text(run.perplexity)] for run in study.runs],
        ),
    ]
    if study.pairs:
        rows = [
            [
                f"{pair.label} against {pair.baseline}",
                interval_text(pair.bits_per_byte_difference, 3),
                interval_text(pair.bits_per_byte_ratio, 3),
            ]
            for pair in study.pairs
        ]
        blocks.append(Paragraph("Paired over the same documents (below 0, or below 1, the run named first is better):"))
        blocks.append(Table(["pair", "difference in bits per byte", "ratio of bits per byte"], rows))
    return blocks


def _lengths(study: Study) -> list[Block]:
    plan = study.measurements[0].plan
    blocks: list[Block] = [
        Heading("Perplexity over context length"),
        Paragraph(
            f"The first {plan.multiples[-1] * plan.base_length:,} predicted tokens of "
            f"{count(len(plan.documents), 'held-out document')}. Every column scores these same tokens, cut into fresh "
            "contexts of the column's length; only the context that a token sees differs. Growing context should lower "
            "perplexity; a model that cannot use positions beyond its training length rises instead."
        ),
    ]
    lengths = study.runs[0].lengths
    header = ["run", *(f"{score.multiple}x ({score.tokens:,})" for score in lengths)]
    rows = [[run.label, *(interval_text(score.perplexity) for score in run.lengths)] for run in study.runs]
    blocks.append(Table(header, rows))
    if study.pairs:
        rows = [
            [f"{pair.label} / {pair.baseline}", *(interval_text(one.perplexity_ratio, 3) for one in pair.lengths)]
            for pair in study.pairs
        ]
        blocks.append(Paragraph("Ratio of perplexities, paired over documents:"))
        blocks.append(Table(["pair", *header[1:]], rows))
    return blocks


def _positions(study: Study, output: Path) -> list[Block]:
    folder = output / "plots"
    over_length = plots.perplexity_over_length(study.runs, study.base_length, folder / "perplexity_over_length.png")
    trained = [one.training_length for one in study.measurements]
    score = study.runs[0].lengths[0].perplexity
    documents = count(len(study.measurements[0].plan.documents), "document")
    shown = "with 95 % intervals" if score.low is not None else f"without intervals ({documents})"
    by_position = plots.perplexity_by_position(study.runs, trained, folder / "perplexity_by_position.png")
    return [
        Picture(over_length, f"Perplexity over context length {shown}; the same tokens at every length."),
        Heading("Perplexity by position"),
        Picture(by_position, f"Perplexity by position in the longest context {shown}."),
    ]


def _needles(study: Study, output: Path) -> list[Block]:
    blocks: list[Block] = [
        Heading("Needle"),
        Paragraph(
            f"A line ACCESS_CODE_WORD = {'9' * study.config.needle_digits} (random digits) is hidden in held-out text "
            "and asked for at the end. Token accuracy: the value's tokens that are the model's first choice, "
            "teacher-forced. Exact: all of them. Chance: the same prompts without their "
            "needles, at the shortest length."
        ),
    ]
    measured = [run for run in study.runs if run.chance is not None]
    if not measured:
        return [*blocks, Paragraph("Not measured, see the notes.")]
    cells = measured[0].needles_by_length
    header = ["run", *(f"{cell.multiple}x, {count(cell.samples, 'sample')}" for cell in cells), "without needle"]
    tokens = [[run.label, *(percent_text(cell.token_accuracy) for cell in _with_chance(run))] for run in measured]
    exact = [[run.label, *(percent_text(cell.exact_match) for cell in _with_chance(run))] for run in measured]
    blocks += [Paragraph("Token accuracy:"), Table(header, tokens), Paragraph("Exact match:"), Table(header, exact)]
    for run in measured:
        path = output / "plots" / f"needle_{run.label}.png"
        plots.needle_heat_map(run, study.base_length, path)
        blocks.append(Picture(path, f"Needle accuracy of {run.label} by context length and depth."))
    return blocks + _several_needles(study)


def _several_needles(study: Study) -> list[Block]:
    """One row for each kind and run; nothing where no context could hold them."""
    cells = [cell for run in study.runs for scores in run.several.values() for cell in scores]
    if not cells:
        return []
    multiples = sorted({cell.multiple for cell in cells})
    tokens, exact = [], []
    for kind in dict.fromkeys(kind for run in study.runs for kind in run.several):
        for run in study.runs:
            found = {cell.multiple: cell for cell in run.several[kind]}
            row = [found.get(multiple) for multiple in multiples]
            tokens.append([kind, run.label, *(percent_text(cell.token_accuracy) if cell else "" for cell in row)])
            exact.append([kind, run.label, *(percent_text(cell.exact_match) if cell else "" for cell in row)])
    samples = {cell.multiple: cell.samples for cell in cells}
    header = ["kind", "run", *(f"{multiple}x, {count(samples[multiple], 'sample')}" for multiple in multiples)]
    text = (
        f"{study.config.needle_count} needles at random depths. multi_key: one of them is asked for; multi_value: one "
        "name with that many values, all asked for in their order; multi_query: all are asked for, in another order. "
        "Token accuracy:"
    )
    return [
        Paragraph(text),
        Table(header, tokens),
        Paragraph("Exact match of all values asked for:"),
        Table(header, exact),
    ]


def _with_chance(run: RunSummary) -> list[NeedleScore]:
    return [*run.needles_by_length, *([run.chance] if run.chance else [])]


def _training(study: Study, output: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Training")]
    losses = {label: one for label, one in study.metrics.items() if "train/loss" in one or "val/loss" in one}
    if losses:
        path = plots.loss_curves(losses, output / "plots" / "loss.png")
        blocks.append(Picture(path, "Training and held-out loss over optimizer steps."))
    else:
        blocks.append(Paragraph("No metrics were found beside these checkpoints."))
    alphas = {
        label: {name: series for name, series in one.items() if name.startswith("alpha/layer_")}
        for label, one in study.metrics.items()
    }
    # A fixed alpha is logged too, but its curve says nothing.
    moving = {
        label: one for label, one in alphas.items() if any(len(set(series.values)) > 1 for series in one.values())
    }
    if moving:
        path = plots.alpha_over_steps(moving, output / "plots" / "alpha_over_steps.png")
        blocks.append(Picture(path, "Alpha of every head over optimizer steps."))
    return blocks


def _method(study: Study) -> list[Block]:
    settings = [[name, str(value)] for name, value in asdict(study.config).items()]
    return [
        Heading("Method and limits"),
        Items(
            [
                INTERVAL_METHODS,
                f"Every choice is seeded (seed {study.config.seed}); all runs see the same documents and samples.",
                "Bits per byte counts the UTF-8 bytes of the scored text; the loss of the end-of-document token is "
                "included, its bytes are zero.",
                *study.notes,
            ]
        ),
        Table(["setting", "value"], settings, numeric=False),
        Paragraph("report.json beside this page holds every number, results/ the raw sums of each checkpoint."),
    ]
