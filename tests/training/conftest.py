"""A tiny corpus, and train.py started as a user starts it."""

import csv
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.prepare import main as prepare
from model.checkpoint import checkpoint_folder, read_complete
from model.loading import StoredTensors, load_model
from tests.training.step.emulation import emulate
from tests.training.warm import Ended, warm_interpreter

ROOT = Path(__file__).resolve().parents[2]
TINY = """
seed_everything: 0
model:
  network: {vocab_size: 384, n_layers: 2, d_model: 16, n_heads: 2, n_kv_heads: 1, d_ff: 32}
  optimizer: {lr: 1.0e-2, warmup_steps: 2}
data:
  sources: [{path: CORPUS}]
  sequence_length: 64
  global_batch_size: 4
  micro_batch_size: 2
  num_workers: 0
  val_sequences: 4
  verify: size
trainer: {accelerator: cpu, max_steps: 20, log_every_n_steps: 2, gradient_clip_val: 1.0}
checkpoint: {every_n_steps: 5}
stats: {every_n_steps: 10}
"""
TrainProcess = Callable[..., Ended]


def make_corpus(folder: Path, seed: int) -> Path:
    """Prepare some ten thousand tokens of random words."""
    generator = random.Random(seed)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    words = ["".join(generator.choices("abcdefg", k=generator.randint(1, 6))) for _ in range(60)]
    for number in range(40):
        (texts / f"{number}.txt").write_text(" ".join(generator.choices(words, k=generator.randint(20, 400))))
    options = [
        "--corpus=data.corpora.TextFiles",
        f"--corpus.paths=[{texts}]",
        f"--output={folder / 'prepared'}",
    ]
    prepare([*options, "--tokenizer.vocab_size=384", "--heldout_fraction=0.2", "--workers=1"])
    return folder / "prepared"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), seed=0)


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with another tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def tiny_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY.replace("CORPUS", str(corpus)))
    return path


@pytest.fixture
def emulated_float8() -> Iterator[None]:
    emulate()
    yield
    emulate(False)


def child_environment() -> dict[str, str]:
    # without the wandb process of a test in this one
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """The newest checkpoints of two runs hold the same weights, bit by bit."""
    left, right = (load_model(run).model.state_dict() for run in (ours, theirs))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def command(*options: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, options)]


@pytest.fixture(scope="session")
def train(tiny_config: Path) -> TrainProcess:
    """Run train.py with the tiny config in a process of its own: train("--run_dir", path, ...)."""

    def run(*options: object, configs: tuple[object, ...] = (), quick: bool = False) -> Ended:
        more = [part for config in configs for part in ("--config", config)]
        return run_train("--config", tiny_config, *more, *options, quick=quick)

    return run


@pytest.fixture(scope="session")
def undisturbed(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps, to compare with; tests copy what they change."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train("--run_dir", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def run_train(*options: object, quick: bool = False, **environment: str) -> Ended:
    """Run train.py from the repository's root in a process of its own, with more environment variables; quick: as in
    WarmInterpreter."""
    interpreter = warm_interpreter("train", "training.cli", quick=quick)
    ended = interpreter.run(command(*options)[1:], child_environment() | environment, timeout=200)
    assert not ended.left, f"{ended.left} processes that {ended.args} has started do not end: {ended.stderr}"
    return ended


def callbacks(*named: tuple[str, dict[str, object]]) -> str:
    """The option that adds callbacks of faults/callbacks.py: name and arguments of each."""
    listed = [
        {"class_path": f"tests.training.faults.callbacks.{name}", "init_args": arguments} for name, arguments in named
    ]
    return "--trainer.callbacks=" + json.dumps(listed)


def logged(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Training loss and gradient norm by step, over all sessions of a run."""
    found = {}
    for path in sorted(run_dir.glob("metrics/*/metrics.csv")):
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        found |= {int(row["step"]): (float(row["train/loss"]), float(row["train/grad_norm"])) for row in rows}
    return found


def stored_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key."""
    return dict(StoredTensors(read_complete(checkpoint_folder(run_dir, step))))
