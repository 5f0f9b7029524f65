"""Tables and plots of eval.sparse_frontier."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from eval.reporting.document import Block, Details, Heading, Items, Paragraph, Picture, Table, Verdict, pictures_of
from eval.reporting.formatting import count, interval_text, percent_text
from eval.reporting.statistics import LEAST_UNITS, Interval, paired_sums, ratio_of_sums, share
from eval.reporting.verdict import sentence, standing
from eval.reporting.writing import made_by, write_documents
from eval.sparse_frontier.config import PHASES, Cell, PrefillTime, Study
from eval.sparse_frontier.names import AS_THEY_ARE, density_text, method_name
from eval.sparse_frontier.plots import PANELS_IN_A_ROW, Panel, Point, density_maps, in_rows, over_density
from eval.sparse_frontier.ruler_report import RulerSummary, ruler_blocks, ruler_lines, ruler_panel, summarise_ruler
from eval.sparse_frontier.tasks import CLOSE

TITLE = "LongSplash sparse attention: trained or pruned"
ACTS = {
    "prefill": "Policies act on every token of the contexts, questions included. Vertical-Slash and FlexPrefill choose "
    "for all tokens from the last queries of a context, which have seen all of it.",
    "decode": "Policies act on the last tokens, decoded one by one behind a densely prefilled prompt; both models as "
    "they are were scored on the same tokens. SnapKV's evictions see all of a needle's question but its last token.",
}


@dataclass(frozen=True)
class Summary:
    """One cell with intervals. ratio: of the perplexity to the dense softmax model's, paired over documents. needles:
    share of value tokens right; exact: of values; chance: of tokens without the needle; None where there is none."""

    cell: Cell
    density: float
    tile_density: float | None
    perplexity: Interval
    ratio: Interval
    needles: Interval | None
    exact: Interval | None
    several: Interval | None
    chance: Interval | None


@dataclass(frozen=True)
class Summaries:
    cells: list[Summary]
    ruler: list[RulerSummary]


def summarise(study: Study) -> Summaries:
    """Computed once, for report, tables and summary."""
    return Summaries([_summary(cell, _dense(study, cell)) for cell in study.cells], summarise_ruler(study))


def _dense(study: Study, cell: Cell) -> Cell:
    """The dense softmax cell on the same tokens."""
    key = ("dense", cell.phase, cell.multiple)
    return next(one for one in study.cells if (one.method, one.phase, one.multiple) == key)


def _summary(cell: Cell, dense: Cell) -> Summary:
    several = [pair for pairs in cell.several.values() for pair in pairs]
    return Summary(
        cell=cell,
        density=float(np.mean(cell.density)),
        tile_density=None if cell.tile_density is None else float(np.mean(cell.tile_density)),
        perplexity=ratio_of_sums(cell.loss, cell.tokens).map(math.exp),
        ratio=paired_sums(cell.loss, dense.loss, cell.tokens).map(math.exp),
        needles=_tokens_right(cell.needles),
        exact=_share(sum(hits == tokens for hits, tokens in cell.needles), len(cell.needles)),
        several=_tokens_right(several),
        chance=_tokens_right(cell.controls),
    )


def _tokens_right(pairs: list[tuple[int, int]]) -> Interval | None:
    """Samples, not tokens, are the independent trials."""
    return share(sum(h for h, _ in pairs) / sum(t for _, t in pairs), len(pairs)) if pairs else None


def _share(hits: int, trials: int) -> Interval | None:
    return share(hits / trials, trials) if trials else None


def write_report(study: Study, summaries: Summaries, output: Path) -> tuple[Path, list[Picture]]:
    """Writes sparse_frontier.md and .json, report.html and plots into `output`; returns the HTML page's path and what
    is pictured there."""
    output.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Verdict(verdict(summaries.cells), found_lines(summaries)),
    ]
    for phase in PHASES:
        of_phase = [one for one in summaries.cells if one.cell.phase == phase]
        blocks += _phase(of_phase, [one for one in summaries.ruler if one.phase == phase], phase, output)
    blocks += [*_times(study.times), *_method(study)]
    page = write_documents(output / "sparse_frontier.md", TITLE, study.subjects, blocks, _as_json(study, summaries))
    return page, pictures_of(blocks)


def _as_json(study: Study, summaries: Summaries) -> dict[str, object]:
    """Every number; the texts that were written to RULER's samples stay in results/."""
    raw = asdict(study)
    raw["ruler"] = [{name: value for name, value in cell.items() if name != "texts"} for cell in raw["ruler"]]
    cells = [_without_cell(one) for one in summaries.cells]
    return raw | {"summaries": cells, "ruler_summaries": [asdict(one) for one in summaries.ruler]}


def _without_cell(summary: Summary) -> dict[str, object]:
    facts = {name: getattr(summary.cell, name) for name in ("label", "method", "phase", "multiple", "wanted", "policy")}
    return facts | {name: value for name, value in asdict(summary).items() if name != "cell"}


def _phase(summaries: list[Summary], ruler: list[RulerSummary], phase: str, output: Path) -> list[Block]:
    path = over_density(_panels(summaries, ruler), output / f"plots/{phase}_over_density.png")
    alt = f"Plots over density. {' '.join(f'{line}.' for line in phase_lines(summaries, phase))}"
    blocks: list[Block] = [
        Heading("The prompt" if phase == "prefill" else "Decoding"),
        Picture(path, f"Perplexity{', RULER' if ruler else ''} and needles over density, {phase}.", alt),
        Paragraph(ACTS[phase]),
    ]
    for multiple in sorted({one.cell.multiple for one in summaries}):
        rows = [one for one in summaries if one.cell.multiple == multiple]
        blocks += [Heading(f"{rows[0].cell.context:,} tokens ({multiple}x)", 3), _table(rows)]
    blocks += ruler_blocks(ruler, phase, output)
    path = density_maps(_maps(summaries), output / f"plots/{phase}_density_by_head.png")
    longest = max(one.cell.context for one in summaries)
    shown = f"at {longest:,} tokens, each policy where it is nearest to entmax's density"
    return [*blocks, Picture(path, f"Density by layer and head, {phase}, {shown}.")]


def _panels(summaries: list[Summary], ruler: list[RulerSummary]) -> list[list[Panel]]:
    """Rows of at most PANELS_IN_A_ROW panels, of which a length fills one or more."""
    rows = []
    for multiple in sorted({one.cell.multiple for one in summaries}):
        here = [one for one in summaries if one.cell.multiple == multiple]
        title = f"{here[0].cell.context:,} tokens"
        rows.append(
            [
                Panel(f"{title}: perplexity", "times dense softmax's", _points(here, "ratio", 1), log_y=True),
                Panel(f"{title}: one needle", "value tokens right (%)", _points(here, "needles", 100)),
                Panel(f"{title}: several needles", "value tokens right (%)", _points(here, "several", 100)),
                ruler_panel(ruler, multiple),
            ]
        )
    # short texts hold no several needles, and RULER need not be there
    shown = [any(row[column].points for row in rows) for column in range(len(rows[0]))]
    kept = [[panel for panel, keep in zip(row, shown, strict=True) if keep] for row in rows]
    return [line for row in kept for line in in_rows(row, min(len(row), PANELS_IN_A_ROW))]


def _points(summaries: list[Summary], field: str, factor: float) -> list[Point]:
    points = []
    for one in summaries:
        interval: Interval | None = getattr(one, field)
        if interval is not None:
            scaled = interval.map(lambda value: factor * value)
            points.append(Point(method_name(one.cell.method), one.cell.method, one.density, scaled))
    return points


def _maps(summaries: list[Summary]) -> dict[str, list[list[float]]]:
    """Density by layer and head at the longest context: of entmax and of each policy where it is nearest to it."""
    longest = max(one.cell.multiple for one in summaries)
    here = [one for one in summaries if one.cell.multiple == longest and one.cell.method != "dense"]
    entmax = next(one for one in here if one.cell.method == "entmax")
    maps = {}
    for method in dict.fromkeys(["entmax", *(one.cell.method for one in here)]):
        of_method = [one for one in here if one.cell.method == method]
        nearest = min(of_method, key=lambda one: abs(math.log(one.density / entmax.density)))
        maps[f"{method_name(nearest.cell.method)}: {density_text(nearest.density)}"] = nearest.cell.density
    return maps


def _table(summaries: list[Summary]) -> Table:
    header = [
        "", "set to", "density", "64x64 tiles", "perplexity", "times dense softmax's", "needle: tokens right",
        "needle: exact", "several needles",
    ]  # fmt: skip
    rows = []
    for one in summaries:
        shares = ["" if part is None else percent_text(part) for part in (one.needles, one.exact, one.several)]
        if one.chance is not None:
            shares[0] += f", without it {percent_text(one.chance)}"
        ratio = "" if one.cell.method == "dense" else interval_text(one.ratio, 3)
        densities = [density_text(share) for share in (one.cell.wanted, one.density, one.tile_density)]
        rows.append([method_name(one.cell.method), *densities, interval_text(one.perplexity), ratio, *shares])
    return Table(header, rows)


def _times(times: list[PrefillTime]) -> list[Block]:
    rows = []
    for one in times:
        name = method_name(one.method) + (f" at {density_text(one.wanted)}" if one.wanted else "")
        spread = f"[{1e3 * min(one.seconds):.1f}, {1e3 * max(one.seconds):.1f}]"
        rows.append([f"{one.context:,}", name, f"{1e3 * median(one.seconds):.1f} {spread}"])
    said = (
        "Prefill of one prompt in one chunk: median, shortest and longest. Of policies only those whose selection is "
        "cheaper than attention and fits a kernel that skips what it does not keep; the others select keys exactly as "
        "described but compute dense scores, so that their time says nothing of the method."
    )
    return [Heading("Time to the first token"), Paragraph(said), Table(["tokens", "", "milliseconds"], rows)]


def _method(study: Study) -> list[Block]:
    settings = [
        f"{one.context:,} tokens, {one.phase}, {density_text(one.wanted)}: {one.policy}"
        for one in study.cells
        if one.wanted
    ]
    method = (
        "One softmax model under policies that were made for trained models, each set to several densities and to "
        "entmax's own (BSFA: calibrated to its ks), beside the model as it is and an entmax model. Density: share "
        "of the visible pairs of query and key that are read, mean over layers and heads; for entmax, the pairs "
        f"with weight. Intervals are 95 %: jackknife over {count(study.documents, 'document')} with Student's t "
        "for perplexity, paired where it is divided by the dense softmax model's, as in the plots; Clopper-Pearson "
        f"over samples for needles. None below {LEAST_UNITS} documents or samples."
    )
    facts = [
        f"code {study.code_version}", study.hardware, study.date,
        f"{study.data} ({study.data_fingerprint[:12]})",
        "; ".join(f"{label}: {precision}" for label, precision in study.precision.items()),
        f"seed {study.settings['seed']}",
    ]  # fmt: skip
    return [
        Heading("Method and limits"),
        Paragraph(method),
        Details("Settings found", [Items(settings)]),
        *made_by(study.command, facts + study.notes),
    ]


def verdict(summaries: Sequence[Summary]) -> str:
    """For each phase, at the longest context: entmax against dense softmax, and the best policy that reads no more."""
    longest = max(one.cell.context for one in summaries)
    return sentence([_phase_verdict([one for one in summaries if one.cell.context == longest], of) for of in PHASES])


def _phase_verdict(summaries: Sequence[Summary], phase: str) -> str:
    entmax, rival = _entmax_and_rival([one for one in summaries if one.cell.phase == phase])
    said = (
        f"{'In the prompt' if phase == 'prefill' else 'in decoding'}, at {entmax.cell.context:,} tokens, entmax reads "
        f"{density_text(entmax.density)} of the keys and is {standing(entmax.ratio, 1, 'low')} dense softmax in "
        f"perplexity ({interval_text(entmax.ratio, 3)} times)"
    )
    if rival is None:
        return f"{said}, no policy reads as few"
    return (
        f"{said}, the best policy that reads no more, {method_name(rival.cell.method)}, is "
        f"{standing(rival.ratio, 1, 'low')} it ({interval_text(rival.ratio, 3)} times)"
    )


def _entmax_and_rival(summaries: Sequence[Summary]) -> tuple[Summary, Summary | None]:
    """Of one phase and length: entmax, and the policy of the lowest perplexity of about its density or less."""
    entmax = next(one for one in summaries if one.cell.method == "entmax")
    policies = [one for one in summaries if one.cell.method not in AS_THEY_ARE]
    rivals = [one for one in policies if one.density <= (1 + CLOSE) * entmax.density]
    return entmax, min(rivals, key=lambda one: one.perplexity.value, default=None)


def summary_lines(summaries: Summaries, page: Path) -> list[str]:
    """A line for each phase and length: both models as they are, and the best policy of about entmax's density or
    less."""
    return [*found_lines(summaries), f"report: {page}"]


def found_lines(summaries: Summaries) -> list[str]:
    lines = [line for phase in PHASES for line in phase_lines(summaries.cells, phase)]
    return [*lines, *ruler_lines(summaries.ruler)]


def phase_lines(summaries: Sequence[Summary], phase: str) -> list[str]:
    lines = []
    for multiple in sorted({one.cell.multiple for one in summaries}):
        here = [one for one in summaries if (one.cell.phase, one.cell.multiple) == (phase, multiple)]
        rival = _entmax_and_rival(here)[1]
        shown = [*(one for one in here if one.cell.method in AS_THEY_ARE), *([rival] if rival else [])]
        cells = "; ".join(
            f"{method_name(one.cell.method)} {interval_text(one.perplexity)} at {density_text(one.density)}"
            for one in shown
        )
        lines.append(f"{phase}, {here[0].cell.context:,} tokens, perplexity: {cells}")
    return lines
