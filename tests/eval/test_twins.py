"""Training twins: what each is trained with, the choice of learning rates, and going on where it stopped."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import eval.common.training
import eval.twins
from common.errors import UsageError
from common.exits import DIVERGED, INTERRUPTED
from eval.common.training import Stopped, run_training
from eval.twins import TwinsConfig, TwinsEvalConfig, check_before_training, main, split, train_on, train_twins
from model.config import ModelConfig
from tests.training.conftest import TINY, make_corpus, run_train


class FakeTraining:
    """Writes the validation loss that a table gives for a kind and learning rate."""

    def __init__(self, losses: dict[tuple[str, float], float | int]) -> None:
        self.losses, self.calls = losses, []  # type: ignore[var-annotated]
        self.lengths: list[tuple[str | None, str | None]] = []

    def __call__(self, options: Sequence[str]) -> int:
        values = dict(zip(options, options[1:], strict=False))
        run, lr = Path(values["--run_dir"]), float(values.get("--model.optimizer.lr", 0))
        kind = Path(values["--config"]).stem
        self.calls.append((run.name, kind, lr, values["--seed_everything"], values["--data.seed"]))
        self.lengths.append((values.get("--trainer.max_steps"), values.get("--trainer.max_tokens")))
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
    assert train.lengths == [("7", "null")] * 6 + [(None, None)] * 4  # a trial's is in steps, whatever the runs' is
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
     (["--", "--data.seed=3"], "--data.seed stands behind --"),
     (["--", "--a", "--", "--model.network.attention.kind=dsa"], "--model.network.attention.kind stands behind --"),
     (["--", "--model.optimizer.lr", "1"], "--model.optimizer.lr stands behind --"),
     (["--", "--a", "--", "--init_from", "x"], "--init_from stands behind --"),
     (["--", "--a", "--", "--config", "configs/attention/nsa.yaml"], "configs/attention/nsa.yaml stands behind"),
     (["--", "--a", "--"], "nothing stands behind -- number 2: give the options of that stage"),
     (["--", "--", "--a", "--", "--b"], "")],
)  # fmt: skip
def test_what_stands_behind_the_dashes(arguments: list[str], message: str) -> None:
    if not message:
        assert split(["--kinds", "softmax", *arguments]) == (["--kinds", "softmax"], [[], ["--a"], ["--b"]])
        return
    with pytest.raises(ValueError, match=message):
        split(arguments)


def test_later_stages_go_on_from_each_twin(tmp_path: Path) -> None:
    given: list[dict[str, str]] = []

    def train(options: Sequence[str]) -> int:
        given.append(dict(zip(options, options[1:], strict=False)))
        return 0

    options = ["--model.optimizer.lr", "0.3"]
    train_twins(CONFIG, [], tmp_path, FakeTraining(LOSSES))
    runs = train_on(2, CONFIG, options, tmp_path, train)
    third = train_on(3, CONFIG, [*options, "--x"], tmp_path, train)
    assert json.loads((tmp_path / "twins.json").read_text())["later"] == [options, [*options, "--x"]]
    names = ["softmax-seed-3", "entmax-seed-3", "softmax-seed-4", "entmax-seed-4"]
    assert [run.name for run in runs] == [f"{name}-stage2" for name in names]
    assert [Path(one["--init_from"]).name for one in given[:4]] == names
    assert [Path(one["--init_from"]) for one in given[4:]] == runs and third[0].name == "softmax-seed-3-stage3"
    assert [Path(one["--config"]).stem for one in given[:4]] == ["softmax", "entmax"] * 2
    assert [one["--seed_everything"] for one in given[:4]] == ["3", "3", "4", "4"]
    assert {one["--model.optimizer.lr"] for one in given} == {"0.3"} and {one["--resume"] for one in given} == {"auto"}


def test_help_needs_no_options_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    assert "usage: python -m eval.twins" in said.out and "What follows -- are train.py's options" in said.out
    assert said.err == ""


STUB = """
import os, pathlib, signal, sys, time
if "--print_config" in sys.argv:
    print(pathlib.Path(__file__).with_name("config.yaml").read_text())
    sys.exit(0)
code, folder = int(sys.argv[1]), pathlib.Path(__file__).parent
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1) or code and sys.exit(code))
(folder / "ready").touch()
while not told:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [(75, 75, "everything saved"), (0, 75, "everything saved"), (130, 75, "what was saved before"), (2, None, "")],
)
def test_a_signal_waits_for_the_save_of_training(
    code: int, exit_code: int | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text(STUB)
    monkeypatch.setattr(eval.common.training, "ROOT", tmp_path)

    def tell() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    if exit_code is None:  # an error of the user's stays one
        assert run_training([str(code)]) == code
        return
    with pytest.raises(Stopped, match=said) as stopped:
        run_training([str(code)])
    assert stopped.value.code == exit_code


FAILING = """
import pathlib, sys
if "--print_config" in sys.argv and KNOWN != "--print_config":
    print(pathlib.Path(__file__).with_name("config.yaml").read_text())
    sys.exit(0)
print("error: lr is nan", file=sys.stderr)
sys.exit(2)
"""


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=0)


@pytest.mark.parametrize(
    ("own", "data", "message"),
    [
        (["--data", "none"], {}, "none/heldout/../manifest.json does not exist|none/manifest.json does not exist"),
        (["--eval.base_length", "100000"], {}, "the longest document has"),
        (["--eval.device", "tpu"], {}, "device is 'tpu'"),
        (["--eval.thresholds", "none", "--eval.keep_blocks", "1"], {}, "none does not exist; make it first"),
        (["--lrs", "1", "2", "--sweep_steps", "3"], {"val_sequences": 0}, "data.val_sequences is 0"),
        ([], {"sources": []}, "data.sources is empty"),
        ([], {"sources": [{"path": "nowhere"}]}, "nowhere/manifest.json does not exist"),
        ([], {"sequence_length": 4}, "set a larger --eval.base_length or fewer --eval.needle_digits"),
        (["--output", "/proc/none"], {}, "--output /proc/none cannot be written"),
    ],
)
def test_what_can_be_known_is_known_before_training(
    own: list[str], data: dict[str, Any], message: str, small_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = {"sources": [{"path": str(small_corpus)}], "sequence_length": 128, "val_sequences": 4} | data
    (tmp_path / "train.py").write_text(STUB)
    (tmp_path / "config.yaml").write_text(json.dumps({"data": settings}))
    monkeypatch.setattr(eval.common.training, "ROOT", tmp_path)
    monkeypatch.setattr(eval.twins, "run_training", lambda options: pytest.fail("trained"))
    given = ["--data", str(small_corpus), "--output", str(tmp_path / "twins"), "--eval.lengths", "[1]"]
    assert main([*given, "--eval.max_documents", "2", "--eval.needle_digits", "2", *own, "--"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line and re.search(message, line), line


def test_training_is_asked_once_for_the_settings_of_a_stage(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def settings_of(options: Sequence[str]) -> dict[str, Any]:
        values = dict(zip(options, options[1:], strict=False))
        asked.append((Path(values["--run_dir"]).name, values.get("--model.optimizer.lr")))
        data = {"sources": [{"path": str(small_corpus)}], "sequence_length": 128}
        return {"data": data, "model": {"network": asdict(ModelConfig())}}

    monkeypatch.setattr(eval.twins, "settings_of", settings_of)
    measured = TwinsEvalConfig(lengths=[1], max_documents=2, needle_digits=2)
    check_before_training(TwinsConfig(lrs=[0.5]), [[], ["--x"]], tmp_path, small_corpus, measured)
    twins = [
        (f"{kind}-seed-0{stage}", lr) for kind in TwinsConfig().kinds for stage, lr in (("", "0.5"), ("-stage2", None))
    ]
    assert asked == twins


def test_each_kind_must_fit_each_stage(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_of(options: Sequence[str]) -> dict[str, Any]:
        dense = not any("nsa" in option for option in options)
        network = asdict(ModelConfig(window=7 if dense and "--x" in options else None))
        network["qk_norm"] = not dense and "--x" in options
        return {"data": {}, "model": {"network": network}}

    monkeypatch.setattr(eval.twins, "settings_of", settings_of)
    with pytest.raises(UsageError, match="model.network.qk_norm is True behind -- number 2"):
        check_before_training(
            TwinsConfig(kinds=["softmax", "nsa"]), [[], ["--x"]], tmp_path, small_corpus, TwinsEvalConfig()
        )


def test_a_stage_must_fit_the_weights_of_the_one_before() -> None:
    network = asdict(ModelConfig(positions="rope"))
    check = eval.twins._check_networks
    check([network, network | {"rope_base": 1e6, "window": 7}])
    with pytest.raises(UsageError, match="model.network.qk_norm is True behind -- number 3, but False in the stage"):
        check([network, network, network | {"qk_norm": True}])


@pytest.mark.parametrize("known", ["--print_config", "--seed_everything"])
def test_an_error_line_of_training_is_the_only_one(
    known: str, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """known: when train.py finds the mistake: as it prints its options, or as it starts."""
    data = {"sources": [{"path": str(small_corpus)}], "sequence_length": 128, "val_sequences": 4}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    (tmp_path / "train.py").write_text(FAILING.replace("KNOWN", repr(known)))
    monkeypatch.setattr(eval.common.training, "ROOT", tmp_path)
    given = ["--data", str(small_corpus), "--output", str(tmp_path / "twins"), "--eval.lengths", "[1]"]
    assert main([*given, "--eval.max_documents", "2", "--eval.needle_digits", "2", "--", "--lr", "nan"]) == 2
    assert capfd.readouterr().err.strip().removeprefix("error: train.py: ").removeprefix("error: ") == "lr is nan"


@pytest.mark.parametrize("content", ["{", "[]", '{"twins": {}}', '{"twins": 1, "options": [], "lr": {}, "sweep": {}}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "twins.json").write_text(content)
    with pytest.raises(ValueError, match="twins.json .*; choose another --output"):
        train_twins(CONFIG, [], tmp_path, FakeTraining({}))


def test_one_command_at_a_time(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = "import sys; from pathlib import Path; from common.locks import folder_lock\n"
    holder += "with folder_lock(Path(sys.argv[1]), ''): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline()
        assert main(["--data", str(small_corpus), "--output", str(tmp_path), "--"]) == 2
        other.communicate(b"\n")
    assert "is in use by another eval.twins" in capsys.readouterr().err


def test_from_text_to_report(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    corpus = make_corpus(tmp_path, seed=0)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("CORPUS", str(corpus)))
    output = tmp_path / "twins"
    trained: list[str] = []

    def train(options: Sequence[str]) -> int:
        done = run_train(*options)
        trained.append(done.stderr)
        return done.returncode

    monkeypatch.setattr(eval.twins, "run_training", train)
    monkeypatch.setattr(eval.common.training, "ask_training", lambda options: run_train(*options))
    command = ["--kinds", "softmax", "asentmax", "--data", str(corpus), "--output", str(output)]
    command += ["--eval.lengths", "[1]", "--eval.max_documents", "2", "--eval.needle_digits", "2"]
    command += ["--eval.base_length", "128", "--", "--config", str(tmp_path / "tiny.yaml"), "--trainer.max_steps", "3"]
    assert main(command) == 0, capfd.readouterr().err
    assert "asentmax-seed-0" in capfd.readouterr().out and len(trained) == 2
    assert "python -m eval.twins --kinds softmax asentmax" in (output / "report" / "report.html").read_text()
    # the same with a further stage: what is trained stays
    command += [
        "--",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--data.sequence_length",
        "128",
        "--trainer.max_steps",
        "2",
    ]
    assert main(["--wandb.mode", "offline", *command]) == 0
    assert ["nothing to train" in said for said in trained] == [False, False, True, True, False, False]
    assert all(f"starting from the weights of {output}/" in said for said in trained[4:])
    assert "Trained at 128 tokens" in (output / "report-stage2" / "report.md").read_text()
    assert "asentmax-seed-0-stage2" in capfd.readouterr().out
    for other, message in (
        (["--trainer.max_steps", "5"], "twins.json: behind -- number 2 stood ["),
        (
            ["--", *command[-6:], "--model.network.d_model", "32"],
            "model.network.d_model is 32 behind -- number 3, but 16",
        ),
    ):
        assert main([*command, *other]) == 2
        assert message in capfd.readouterr().err and len(trained) == 6
    (tracked,) = (output / "report" / "wandb").glob("offline-run-*")
    assert list(tracked.rglob("perplexity_over_length_*.table.json"))
