"""Training with DeepSeek Sparse Attention, as a user starts it."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from model.loading import load_model
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, corpus, logged, tiny_config, train

__all__ = ["corpus", "tiny_config", "train"]  # fixtures
DSA = ROOT / "configs" / "attention" / "dsa.yaml"
HELD_OUT = ROOT / "configs" / "eval" / "during_training.yaml"
PREFIX = "--model.network.attention.dsa."


def options(**sizes: object) -> tuple[str, ...]:
    given = {"equal_parameters": "false", "index_dim": 8, "select_tokens": 12, **sizes}  # of 64 tokens a sequence
    return tuple(f"{PREFIX}{name}={value}" for name, value in given.items())


def metric(run: Path, name: str) -> list[float]:
    rows = [row for path in sorted(run.glob("metrics/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return [float(row[name]) for row in rows if row.get(name)]


def test_the_loss_falls_and_a_run_goes_on_where_it_stopped(train: TrainProcess, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = train("--run_dir", whole, *options(), configs=(DSA,))
    assert ended.returncode == 0, ended.stderr
    assert "(dsa) from step 0 to 20" in ended.stderr + ended.stdout
    losses = [loss for _, (loss, _) in sorted(logged(whole).items())]
    assert losses[-1] < losses[0] - 1 and len(losses) == 10
    index_kl = metric(whole, "train/index_kl")
    assert len(index_kl) == 10 and all(0 < one < 10 for one in index_kl)
    assert metric(whole, "grad_norm/sparse")
    network = load_model(whole).config
    assert network.attention.dsa is not None and network.attention.dsa.select_tokens == 12
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000020")
    again = train("--run_dir", parts, "--resume", "auto", *options(), configs=(DSA,))
    assert again.returncode == 0 and "from step 15 to 20" in again.stderr + again.stdout, again.stderr
    assert_same_weights(whole, parts)


def test_micro_batches_and_recomputation_change_nothing(train: TrainProcess, tmp_path: Path) -> None:
    """The losses of two micro-batches are those of one of both, and recomputed blocks add none."""
    found = []
    for name, more in (
        ("small", ("--data.micro_batch_size", 1)),
        ("large", ("--data.micro_batch_size", 4)),
        ("full", ("--model.activation_checkpointing", "full")),
    ):
        ended = train("--run_dir", tmp_path / name, "--trainer.max_steps", 4, *more, *options(), configs=(DSA,))
        assert ended.returncode == 0, ended.stderr
        found.append((metric(tmp_path / name, "train/index_kl"), metric(tmp_path / name, "train/grad_norm")))
    for index_kl, norm in found[1:]:  # float32 sums in another order
        assert index_kl == pytest.approx(found[0][0], rel=1e-4) and norm == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize("stage", ["sparse", "warmup"])
def test_ranks_take_the_steps_of_one(stage: str, train: TrainProcess, tmp_path: Path) -> None:
    """Data-parallel ranks wait for gradients of each weight that is trained."""
    found = []
    two = ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    ways = {"one": (), "two": two}
    if stage == "sparse":  # ZeRO divides weights that are all trained; its stage 3 gathers those of the indexer
        ways |= {f"stage {number}": (*two, "--parallel.zero_stage", number) for number in (1, 3)}
    for name, more in ways.items():
        ended = train(
            "--run_dir", tmp_path / name, "--trainer.max_steps", 4, *more, *options(stage=stage), configs=(DSA,)
        )
        assert ended.returncode == 0, ended.stderr
        found.append((metric(tmp_path / name, "train/index_kl"), metric(tmp_path / name, "train/grad_norm")))
    for index_kl, norm in found[1:]:  # float32 sums in another order
        assert index_kl == pytest.approx(found[0][0], rel=1e-4) and norm == pytest.approx(found[0][1], rel=1e-3)


def test_from_a_softmax_model_by_warmup_to_sparse(train: TrainProcess, tmp_path: Path) -> None:
    """The paper's stages: the indexer alone learns, all other weights stay, a frozen run resumes, and sparse training
    starts from there."""
    softmax, warm, sparse = (tmp_path / name for name in ("softmax", "warm", "sparse"))
    # under nape the indexer does not see what ALiBi takes off; weights of the usual size attend alike to all keys yet
    rope = ("--model.network.positions", "rope", "--model.network.init_std", 0.5)
    assert train("--run_dir", softmax, *rope, configs=(DSA.with_name("softmax.yaml"),)).returncode == 0
    refused = train("--run_dir", warm, *rope, "--init_from", softmax, *options(equal_parameters="true"), configs=(DSA,))
    assert (
        refused.returncode == 2 and "attention.dsa.equal_parameters None (config: True) (give --" in refused.stderr
    ), refused.stderr
    stage = options(stage="warmup")
    first = ("--trainer.max_steps", 20, "--model.optimizer.lr", "3e-2")
    ended = train("--run_dir", warm, *rope, "--init_from", softmax, *first, *stage, configs=(DSA,))
    assert ended.returncode == 0, ended.stderr
    index_kl = metric(warm, "train/index_kl")
    assert index_kl[-1] < 0.9 * index_kl[0], index_kl
    before, after = (dict(load_model(run).model.named_parameters()) for run in (softmax, warm))
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert {name for name in after if name not in before} == {name for name in after if ".sparse." in name}
    half = tmp_path / "half"
    shutil.copytree(warm, half)
    shutil.rmtree(half / "checkpoints" / "step-00000020")
    again = train("--run_dir", half, *rope, "--resume", "auto", *first, *stage, configs=(DSA,))
    assert again.returncode == 0 and "from step 15 to 20" in again.stderr + again.stdout, again.stderr
    assert_same_weights(warm, half)
    ended = train("--run_dir", sparse, *rope, "--init_from", warm, *options(), configs=(DSA,))
    assert ended.returncode == 0 and "attention.dsa.stage warmup -> sparse" in ended.stderr + ended.stdout, ended.stderr
    moved = dict(load_model(sparse).model.named_parameters())
    assert all(not torch.equal(moved[name], p) for name, p in after.items())


def test_warmup_without_freezing_moves_all_weights(train: TrainProcess, tmp_path: Path) -> None:
    sizes = options(stage="warmup", freeze="false")
    assert train("--run_dir", tmp_path, *sizes, configs=(DSA,)).returncode == 0
    losses = [loss for _, (loss, _) in sorted(logged(tmp_path).items())]
    assert losses[-1] < losses[0] - 1


def test_evaluation_during_training_has_no_profile(train: TrainProcess, tmp_path: Path) -> None:
    quick = ("base_length=128", "lengths=[1,2]", "needle_digits=2", "every_n_steps=4")
    callback = tuple(f"--trainer.callbacks.init_args.{option}" for option in quick)
    steps = ("--trainer.max_steps", 4, "--checkpoint.every_n_steps", 4, "--stats.every_n_steps", 4)
    ended = train("--run_dir", tmp_path, *steps, *options(), *callback, configs=(DSA, HELD_OUT))
    assert ended.returncode == 0, ended.stderr
    columns = {name for path in tmp_path.glob("metrics/*/metrics.csv") for name in next(csv.reader(path.open()))}
    assert {"eval/perplexity_1x", "train/index_kl"} <= columns
    assert not {name for name in columns if name.startswith(("eval/support", "eval/entropy", "support/"))}
