"""Training on ranks that share sequences equals training on one process: real runs of train.py."""

import csv
from pathlib import Path

import pytest

from model.config import ModelConfig
from model.loading import load_model
from tests.training.conftest import TrainProcess
from training.distributed.config import ParallelConfig
from training.distributed.sequence_parallel import check_sequence_parallel

STEPS = 10
# lr 1e-3: at 1e-2 the rounding of a sum's order grows beyond 1e-5 within ten steps
COMMON: tuple[object, ...] = (
    "--trainer.max_steps", STEPS, "--trainer.log_every_n_steps", 1, "--model.optimizer.lr", 1e-3,
    "--stats.every_n_steps", 5, "--validation.every_n_steps", 5, "--checkpoint.every_n_steps", STEPS,
)  # fmt: skip
MODELS: dict[str, tuple[object, ...]] = {
    "asentmax-nape": (),  # 2 query heads share 1 KV head
    "softmax-rope": (
        "--model.network.attention.kind", "softmax", "--model.network.positions", "rope",
        "--model.network.n_heads", 4, "--model.network.n_kv_heads", 2, "--model.z_loss", 0.01,
    ),
}  # fmt: skip
TWO_RANKS = ("--trainer.devices", 2, "--parallel.sequence_parallel", 2)
FOUR_RANKS = ("--trainer.devices", 4, "--parallel.sequence_parallel", 2, "--data.micro_batch_size", 1)


def rows(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "metrics" / "step-00000000" / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def column(run_dir: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in rows(run_dir) if name in row}


@pytest.fixture(scope="module")
def runs(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process with micro-batches of 2 (accumulation 2), and the same global batches on ranks that share them."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, options in MODELS.items():
        variants: dict[str, tuple[object, ...]] = {"": (), "-sp2": TWO_RANKS}
        if name == "asentmax-nape":
            variants["-sp2-dp2"] = FOUR_RANKS
        for suffix, more in variants.items():
            run_dir = found[name + suffix] = folder / (name + suffix)
            done = train("--run_dir", run_dir, *COMMON, *options, *more)
            assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(
    ("name", "ranks"), [("asentmax-nape", "-sp2"), ("softmax-rope", "-sp2"), ("asentmax-nape", "-sp2-dp2")]
)
def test_ten_steps_equal_one_process(runs: dict[str, Path], name: str, ranks: str) -> None:
    one, shared = runs[name], runs[name + ranks]
    z_loss = ("train/z_loss",) if name == "softmax-rope" else ()
    for metric in ("train/loss", "train/grad_norm", "val/loss", *z_loss):
        expected = column(one, metric)
        assert len(expected) == (2 if metric == "val/loss" else STEPS)
        assert column(shared, metric) == pytest.approx(expected, rel=1e-5), metric
    assert column(shared, "train/tokens") == column(one, "train/tokens")
    weights = [load_model(path).model.state_dict() for path in (one, shared)]
    for key, weight in weights[0].items():
        assert float((weights[1][key] - weight).norm() / max(1e-9, float(weight.norm()))) < 1e-3, key


def test_statistics_are_those_of_the_first_slice(runs: dict[str, Path]) -> None:
    shared = runs["asentmax-nape-sp2"]
    support = column(shared, "support/layer_01")
    assert list(support) == [1, 5, 10] and all(1 <= value <= 64 for value in support.values())


def test_a_run_resumes_with_and_without_sharing(train: TrainProcess, runs: dict[str, Path], tmp_path: Path) -> None:
    """The checkpoint does not depend on how ranks share sequences."""
    losses = []
    for name, ranks in (("asentmax-nape", TWO_RANKS), ("asentmax-nape-sp2", ())):
        run_dir = runs[name]
        more = ("--trainer.max_steps", STEPS + 2, "--allow_changes", "[trainer.max_steps]")
        done = train("--run_dir", run_dir, "--resume", "auto", *COMMON, *more, *ranks)
        assert done.returncode == 0, done.stderr
        with (run_dir / "metrics" / f"step-{STEPS:08d}" / "metrics.csv").open(newline="") as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_cannot_be_divided_is_refused() -> None:
    network = ModelConfig(n_heads=4, n_kv_heads=2)
    with pytest.raises(ValueError, match="sequence_parallel is 4: expected a divisor of the 6 ranks"):
        check_sequence_parallel(ParallelConfig(sequence_parallel=4), network, 128, 6)
    with pytest.raises(ValueError, match=r"is 130 tokens: expected a multiple of parallel.sequence_parallel = 4"):
        check_sequence_parallel(ParallelConfig(sequence_parallel=4), network, 130, 4)
    check_sequence_parallel(ParallelConfig(sequence_parallel=4), network, 128, 4)


def test_what_cannot_be_shared_is_one_line(train: TrainProcess, tmp_path: Path) -> None:
    options = ("--model.network.n_heads", 1, "--model.network.positions", "rope")
    done = train("--run_dir", tmp_path / "run", *TWO_RANKS, *options)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "n_heads is 1" in done.stderr and "sequence_parallel = 2" in done.stderr
