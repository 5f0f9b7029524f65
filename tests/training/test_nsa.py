"""Training with Native Sparse Attention, as a user starts it."""

import csv
import shutil
from pathlib import Path

from model.loading import load_model
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, corpus, logged, tiny_config, train

__all__ = ["corpus", "tiny_config", "train"]  # fixtures
NSA = ROOT / "configs" / "attention" / "nsa.yaml"
SIZES = dict(
    equal_parameters="false", compress_length=8, compress_stride=4, select_block=8, select_count=4, window=16
)  # of 64 tokens a sequence
OPTIONS = tuple(f"--model.network.attention.nsa.{name}={value}" for name, value in SIZES.items())
HELD_OUT = ROOT / "configs" / "eval" / "during_training.yaml"


def test_the_loss_falls_and_a_run_goes_on_where_it_stopped(train: TrainProcess, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = train("--run_dir", whole, *OPTIONS, configs=(NSA,))
    assert ended.returncode == 0, ended.stderr
    assert "(nsa) from step 0 to 20" in ended.stderr + ended.stdout
    losses = [loss for _, (loss, _) in sorted(logged(whole).items())]
    assert losses[-1] < losses[0] - 1 and len(losses) == 10
    network = load_model(whole).config
    assert network.attention.nsa is not None and network.attention.nsa.window == 16
    assert network.feed_forward_size == network.d_ff == 32
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000020")
    again = train("--run_dir", parts, "--resume", "auto", *OPTIONS, configs=(NSA,))
    assert again.returncode == 0 and "from step 15 to 20" in again.stderr + again.stdout, again.stderr
    assert_same_weights(whole, parts)


def test_evaluation_during_training_has_no_profile(train: TrainProcess, tmp_path: Path) -> None:
    quick = ("base_length=128", "lengths=[1,2]", "needle_digits=2", "every_n_steps=4")
    callback = tuple(f"--trainer.callbacks.init_args.{option}" for option in quick)
    steps = ("--trainer.max_steps", 4, "--checkpoint.every_n_steps", 4, "--stats.every_n_steps", 4)
    ended = train("--run_dir", tmp_path, *steps, *OPTIONS, *callback, configs=(NSA, HELD_OUT))
    assert ended.returncode == 0, ended.stderr
    columns = {name for path in tmp_path.glob("metrics/*/metrics.csv") for name in next(csv.reader(path.open()))}
    assert {"eval/perplexity_1x", "grad_norm/sparse"} <= columns
    assert not {name for name in columns if name.startswith(("eval/support", "eval/entropy", "support/"))}
