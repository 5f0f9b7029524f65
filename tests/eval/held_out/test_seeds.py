"""Several seeds: what is compared with what, and the arithmetic."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.held_out.analysis import pair
from eval.held_out.measurement import Measurement
from eval.held_out.report import summary_lines, write_report
from eval.held_out.seeds import compare_seeds
from eval.reporting.statistics import ratio_of_sums
from tests.eval.held_out.made_up import measurement, study

SCALES = {"softmax-seed-1": 1.0, "asentmax-seed-1": 0.9, "softmax-seed-2": 1.1, "asentmax-seed-2": 1.2}
SETTINGS = {
    label: {
        "seed_everything": label[-1],
        "data.seed": label[-1],
        "run_dir": f"runs/{label}",
        "model.network.attention.kind": label.split("-")[0],
    }
    for label in SCALES
}


def runs() -> list[Measurement]:
    """With losses that differ from document to document and run to run."""
    found = []
    for number, (label, scale) in enumerate(SCALES.items()):
        one = measurement(label, label.split("-")[0], scale)
        headline = one.perplexity.headline
        loss = [x * (1 + 0.05 * np.sin(7 * number + i)) for i, x in enumerate(headline.loss)]
        found.append(replace(one, perplexity=replace(one.perplexity, headline=replace(headline, loss=loss))))
    return found


def test_the_means_over_seeds_are_paired_over_documents() -> None:
    softmax_1, entmax_1, softmax_2, entmax_2 = measured = runs()
    (found,) = compare_seeds(measured, SETTINGS)
    losses = [np.array(one.perplexity.headline.loss) for one in measured]
    assert found.pair.bits_per_byte_ratio == ratio_of_sums((losses[1] + losses[3]) / 2, (losses[0] + losses[2]) / 2)
    each = [pair(entmax_1, softmax_1), pair(entmax_2, softmax_2)]
    assert found.ratios == [one.bits_per_byte_ratio.value for one in each] and found.seeds == ["1", "2"]
    assert (found.pair.label, found.pair.baseline) == ("asentmax", "softmax")
    per_token = 1.25 * ((0.9 + 1.2) / 2 - (1.0 + 1.1) / 2)  # of what measurement() makes of its scale
    assert found.pair.lengths[0].perplexity_ratio.value == pytest.approx(np.exp(per_token))


@pytest.mark.parametrize(
    ("change", "seeds"),
    [
        ({"softmax-seed-2": {"model.optimizer.lr": "0.1"}}, None),  # another configuration
        ({"softmax-seed-2": {"seed_everything": "3"}}, None),  # one seed in common
        ({"softmax-seed-2": {"seed_everything": "1"}}, None),  # the same seed twice
        ({"softmax-seed-2": {"init_from": "runs/first"}}, None),
        ({label: {"init_from": f"runs/first-{label[-1]}", "wandb.name": label} for label in SCALES}, ["1", "2"]),
    ],
)
def test_only_seeds_may_differ(change: dict[str, dict[str, str]], seeds: list[str] | None) -> None:
    settings = {label: own | change.get(label, {}) for label, own in SETTINGS.items()}
    assert [one.seeds for one in compare_seeds(runs(), settings)] == ([] if seeds is None else [seeds])


def test_other_steps_are_another_configuration() -> None:
    first, *others = runs()
    assert compare_seeds([replace(first, step=4), *others], SETTINGS) == []
    (found,) = compare_seeds(
        [replace(first, label="early", step=4), first, *others], SETTINGS | {"early": SETTINGS[first.label]}
    )
    assert found == compare_seeds([first, *others], SETTINGS)[0]


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("entmax-seed-10", "entmax-seed-11"), "entmax"),
        (("entmax-10", "entmax-11"), "entmax"),
        (("run-seed1", "run-seed12"), "run"),
        (("seed1-entmax", "seed2-entmax"), "entmax"),
        (("a150-1", "a150-2"), "a150"),
        (("a150-2e-3-1-32k", "a150-2e-3-2-32k"), "a150-2e-3-32k"),
        (("softmax-seed-1-stage2", "softmax-seed-2-stage2"), "softmax-stage2"),
        (("a_seed_1", "a-seed-2"), "mean of a_seed_1, a-seed-2"),
        (("1", "2"), "mean of 1, 2"),
        (("a-20261130-1", "a-20261129-2"), "mean of a-20261130-1, a-20261129-2"),
        (("softmax-seed-3", "softmax-seed-4"), "mean of softmax-seed-3, softmax-seed-4"),  # softmax is the other one's
        (("one", "other"), "mean of one, other"),
    ],
)
def test_what_is_compared_has_the_name_that_its_runs_share(labels: tuple[str, str], wanted: str) -> None:
    entmax = [replace(one, label=label) for one, label in zip(runs()[1::2], labels, strict=True)]
    settings = SETTINGS | {label: SETTINGS[one] for label, one in zip(labels, list(SCALES)[1::2], strict=True)}
    (found,) = compare_seeds([*runs()[::2], *entmax], settings)
    assert found.pair.label == wanted


def test_the_report_says_it(tmp_path: Path) -> None:
    made = study(measured := runs())
    made = replace(made, seeds=compare_seeds(measured, SETTINGS))
    page, _ = write_report(made, tmp_path)
    (line,) = [line for line in summary_lines(made, page) if "over 2 seeds" in line]
    assert line.startswith("asentmax: ") and "times softmax's bits per byte over 2 seeds (0." in line
    assert "## Over several seeds" in (text := (tmp_path / "report.md").read_text())
    assert "| asentmax / softmax | 1, 2 | " in text
