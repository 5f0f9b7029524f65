"""What an evaluation on tasks found, in a sentence."""

from collections.abc import Sequence

from eval.held_out.analysis import choose_baseline
from eval.reporting.formatting import percent_text
from eval.reporting.verdict import Side, listed, sentence, standing
from eval.tasks.study import Row, Rows, RunResult

MOST_NAMED = 4


def verdict(runs: Sequence[RunResult], rows: Rows) -> str:
    """Every run against the baseline, in the means over tasks and by score, then against chance."""
    baseline = choose_baseline(runs)
    others = [i for i, run in enumerate(runs) if run is not baseline]
    clauses = [_in_mean(runs[i].label, row, i, baseline.label) for i in others for row in rows.means]
    clauses += [_against(runs, rows.groups, i, baseline.label) for i in others]
    return sentence([*(one for one in clauses if one), *(_chance(runs, rows.groups, i) for i in range(len(runs)))])


def _in_mean(run: str, row: Row, i: int, baseline: str) -> str:
    """Nothing where the two cannot be paired."""
    difference = row.differences[i]
    if difference is None:
        return ""
    at = "" if row.length is None else f" at {row.length:,} tokens"
    better = standing(difference.interval, 0, "high")
    return f"{run} is {better} {baseline} in the {row.task}{at} (by {percent_text(difference.interval, 1)})"


def _against(runs: Sequence[RunResult], rows: Sequence[Row], i: int, baseline: str) -> str:
    better: dict[str, Side] = {
        metric.name: "high" if metric.higher_is_better else "low" for task in runs[i].tasks for metric in task.metrics
    }
    found: dict[str, list[str]] = {"ahead of": [], "behind": [], "level with": [], "not told apart from": []}
    for row in rows:
        difference = row.differences[i]
        if difference is not None:
            level, side = (1 if difference.ratio else 0), better[difference.metric]
            found[standing(difference.interval, level, side)].append(score_name(row))
    total = sum(len(names) for names in found.values())
    parts = [f"{word} {baseline} in {_counted(names, total)}" for word, names in found.items() if names]
    return f"{runs[i].label} is {', '.join(parts)}" if parts else f"{runs[i].label} and {baseline} share no sample"


def _chance(runs: Sequence[RunResult], rows: Sequence[Row], i: int) -> str:
    known = [(row, row.chance, row.scores[i].interval) for row in rows]
    found = [(row, chance, one) for row, chance, one in known if chance is not None and one is not None]
    told = [(row, chance, one.low) for row, chance, one in found if one.low is not None]
    if not any(row.scores[i].samples for row in rows):
        return f"no sample fits {runs[i].label}"
    if not found:
        return f"{runs[i].label} has no score whose chance is known"
    if not told:
        return f"{runs[i].label} has too few samples to tell its scores from chance"
    names = [score_name(row) for row, chance, low in told if low > chance]
    return f"{runs[i].label} is above chance in {_counted(names, len(told))}"


def score_name(row: Row) -> str:
    at = f", {row.length:,} tokens" if row.length is not None and str(row.length) not in row.task else ""
    return f"{row.task} {row.scores[0].metric}{at}"


def _counted(names: Sequence[str], total: int) -> str:
    of = "the only score" if total == 1 and names else f"{len(names)} of {total} scores"
    return of + (f" ({listed(names)})" if 0 < len(names) <= min(MOST_NAMED, total - 1) else "")
