"""What a report says first, and what it leaves out or folds."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from eval.held_out.analysis import pair, summarise
from eval.held_out.needle import NeedleCell
from eval.held_out.needle_report import needle_blocks
from eval.held_out.settings_report import run_blocks
from eval.held_out.verdict import above_chance, needle_verdict, verdict
from eval.reporting.document import Details, Table
from eval.reporting.statistics import Interval
from eval.reporting.verdict import above, listed, standing
from model.config import TRAINED_SPARSE, AttentionKind, config_from_dict
from model.transformer import Transformer
from tests.eval.held_out.made_up import CONFIG, PLAN, TWINS, measurement

SPARSE, DENSE = TWINS


def finding(hits: int, of: str = "sparse"):
    """A run with six samples of four tokens at each length, of which so many are right at 2x, and none at chance."""
    cells = [NeedleCell(1, 0.5, [0] * 6, [4] * 6), NeedleCell(2, 0.5, [hits] * 6, [4] * 6)]
    chance = NeedleCell(1, None, [0] * 6, [4] * 6)
    return replace(measurement(of, "asentmax", 1.0), needles=[*cells, chance], multi_needles=[])


def test_words_follow_the_interval() -> None:
    assert standing(Interval(0.9, 0.8, 0.95), 1, "low") == "ahead of"
    assert standing(Interval(0.9, 0.8, 0.95), 1, "high") == "behind"
    assert standing(Interval(0.1, 0.05, 0.2), 0, "high") == "ahead of"
    assert standing(Interval(0.9, 0.8, 1.0), 1, "low") == "level with"
    assert standing(Interval(0.9, None, None), 1, "low") == "not told apart from"
    assert above(Interval(0.5, 0.4, 0.6), Interval(0.2, 0.1, 0.3))
    assert not above(Interval(0.5, 0.3, 0.6), Interval(0.2, 0.1, 0.3))
    assert not above(Interval(0.5, None, None), Interval(0.2, 0.1, 0.3))
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_the_verdict_names_who_is_ahead() -> None:
    runs, pairs = [summarise(one) for one in TWINS], [pair(SPARSE, DENSE)]
    said = verdict(runs, pairs)
    assert said.startswith("sparse is ahead of dense in bits per byte of held-out text (0.800 [")
    assert "and ahead of it in perplexity at 16 tokens, 2x (" in said and said.endswith(".")
    turned = verdict([summarise(DENSE), summarise(SPARSE)], [pair(DENSE, SPARSE)])
    assert turned.startswith("dense is behind sparse in bits per byte of held-out text (1.250 [")
    assert "1.39 in contexts" not in said
    alone = verdict(runs[:1], [])
    assert alone.startswith("sparse has 0.721 [") and "in contexts of 8 tokens" in alone


def test_needles_above_chance_are_shown_and_others_folded(tmp_path: Path) -> None:
    none, found = summarise(finding(0)), summarise(finding(4))
    assert above_chance(none) == [] and above_chance(found) == [2]
    assert needle_verdict([none]) == "no run finds needles above chance"
    assert needle_verdict([none, found]) == "needles are found above chance by sparse up to 2x the training length"
    assert needle_verdict([summarise(SPARSE)]).startswith("too few samples to say")
    missing = replace(finding(0), needles=[])
    assert needle_verdict([summarise(missing)]) == "needles were not measured"
    folded = needle_blocks([none], CONFIG, 8, tmp_path)
    assert not any(isinstance(block, Table) for block in folded)
    assert any(isinstance(block, Details) and any(isinstance(one, Table) for one in block.blocks) for block in folded)
    assert sum(isinstance(block, Table) for block in needle_blocks([none, found], CONFIG, 8, tmp_path)) == 2
    assert len(needle_blocks([summarise(missing)], CONFIG, 8, tmp_path)) == 2 and PLAN.multiples == [1, 2]


def test_only_settings_that_a_run_has_are_shown() -> None:
    alpha, rate = "model.network.attention.alpha", "model.optimizer.lr"
    source = "[{'path': 'prepared/x', 'weight': 1.0}, {'path': 'prepared/y', 'weight': 1.0}]"
    settings = {
        "sparse": {alpha: "1.25", rate: "0.001", "data.sources": source},
        "dense": {alpha: "1.5", rate: "0.002", "data.sources": source},
    }
    tables = [block for block in run_blocks(TWINS, settings) if isinstance(block, Table)]
    rows = {row[0]: row[1:] for row in tables[0].rows}
    assert rows["alpha, at the start"] == ["1.25", "–"] and rows["learning rate, at its peak"] == ["0.001", "0.002"]
    assert rows["training data"] == ["prepared/x, prepared/y"] * 2 and "layers" not in rows
    assert tables[1].rows == [[alpha, "1.25", "–"], [rate, "0.001", "0.002"]]


@pytest.mark.parametrize("kind", TRAINED_SPARSE)
def test_sizes_of_a_kind_are_its_own(kind: str) -> None:
    prefix = "model.network.attention."
    own = {f"{prefix}{kind}.block": "64", f"{prefix}alpha": "1.5", f"{prefix}backend": "auto"}
    other = {f"{prefix}{kind}": "None", f"{prefix}alpha": "1.25", f"{prefix}backend": "torch"}
    runs = [replace(TWINS[0], label="own", model={"attention": {"kind": kind}}), replace(TWINS[1], label="other")]
    tables = [block for block in run_blocks(runs, {"own": own, "other": other}) if isinstance(block, Table)]
    rows = {row[0].removeprefix(prefix): row[1:] for row in tables[1].rows}
    assert rows[f"{kind}.block"] == ["64", "–"] and kind not in rows and rows["backend"] == ["–", "–"]
    assert rows["alpha"] == ["1.5" if kind == "hierarchical" else "–", "–"]


@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_settings_of_some_kinds_only_are_those_that_their_models_read(kind: str) -> None:
    """As the model's parameters tell; a temperature of hierarchical entmax is a choice."""
    prefix = "model.network.attention."
    names = {"alpha": "1.5", "temperature_bias": "0.5", "backend": "auto"}
    shared = {f"{prefix}{name}": value for name, value in names.items()} | {"model.optimizer.alpha_lr_factor": "1.0"}
    choices = [{}] if kind != "hierarchical" else [{kind: {"adaptive_temperature": one}} for one in (False, True)]
    for choice in choices:
        attention = {"kind": kind, **choice}
        run = replace(TWINS[0], label="own", model={"attention": attention})
        other = replace(TWINS[1], label="other")
        tables = [block for block in run_blocks([run, other], {"own": shared, "other": {}}) if isinstance(block, Table)]
        shown = {row[0].removeprefix(prefix) for row in tables[1].rows if row[1] != "–"}
        with torch.device("meta"):
            parameters = dict(Transformer(config_from_dict({"attention": attention})).named_parameters())
        assert ("alpha" in shown) == any(name.endswith(".alpha_raw") for name in parameters)
        assert ("alpha" in shown) == ("model.optimizer.alpha_lr_factor" in shown)
        assert ("temperature_bias" in shown) == any(name.endswith(".temperature.beta.bias") for name in parameters)
        assert ("backend" in shown) == (kind in ("entmax", "asentmax"))
