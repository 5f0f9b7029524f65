"""The report of an evaluation: Markdown, one HTML page, PNG plots, and every number as JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path

from eval.common.metrics import Series
from eval.common.provenance import Provenance
from eval.held_out import figures as plots
from eval.held_out.analysis import INTERVAL_METHODS, PairSummary, RunSummary, attention_kind
from eval.held_out.attention_report import attention_blocks, head_mean
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import Measurement
from eval.held_out.needle_report import needle_blocks
from eval.held_out.seeds import SeedSummary, seed_blocks
from eval.held_out.settings_report import run_blocks
from eval.held_out.verdict import verdict
from eval.reporting.document import Block, Details, Heading, Items, Paragraph, Picture, Table, Verdict, pictures_of
from eval.reporting.formatting import count, interval_text
from eval.reporting.writing import made_by, write_documents

TITLE = "LongSplash evaluation"


@dataclass(frozen=True)
class Study(Provenance):
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
    seeds: list[SeedSummary]
    settings: dict[str, dict[str, str]]
    metrics: dict[str, dict[str, Series]]
    base_length: int
    data: str
    data_fingerprint: str
    notes: list[str]
    seconds: float


def write_report(study: Study, output: Path) -> tuple[Path, list[Picture]]:
    """Writes report.md, report.html, report.json and plots/ into `output`; returns the HTML page's path and what is
    pictured there."""
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Verdict(verdict(study.runs, study.pairs), found_lines(study)),
        *_lengths(study, output),
        *_headline(study),
        *seed_blocks(study.seeds, study.base_length),
        *needle_blocks(study.runs, study.config, study.base_length, output),
        *attention_blocks(study.measurements, study.config, study.base_length, output),
        *_training(study, output),
        *run_blocks(study.measurements, study.settings),
        *_method(study),
    ]
    page = write_documents(output / "report.md", TITLE, [run.label for run in study.runs], blocks, asdict(study))
    return page, pictures_of(blocks)


def summary_lines(study: Study, page: Path) -> list[str]:
    """The evaluation in a few lines: ten for two runs at four lengths."""
    return [*found_lines(study), f"Evaluated in {study.seconds:.0f} s; report: {page}"]


def found_lines(study: Study) -> list[str]:
    """What was compared and what was found."""
    trained = "; ".join(
        f"{one.label} ({attention_kind(one)}, {one.parameters / 1e6:.1f}M parameters, step {one.step:,}"
        + (f", {one.training['tokens'] / 1e6:.2f}M tokens)" if one.training.get("tokens") else ")")
        for one in study.measurements
    )
    lengths = {one.training_length for one in study.measurements}
    at = " and ".join(f"{length:,}" for length in sorted(lengths))
    counted = "" if lengths == {study.base_length} else f", 1x is {study.base_length:,}"
    lines = [f"Trained at {at} tokens{counted}: {trained}"]
    ratios = {pair.label: pair for pair in study.pairs}
    for run in study.runs:
        bits = interval_text(run.bits_per_byte, 3)
        line = f"{run.label}: {bits} bits per byte, perplexity {run.perplexity.value:.2f}"
        if run.label in ratios:
            pair = ratios[run.label]
            line += f", bits per byte {interval_text(pair.bits_per_byte_ratio, 3)} times {pair.baseline}'s"
        lines.append(line)
    lines += [one.said() for one in study.seeds]
    for i, score in enumerate(study.runs[0].lengths):
        row = "; ".join(f"{run.label} {interval_text(run.lengths[i].perplexity)}" for run in study.runs)
        lines.append(f"Perplexity at {score.multiple}x ({score.tokens:,} tokens): {row}")
    lines.append("Needle tokens right: " + "; ".join(_needle_line(run) for run in study.runs))
    profiled = [one for one in study.measurements if one.attention]
    if profiled:
        lines.append("Live 64x64 tiles: " + "; ".join(_live_line(one) for one in profiled))
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


def _lengths(study: Study, output: Path) -> list[Block]:
    plan, folder = study.measurements[0].plan, output / "plots"
    over_length = plots.perplexity_over_length(study.runs, study.base_length, folder / "perplexity_over_length.png")
    trained = [one.training_length for one in study.measurements]
    by_position = plots.perplexity_by_position(study.runs, trained, folder / "perplexity_by_position.png")
    documents = count(len(plan.documents), "document")
    lengths = study.runs[0].lengths
    shown = "with 95 % intervals" if lengths[0].perplexity.low is not None else f"without intervals ({documents})"
    header = ["run", *(f"{score.multiple}x ({score.tokens:,})" for score in lengths)]
    rows = [[run.label, *(interval_text(score.perplexity) for score in run.lengths)] for run in study.runs]
    blocks: list[Block] = [
        Heading("Perplexity over context length"),
        Picture(over_length, f"Perplexity over context length {shown}; the same tokens at every length.", _alt(study)),
        Picture(by_position, f"Perplexity by position in the longest context {shown}."),
        Paragraph(
            f"The first {plan.multiples[-1] * plan.base_length:,} predicted tokens of "
            f"{count(len(plan.documents), 'held-out document')}. Every column scores these same tokens, cut into fresh "
            "contexts of the column's length; only the context that a token sees differs. Growing context should lower "
            "perplexity; a model that cannot use positions beyond its training length rises instead."
        ),
        Table(header, rows, caption="Perplexity per token by context length, in multiples of 1x (tokens)"),
    ]
    if study.pairs:
        rows = [
            [f"{pair.label} / {pair.baseline}", *(interval_text(one.perplexity_ratio, 3) for one in pair.lengths)]
            for pair in study.pairs
        ]
        caption = "Ratio of perplexities, paired over documents (below 1 the run named first is better)"
        blocks.append(Table(["pair", *header[1:]], rows, caption=caption))
    return blocks


def _alt(study: Study) -> str:
    """What the picture of perplexity over length shows."""
    clauses = [
        f"{run.label} goes from {run.lengths[0].perplexity.value:.2f} at {run.lengths[0].tokens:,} tokens to "
        f"{run.lengths[-1].perplexity.value:.2f} at {run.lengths[-1].tokens:,}"
        for run in study.runs
    ]
    return f"Line plot of perplexity over context length: {'; '.join(clauses)}."


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
        caption = "Paired over the same documents (below 0, or below 1, the run named first is better)"
        blocks.append(Table(["pair", "difference in bits per byte", "ratio of bits per byte"], rows, caption=caption))
    return blocks


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
    facts = [
        f"Held-out text: {study.data}, fingerprint {study.data_fingerprint[:16]}.",
        f"Code version of the evaluation: {study.code_version}. Hardware: {study.hardware}. Date: {study.date}.",
        "report.json beside this page holds every number, results/ the raw sums of each checkpoint.",
    ]
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
        Details("Settings of the evaluation", [Table(["setting", "value"], settings, numeric=False)]),
        *made_by(study.command, facts),
    ]
