"""Evaluations in wandb: offline runs of the real client, read back from its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import eval.common.tracking
from common.wandb_config import WandbConfig
from eval.common.tracking import open_tracker
from eval.run import main
from tests.eval.conftest import MakeRun, tracked_tables

QUICK = ["--headline_tokens", "300", "--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2", "--profile_queries", "8", "--device", "cpu"]
SECRET = "tokenOfTheEnvironment"


@pytest.fixture
def runs(make_run: MakeRun, tmp_path: Path) -> dict[str, Path]:
    """A sparse and a dense run that were trained in project "mine"."""
    found = {}
    for kind in ("asentmax", "softmax"):
        found[kind] = make_run(tmp_path / kind, kind)
        with (found[kind] / "config.yaml").open("a") as file:
            file.write("wandb: {mode: offline, project: mine, entity: null}\n")
    return found


def test_tables_and_plots_of_an_evaluation(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    output, named = tmp_path / "report", tmp_path / f"{SECRET}.yaml"  # a part of the command line
    named.write_text("seed: 0\n")
    data = ["--data", str(corpus), "--output", str(output), "--config", str(named)]
    assert main([*map(str, runs.values()), *data, *QUICK, "--wandb.mode", "offline", "--wandb.tags", "[swept]"]) == 0
    assert "in project mine (offline)" in capsys.readouterr().err
    (folder,) = (output / "wandb").glob("offline-run-*")
    by_name = tracked_tables(output)
    assert set(by_name) == {
        "runs", "pairs", "perplexity_over_length", "perplexity_by_position", "needles", "attention",
    }  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    lengths = by_name["perplexity_over_length"]
    assert [(row["run"], row["multiple"]) for row in lengths] == [
        ("asentmax", 1), ("asentmax", 2), ("softmax", 1), ("softmax", 2),
    ]  # fmt: skip
    assert lengths[1]["perplexity"] == report["runs"][0]["lengths"][1]["perplexity"]["value"]
    heads = by_name["attention"]
    assert len(heads) == 2 * 2 * 2 * 2  # runs, lengths, layers, heads
    first = report["measurements"][0]["attention"][0]
    assert heads[1]["entropy"] == first["entropy"][1] and heads[-1]["alpha"] is None
    assert {row["kind"] for row in by_name["needles"]} >= {"single", "without needle"}
    pictures = {path.name.split("_")[0] for path in (folder / "files" / "media" / "images").rglob("*.png")}
    assert len(pictures) >= 5
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    stored = next(folder.glob("*.wandb")).read_bytes()
    assert b"mine" in stored and b"asentmax+softmax" in stored and b"[redacted]" in stored
    assert b"swept" in stored


def test_nothing_is_tracked_unless_asked_for(corpus: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    assert main([str(runs["softmax"]), "--data", str(corpus), "--output", str(tmp_path / "out"), *QUICK]) == 0
    assert not (tmp_path / "out" / "wandb").exists()


def test_project_entity_and_group_are_the_runs_unless_given(runs: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = {label: run / "checkpoints/step-00000007" for label, run in runs.items()}
    tracker = open_tracker(WandbConfig(), checkpoints, tmp_path / "report")
    assert (tracker.project, tracker.entity, tracker.name, tracker.group) == (
        "mine",
        None,
        "report",
        "asentmax+softmax",
    )
    with pytest.raises(ValueError, match="wandb.project is empty"):
        WandbConfig(project="")
    given = WandbConfig(project="p", entity="e", name="n", group="g")
    tracker = open_tracker(given, checkpoints, tmp_path)
    assert (tracker.project, tracker.entity, tracker.name, tracker.group) == ("p", "e", "n", "g")
    (runs["softmax"] / "config.yaml").write_text("wandb: {project: other}")
    with pytest.raises(ValueError, match="asentmax mine, softmax other.*say which with --wandb.project"):
        open_tracker(WandbConfig(mode="offline"), checkpoints, tmp_path)
    (runs["softmax"] / "config.yaml").unlink()
    assert open_tracker(WandbConfig(mode="offline"), checkpoints, tmp_path).project == "mine"


def test_what_wandb_refuses_is_one_line(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    output = tmp_path / "out"
    options = ["--data", str(corpus), "--output", str(output), *QUICK, "--wandb.mode", "online"]
    assert main([str(runs["softmax"]), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: the evaluation is in") and "no network" in lines[-1]
    assert (output / "report.html").exists()
    assert eval.common.tracking.provenance.command_line(["--token", "abcdefgh"]).endswith("--token [redacted]")
    assert yaml.safe_load((runs["softmax"] / "config.yaml").read_text())["wandb"]["project"] == "mine"
