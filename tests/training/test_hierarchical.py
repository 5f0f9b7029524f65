"""Training with hierarchical entmax, as a user starts it."""

import csv
import shutil
from pathlib import Path

import torch

from model.config import HierarchicalConfig
from model.loading import load_model
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, corpus, logged, tiny_config, train

__all__ = ["corpus", "tiny_config", "train"]  # fixtures
HIERARCHICAL = ROOT / "configs" / "attention" / "hierarchical.yaml"
SIZES = ("--model.network.attention.hierarchical.block=8",)  # of 64 tokens a sequence
HELD_OUT = ROOT / "configs" / "eval" / "during_training.yaml"


def columns_of(run: Path) -> set[str]:
    return {name for path in run.glob("metrics/*/metrics.csv") for name in next(csv.reader(path.open()))}


def test_the_loss_falls_and_a_run_goes_on_where_it_stopped(train: TrainProcess, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = train("--run_dir", whole, *SIZES, configs=(HIERARCHICAL,))
    assert ended.returncode == 0, ended.stderr
    assert "(hierarchical) from step 0 to 20" in ended.stderr + ended.stdout
    losses = [loss for _, (loss, _) in sorted(logged(whole).items())]
    assert losses[-1] < losses[0] - 1 and len(losses) == 10
    trained = load_model(whole)
    assert trained.config.attention.hierarchical == HierarchicalConfig(block=8)
    alphas = trained.model.alphas()
    assert alphas is not None and not torch.equal(alphas, torch.full_like(alphas, 1.5))  # they learn
    shutil.copytree(whole, parts)
    for folder in parts.glob("checkpoints/step-*"):
        if folder.name > "step-00000010":
            shutil.rmtree(folder)
    again = train("--run_dir", parts, "--resume", "auto", *SIZES, configs=(HIERARCHICAL,))
    assert again.returncode == 0 and "step 10" in again.stderr, again.stderr
    assert_same_weights(whole, parts)


def test_statistics_and_evaluation_during_training(train: TrainProcess, tmp_path: Path) -> None:
    quick = ("base_length=128", "lengths=[1,2]", "needle_digits=2", "every_n_steps=4")
    callback = tuple(f"--trainer.callbacks.init_args.{option}" for option in quick)
    scaled = "--model.network.attention.hierarchical.adaptive_temperature=true"
    steps = ("--trainer.max_steps", 4, "--checkpoint.every_n_steps", 4, "--stats.every_n_steps", 4)
    ended = train("--run_dir", tmp_path, *steps, *SIZES, scaled, *callback, configs=(HIERARCHICAL, HELD_OUT))
    assert ended.returncode == 0, ended.stderr
    wanted = {"eval/perplexity_1x", "eval/support_1x", "eval/entropy_1x", "grad_norm/alpha", "grad_norm/temperature"}
    wanted |= {f"{name}/layer_01" for name in ("support", "live_tiles", "live_blocks", "pairs_read", "temperature")}
    assert wanted <= columns_of(tmp_path)
    rows = [row for path in tmp_path.glob("metrics/*/metrics.csv") for row in csv.DictReader(path.open())]
    read = [float(row["pairs_read/layer_01"]) for row in rows if row.get("pairs_read/layer_01")]
    live = [float(row["live_blocks/layer_01"]) for row in rows if row.get("live_blocks/layer_01")]
    assert read and all(0 < one <= 1 for one in read) and live and all(1 <= one <= 8 for one in live)


def test_softmax_cannot_start_it(train: TrainProcess, tmp_path: Path) -> None:
    softmax = ROOT / "configs" / "attention" / "softmax.yaml"
    first = train("--run_dir", tmp_path / "softmax", "--trainer.max_steps", 2, "--checkpoint.every_n_steps", 2,
                  configs=(softmax,), quick=True)  # fmt: skip
    assert first.returncode == 0, first.stderr
    refused = train("--run_dir", tmp_path / "new", "--init_from", tmp_path / "softmax", *SIZES,
                    configs=(HIERARCHICAL,))  # fmt: skip
    assert refused.returncode == 2 and "attention.kind 'softmax' (config: 'hierarchical')" in refused.stderr
