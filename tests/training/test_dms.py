"""Training with Dynamic Memory Sparsification, as a user starts it."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from data.store import TokenStore
from model.attention_stats import attention_stats
from model.config import DMSConfig
from model.loading import load_model
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, corpus, logged, tiny_config, train

__all__ = ["corpus", "tiny_config", "train"]  # fixtures
DMS = ROOT / "configs" / "attention" / "dms.yaml"
HELD_OUT = ROOT / "configs" / "eval" / "during_training.yaml"


def options(**sizes: object) -> tuple[str, ...]:
    given = {"window": 8, "compression": 4, "ramp_steps": 10, **sizes}  # of 64 tokens a sequence
    return tuple(f"--model.network.attention.dms.{name}={value}" for name, value in given.items())


def metric(run: Path, name: str) -> list[float]:
    rows = [row for path in sorted(run.glob("metrics/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return [float(row[name]) for row in rows if row.get(name)]


def test_compression_of_a_softmax_model_rises_to_its_target(train: TrainProcess, corpus: Path, tmp_path: Path) -> None:
    softmax, retrofit, parts = (tmp_path / name for name in ("softmax", "dms", "parts"))
    assert train("--run_dir", softmax, configs=(DMS.with_name("softmax.yaml"),)).returncode == 0
    steps = ("--trainer.max_steps", 40, "--checkpoint.every_n_steps", 10)
    ended = train("--run_dir", retrofit, "--init_from", softmax, *steps, *options(), configs=(DMS,))
    assert ended.returncode == 0, ended.stderr
    assert "(dms) from step 0 to 40" in ended.stderr + ended.stdout
    assert "new, with initial values: attention.sparse.eviction.weight" in ended.stderr + ended.stdout
    evicted, target = metric(retrofit, "train/evicted"), metric(retrofit, "train/evicted_target")
    assert evicted[0] < 0.2 and target[0] == pytest.approx(1 - 1 / 1.3) and target[-1] == 0.75  # after one of ten steps
    assert min(evicted[-5:]) >= 0.75, evicted  # nothing holds it at the target but what the language model loses
    losses = [loss for _, (loss, _) in sorted(logged(retrofit).items())]
    assert losses[-1] < logged(softmax)[2][0] - 1  # it is a language model still
    model = load_model(retrofit).model
    assert model.config.attention.dms == DMSConfig(window=8, compression=4, ramp_steps=10)
    text = torch.from_numpy(TokenStore(corpus / "heldout").document(0)[:64].astype("int64"))
    read = torch.stack([layer.pairs_read for layer in attention_stats(model, text[None])])  # type: ignore[misc]
    assert read.max() < 1, read
    shutil.copytree(retrofit, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000040")
    again = train("--run_dir", parts, "--resume", "auto", *steps, *options(), configs=(DMS,))
    assert again.returncode == 0 and "from step 30 to 40" in again.stderr + again.stdout, again.stderr
    assert_same_weights(retrofit, parts)  # the same noise


def test_micro_batches_ranks_and_recomputation_change_nothing(train: TrainProcess, tmp_path: Path) -> None:
    """Noise is the tokens' own, wherever they are computed. Far below the target, where the loss is the mean of micro-
    batches' losses."""
    found = []
    two = ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    ways: dict[str, tuple[object, ...]] = {
        "small": ("--data.micro_batch_size", 1),
        "large": ("--data.micro_batch_size", 4),
        "full": ("--model.activation_checkpointing", "full"),
        "two": two,
        **{f"stage {number}": (*two, "--parallel.zero_stage", number) for number in (1, 3)},
    }
    for name, more in ways.items():
        steps = ("--trainer.max_steps", 4, *options(ramp_steps=0, compression=100, offset=-1))
        ended = train("--run_dir", tmp_path / name, *steps, *more, configs=(DMS,))
        assert ended.returncode == 0, ended.stderr
        found.append((metric(tmp_path / name, "train/evicted"), metric(tmp_path / name, "train/grad_norm")))
    assert 0 < found[0][0][0] < 0.9
    for evicted, norm in found[1:]:  # float32 sums in another order, and decisions that turn on them
        assert evicted == pytest.approx(found[0][0], abs=2 / 512) and norm == pytest.approx(found[0][1], rel=1e-3)


def test_statistics_and_evaluation_during_training(train: TrainProcess, tmp_path: Path) -> None:
    quick = ("base_length=128", "lengths=[1,2]", "needle_digits=2", "every_n_steps=4")
    callback = tuple(f"--trainer.callbacks.init_args.{option}" for option in quick)
    steps = ("--trainer.max_steps", 4, "--checkpoint.every_n_steps", 4, "--stats.every_n_steps", 4)
    ended = train("--run_dir", tmp_path, *steps, *options(), *callback, configs=(DMS, HELD_OUT))
    assert ended.returncode == 0, ended.stderr
    columns = {name for path in tmp_path.glob("metrics/*/metrics.csv") for name in next(csv.reader(path.open()))}
    wanted = {"eval/perplexity_1x", "eval/support_1x", "eval/entropy_1x", "grad_norm/sparse", "train/evicted"}
    assert wanted | {f"{name}/layer_01" for name in ("support", "live_tiles", "pairs_read")} <= columns
    assert not {name for name in columns if name.startswith(("live_blocks", "train/index_kl", "alpha"))}
