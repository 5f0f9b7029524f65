"""Exact match against real decoding and against a model with known answers; the command, its tables and mistakes."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import eval.length_generalisation.command
from data.length_generalisation import TASKS, TaskConfig, TaskName
from eval.common.scoring import Context, Runtime, score
from eval.length_generalisation.command import main
from eval.length_generalisation.measure import LengthConfig, LengthResult, length_of, measure
from eval.length_generalisation.report import PAPER, RunResult, group_runs
from eval.reporting.statistics import share
from model.checkpoint import checkpoint_folder, write_complete
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from tests.eval.conftest import failing_line
from tests.eval.reporting.pages import check_html

CPU = Runtime(torch.device("cpu"), None, 512)


def tiny(vocab_size: int, kind: str = "softmax", seed: int = 0, d_model: int = 16) -> ModelConfig:
    torch.manual_seed(seed)
    attention = AttentionConfig(kind=kind)  # type: ignore[arg-type]
    return ModelConfig(
        vocab_size=vocab_size, n_layers=2, d_model=d_model, n_heads=2, n_kv_heads=1, d_ff=24, init_std=0.3,
        tie_embeddings=False, attention=attention,
    )  # fmt: skip


class CopyOracle:
    """Knows what follows each token, but is wrong `place` tokens before the end of every `every`-th context."""

    def __init__(self, every: int, place: int) -> None:
        self.every, self.place, self.seen, self.longest_row = every, place, 0, 0

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        assert cu_seqlens is not None
        self.longest_row = max(self.longest_row, tokens.shape[1])
        task, answers = TASKS["copy"], torch.roll(tokens, -1)
        for stop in cu_seqlens.tolist()[1:]:
            answers[0, stop - 1] = task.eos
            if self.seen % self.every == 0:
                answers[0, stop - 1 - self.place] = task.bos
            self.seen += 1
        return answers[..., None].double()

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0].long(), TASKS["copy"].vocab_size).double()


@pytest.mark.parametrize("place", [0, 5])  # 0: <eos>, which belongs to the match
def test_one_wrong_token_spoils_its_sample_alone(place: int) -> None:
    oracle = CopyOracle(every=4, place=place)
    result = measure(oracle, TASKS["copy"], 12, 1.5, LengthConfig(samples=40), CPU, "oracle")
    assert (result.samples, result.exact, result.tokens, result.hits) == (40, 30, 40 * 13, 40 * 13 - 10)
    assert result.exact_match == share(0.75, 40) and result.token_accuracy == share(510 / 520, 40)
    assert oracle.longest_row <= CPU.row_tokens


def test_a_few_samples_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_once in (10**6, 100):
        monkeypatch.setattr(eval.length_generalisation.measure, "TOKENS_AT_ONCE", at_once)
        model = Transformer(tiny(8, "asentmax")).eval()
        result = measure(model, TASKS["flip_flop"], 64, 1, LengthConfig(samples=30), CPU, "x")
        results.append((result.exact, result.hits, result.tokens))
    assert results[0] == results[1] and results[0][2] == 60


def decode(model: Transformer, task: Any, source: np.ndarray, steps: int) -> list[int]:
    """Greedy decoding, one full forward pass a token."""
    tokens = [task.bos, *source.tolist(), task.sep]
    for _ in range(steps):
        hidden = model(torch.tensor([tokens]))
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    return tokens[-steps:]


@torch.no_grad()
def test_teacher_forcing_decides_what_greedy_decoding_gives() -> None:
    task = TASKS["flip_flop"]
    model = Transformer(tiny(task.vocab_size, "asentmax")).eval()
    outcomes = set()
    for index in range(40):
        source = task.sample(index, 1, 12).source
        decoded = decode(model, task, source, steps=3)
        for place in range(4):
            wanted = list(decoded)
            if place < 3:
                wanted[place] = (wanted[place] + 1) % task.vocab_size
            tokens = np.array([task.bos, *source, task.sep, *wanted])
            targets = np.concatenate([np.full(1 + len(source), -100), wanted])
            scored = score(model, [Context(tokens[:-1], targets)], CPU, "test")[0]
            assert bool(scored.hit.all()) == (wanted == decoded)
            outcomes.add(tuple(scored.hit.tolist()))
    assert len(outcomes) > 3


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(name, kind, seed=0, task="flip_flop"): a run folder of a tiny model with one complete checkpoint."""

    def make(
        name: str, kind: str, seed: int = 0, task: TaskName = "flip_flop", fingerprint: str = "", d_model: int = 16
    ) -> Path:
        config, run = tiny(TASKS[task].vocab_size, kind, seed, d_model), tmp_path / name
        weights = {f"weight/{key}": value for key, value in Transformer(config).state_dict().items()}
        folder = checkpoint_folder(run, 5)
        folder.mkdir(parents=True)
        save_file(weights, folder / "state-00000.safetensors")
        tokenizer = {"path": f"task:{task}", "fingerprint": fingerprint or TASKS[task].fingerprint}
        meta = {"step": 5, "samples": 20, "tokens": 20 * 66, "model": asdict(config), "tokenizer": tokenizer}
        write_complete(folder, {**meta, "sequence_length": 66, "code_version": "abc", "created": "2026-01-01"})
        data = {"task": asdict(TaskConfig(task)), "seed": seed}
        (run / "config.yaml").write_text(yaml.safe_dump({"data": data, "trainer": {"max_steps": 9}}))
        return run

    return make


def test_seeds_are_grouped_and_results_are_reused(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(f"{kind}-{seed}", kind, seed)) for kind in ("asentmax", "softmax") for seed in (0, 1)]
    runs.append(str(make_run("copied", "softmax", task="copy")))
    out = tmp_path / "out"
    options = ["--output", str(out), "--device", "cpu", "--samples", "20"]
    assert main([*runs, *options, "--lengths", "0.5", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[0].startswith("flip_flop: asentmax, 2 layers, 2 runs: 0.5x ")
    assert printed[-1] == f"tables: {out / 'report.html'}"
    assert "flip_flop: " in check_html((out / "report.html").read_text()).texts["section"][0]
    report = json.loads((out / "length_generalisation.json").read_text())
    assert [group["runs"] for group in report["groups"]] == [
        ["asentmax-0", "asentmax-1"], ["softmax-0", "softmax-1"], ["copied"],
    ]  # fmt: skip
    assert report["groups"][2]["paper_percent"]["64"] == 85.5
    page = (out / "length_generalisation.md").read_text()
    assert "| softmax, paper | " in page and "| asentmax, paper | " in page and "85.5 %" in page
    assert "5 of 9" in page and "python -m eval.length_generalisation" in page
    assert (out / "length_generalisation.png").stat().st_size > 10_000
    rows = list(csv.DictReader((out / "length_generalisation.csv").open()))
    assert len(rows) == 10 and {row["length"] for row in rows} == {"32", "64"}
    exact = [int(one["exact"]) for run in report["runs"] for one in run["lengths"]]
    assert [round(float(row["exact_match"]) * 20) for row in rows] == exact

    measured: list[int] = []

    def record(model: Any, task: Any, length: int, *rest: Any) -> LengthResult:
        measured.append(length)
        return measure(model, task, length, *rest)

    monkeypatch.setattr(eval.length_generalisation.command, "measure", record)
    assert main([*runs, *options, "--lengths", "0.5", "1"]) == 0 and measured == []
    again = json.loads((out / "length_generalisation.json").read_text())
    assert again["runs"] == report["runs"]
    assert main([*runs, *options, "--lengths", "1", "2"]) == 0 and measured == [128] * 5
    tracked = ["--lengths", "1", "--seed", "1", "--wandb.mode", "offline"]
    assert main([runs[0], *options, *tracked]) == 0 and measured[5:] == [64]
    (path,) = (out / "wandb").glob("offline-run-*/files/media/table/exact_match_*.table.json")
    table = json.loads(path.read_text())
    (row,) = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert (row["run"], row["length"], row["samples"]) == ("asentmax-0", 64, 20)


def test_another_architecture_is_another_group(make_run: MakeRun) -> None:
    result = LengthResult(64, 1, 10, 5, 5, 10, "cpu", "today", 1.0)
    models = {name: asdict(tiny(8, "entmax", d_model=width)) for name, width in {"a": 16, "b": 16, "c": 32}.items()}
    models["b"]["attention"]["backend"] = "torch"  # how to compute, not what
    runs = [
        RunResult(name, name, 5, 9, 0, TaskConfig("sort"), model, "float32", "abc", [result])
        for name, model in models.items()
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["entmax, 2 layers (a, b), 2 runs", "entmax, 2 layers (c)"]
    assert groups[0].exact_match()[0][1].low == 0.5 and groups[1].exact_match()[0][1] == share(0.5, 10)


def test_the_papers_figures_start_at_all_right_and_fall() -> None:
    for task, kinds in PAPER.items():
        assert task in TASKS and set(kinds) == {"softmax", "asentmax"}
        for values in kinds.values():
            assert list(values) == sorted(values) and values[1] == 100
            assert list(values.values()) == sorted(values.values(), reverse=True)


def test_lengths_are_multiples_of_the_longest_training_length() -> None:
    assert length_of(TaskConfig("reverse", 32, 64), 1.5) == 96
    with pytest.raises(ValueError, match="lengths has 1.3, which is 83.2 symbols for reverse, trained up to 64"):
        length_of(TaskConfig("reverse", 32, 64), 1.3)
    with pytest.raises(ValueError, match="whole lengths from 30 to 16777216"):
        length_of(TaskConfig("mqmtar", 32, 64), 0.25)
    with pytest.raises(ValueError, match=r"lengths has 1e\+09, which is 6.4e\+10 symbols .* to 16777216"):
        length_of(TaskConfig("reverse", 32, 64), 1e9)


def test_mistakes_are_one_line(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run", "softmax")
    for options, message in {
        ("--lengths", "2", "1"): "lengths is [2.0, 1.0]: expected different multiples in rising order",
        ("--lengths", "1.01"): "lengths has 1.01",
        ("--samples", "0"): "samples is 0: expected at least 1",
        ("--device", "tpu"): "device is 'tpu'",
        ("--sampels", "3"): "--sampels",
    }.items():
        assert message in failing_line(capsys, main, run, "--output", tmp_path / "out", *options)
    assert "no such folder" in failing_line(capsys, main, tmp_path / "absent")
    stale = make_run("stale", "softmax", fingerprint="0" * 64)
    assert "was trained on task flip_flop as of 000000000000" in failing_line(capsys, main, stale)
    (run / "config.yaml").write_text("data: {sources: [{path: x}], task: {name: null}}")
    assert "was not trained on a task of configs/length_generalisation" in failing_line(capsys, main, run)
    (run / "config.yaml").unlink()
    assert "does not lie in its run folder" in failing_line(capsys, main, run)
