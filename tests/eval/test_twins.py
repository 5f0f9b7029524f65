"""Training twins: what each is trained with, the choice of learning rates, and going on where it stopped."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.twins import DIVERGED, INTERRUPTED, Stopped, TwinsConfig, main, split, train_twins
from tests.training.conftest import TINY, make_corpus


class FakeTraining:
    """Writes the validation loss that a table gives for a kind and learning rate."""

    def __init__(self, losses: dict[tuple[str, float], float | int]) -> None:
        self.losses, self.calls = losses, []  # type: ignore[var-annotated]

    def __call__(self, options: Sequence[str]) -> int:
        values = dict(zip(options, options[1:], strict=False))
        run, lr = Path(values["--run_dir"]), float(values.get("--model.optimizer.lr", 0))
        kind = Path(values["--config"]).stem
        self.calls.append((run.name, kind, lr, values["--seed_everything"], values["--data.seed"]))
        loss = self.losses.get((kind, lr), 1.5)
        if loss in (DIVERGED, INTERRUPTED, 1):
            if loss == INTERRUPTED:
                raise Stopped
            return int(loss)
        folder = run / "metrics" / "step-00000000"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.csv").open("w") as file:
            csv.writer(file).writerows([("step", "val/loss"), (values.get("--trainer.max_steps", 9), loss)])
        return 0


LOSSES = {("softmax", 0.1): 2.5, ("softmax", 0.2): 2.25, ("softmax", 0.4): DIVERGED} | {
    ("entmax", 0.1): 2.125, ("entmax", 0.2): 2.5, ("entmax", 0.4): float("nan"),
}  # fmt: skip
CONFIG = TwinsConfig(kinds=["softmax", "entmax"], lrs=[0.1, 0.2, 0.4], sweep_steps=7, seeds=[3, 4])


def test_each_kind_gets_its_best_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = FakeTraining(LOSSES)
    runs = train_twins(CONFIG, ["--model.compile", "true"], tmp_path, train)
    assert [run.name for run in runs] == ["softmax-seed-3", "entmax-seed-3", "softmax-seed-4", "entmax-seed-4"]
    assert [call[:4] for call in train.calls[6:]] == [
        ("softmax-seed-3", "softmax", 0.2, "3"), ("entmax-seed-3", "entmax", 0.1, "3"),
        ("softmax-seed-4", "softmax", 0.2, "4"), ("entmax-seed-4", "entmax", 0.1, "4"),
    ]  # fmt: skip
    assert all(seed == data_seed for *_, seed, data_seed in train.calls)
    record = json.loads((tmp_path / "twins.json").read_text())
    assert record["sweep"]["softmax"] == {"0.1": 2.5, "0.2": 2.25, "0.4": None}
    assert record["sweep"]["entmax"] == {"0.1": 2.125, "0.2": 2.5, "0.4": None}
    said = capsys.readouterr().out
    assert "entmax: the best learning rate 0.1 is at the end of those tried" in said and "softmax: the best" not in said


def test_goes_on_with_what_was_chosen(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_twins(CONFIG, [], tmp_path, FakeTraining({**LOSSES, ("entmax", 0.2): INTERRUPTED}))
    again = FakeTraining(LOSSES)
    train_twins(CONFIG, [], tmp_path, again)
    assert [call[0] for call in again.calls[:3]] == ["entmax-lr-0.1", "entmax-lr-0.2", "entmax-lr-0.4"]
    once_more = FakeTraining({})
    train_twins(CONFIG, [], tmp_path, once_more)
    assert [call[2] for call in once_more.calls] == [0.2, 0.1, 0.2, 0.1]  # train.py finds nothing left to train
    with pytest.raises(ValueError, match="twins.json was made with options .* choose another --output"):
        train_twins(CONFIG, ["--model.compile", "true"], tmp_path, once_more)


def test_one_learning_rate_needs_no_sweep(tmp_path: Path) -> None:
    train = FakeTraining({})
    train_twins(TwinsConfig(kinds=["ssmax"], lrs=[0.5]), [], tmp_path / "a", train)
    train_twins(TwinsConfig(kinds=["ssmax"]), [], tmp_path / "b", train)
    assert [call[2] for call in train.calls] == [0.5, 0.0]


def test_failures_are_named(tmp_path: Path) -> None:
    everywhere = {("softmax", lr): DIVERGED for lr in CONFIG.lrs}
    with pytest.raises(ValueError, match="softmax diverged at every learning rate"):
        train_twins(CONFIG, [], tmp_path / "a", FakeTraining(everywhere))
    with pytest.raises(ValueError, match="entmax-lr-0.2 ended with exit code 1"):
        train_twins(CONFIG, [], tmp_path / "b", FakeTraining({**LOSSES, ("entmax", 0.2): 1}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kinds": ["linear"]}, "kinds is"), ({"kinds": []}, "kinds is"), ({"lrs": [0.0]}, "lrs is"),
     ({"lrs": [0.1, 0.2]}, "sweep_steps is 0"), ({"seeds": [1, 1]}, "seeds is")],
)  # fmt: skip
def test_bad_settings_name_the_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwinsConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--kinds", "softmax"], "there is no --"), (["--", "--run_dir", "x"], "--run_dir stands behind --"),
     (["--", "--data.seed=3"], "--data.seed stands behind --")],
)  # fmt: skip
def test_what_stands_behind_the_dashes(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(arguments)


def test_from_text_to_report(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    corpus = make_corpus(tmp_path, seed=0)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("CORPUS", str(corpus)))
    output = tmp_path / "twins"
    command = [
        "--kinds",
        "softmax",
        "asentmax",
        "--data",
        str(corpus),
        "--output",
        str(output),
        "--eval.lengths",
        "[1]",
    ]
    command += ["--eval.max_documents", "2", "--eval.needle_digits", "2", "--eval.base_length", "128"]
    command += ["--", "--config", str(tmp_path / "tiny.yaml"), "--trainer.max_steps", "3"]
    assert main(command) == 0
    said = capfd.readouterr()
    assert "asentmax-seed-0" in said.out
    assert "python -m eval.twins --kinds softmax asentmax" in (output / "report" / "report.html").read_text()
    assert main(["--wandb.mode", "offline", *command]) == 0
    assert capfd.readouterr().err.count("nothing to train") == 2
    (tracked,) = (output / "report" / "wandb").glob("offline-run-*")
    assert list(tracked.rglob("perplexity_over_length_*.table.json"))
