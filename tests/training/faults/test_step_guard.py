"""Steps that go wrong: skipped by all ranks, counted, dumped; what the rules look back on survives a resume."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn

from common.exits import DIVERGED
from model.checkpoint import find_checkpoints
from tests.training.conftest import TrainProcess, assert_same_weights, callbacks
from tests.training.faults.test_interruption import interruption
from training.distributed.checkpoint_state import TrainingState
from training.distributed.engine import PlainEngine
from training.faults.failures import by_block
from training.faults.step_guard import GuardConfig, History, StepGuard


def column(run_dir: Path, name: str) -> dict[int, float]:
    rows = []
    for path in sorted(run_dir.glob("metrics/*/metrics.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


def test_a_bad_gradient_on_one_rank_is_skipped_on_both_and_too_many_stop_the_run(
    train: TrainProcess, tmp_path: Path
) -> None:
    options = (
        "--trainer.devices",
        2,
        callbacks(("BadGradient", {"steps": [6, 9], "rank": 1})),
        "--trainer.max_steps",
        14,
    )
    stopped_run, whole_run = tmp_path / "stopped", tmp_path / "whole"
    stopped = train("--run_dir", stopped_run, *options, "--guard.max_skipped", 1)
    assert stopped.returncode == DIVERGED, stopped.stderr
    assert "step 6: skipped, its gradient norm is nan (1 of the last 6 steps skipped)" in stopped.stderr
    assert "step 9: skipped" in stopped.stderr and "guard.max_skipped = 1" in stopped.stderr.splitlines()[-1]
    check_dump(stopped_run / "failures" / "step-00000009")
    assert find_checkpoints(stopped_run)[0][-1].step == 9  # with the weights that the dumped step found

    resumed = train("--run_dir", stopped_run, *options, "--guard.max_skipped", 1, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    whole = train("--run_dir", whole_run, *options)
    assert whole.returncode == 0, whole.stderr
    assert_same_weights(stopped_run, whole_run)
    for run in (stopped_run, whole_run):
        assert column(run, "train/skipped_steps")[14] == 2
        assert all(math.isfinite(loss) for loss in column(run, "train/loss").values())
    assert column(whole_run, "train/skipped_steps") == {2: 0, 4: 0, 6: 1, 8: 1, 10: 2, 12: 2, 14: 2}


def check_dump(folder: Path) -> None:
    ranks = [json.loads((folder / f"rank-{rank:05d}.json").read_text()) for rank in range(2)]
    samples = [rank["micro_batches"][0]["sample_ids"] for rank in ranks]  # shared out by cost
    assert list(map(len, samples)) == [2, 2] and sorted(samples[0] + samples[1]) == [32, 33, 34, 35]
    assert all(0 < rank["micro_batches"][0]["loss_sum"] < 6 * 128 for rank in ranks)
    step = json.loads((folder / "step.json").read_text())
    assert (step["step"], step["reason"], step["world_size"]) == (9, "its gradient norm is nan", 2)
    assert len(step["last_losses"]) == 9 and step["last_skipped"] == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    bad = {name for name, norm in step["gradient_norms"].items() if not math.isfinite(norm)}
    assert bad == {"blocks.0.attention_norm.weight"} and len(step["gradient_norms"]) > 10
    assert math.isnan(step["gradient_norms_of_blocks"]["blocks.0"])
    assert step["gradient_norms_of_blocks"]["blocks.1"] > 0
    assert step["versions"]["torch"] == torch.__version__ and step["code_version"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["guard"]["max_skipped"] == 1


def make_guard(tmp_path: Path, config: GuardConfig) -> tuple[StepGuard, Trainer, PlainEngine]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    trainer.strategy.training_state = lambda: TrainingState({}, [], replicated=True, steps={})  # type: ignore[attr-defined]
    return StepGuard(config, interruption(), tmp_path, "version"), trainer, PlainEngine(nn.Linear(1, 1))


def admitted(parts: tuple[StepGuard, Trainer, PlainEngine], loss: float, norm: float = 1.0) -> bool:
    guard, trainer, engine = parts
    for share in (0.25, 0.75):  # two micro-batches
        others = torch.tensor([0.0, 3.0, 0.5]).unbind()  # z-loss, divergence from a teacher, what layers learn besides
        guard.observe(torch.tensor(100 * share * loss), 50, [0], *others)
    took = guard.admits(trainer, engine, torch.tensor(norm))
    assert took is not guard.skipped and not guard.micro_batches
    assert guard.outcome.loss == pytest.approx(loss, nan_ok=True)
    assert (guard.outcome.z_loss_sum, guard.outcome.kl_sum, guard.outcome.auxiliary) == (0, 6, 0.5)
    return took


@pytest.mark.parametrize("part", ["z-loss", "divergence from the teacher", "auxiliary loss"])
def test_what_is_trained_on_besides_has_to_be_finite(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss that is logged does not hold it, and its gradient may be 0."""
    guard, trainer, engine = make_guard(tmp_path, GuardConfig())
    others = {"z-loss": 0.0, "divergence from the teacher": 3.0, "auxiliary loss": 0.5, part: math.inf}
    guard.observe(torch.tensor(50.0), 50, [0], *torch.tensor([*others.values()]).unbind())
    assert not guard.admits(trainer, engine, torch.tensor(0.0))
    assert f"skipped, its {part} is inf" in capsys.readouterr().err


def test_spikes_are_skipped_once_half_the_window_is_known(tmp_path: Path) -> None:
    parts = make_guard(tmp_path, GuardConfig(spike_deviations=6, window=20))
    calm = [3.0, 3.1, 2.9, 3.05, 2.95]
    assert all(admitted(parts, loss) for loss in calm + [9.0])  # too early
    parts = make_guard(tmp_path, GuardConfig(spike_deviations=6, window=20))
    assert all(admitted(parts, loss) for loss in 2 * calm)
    deviation = math.sqrt(sum((x - 3) ** 2 for x in calm) / 5)
    assert admitted(parts, 3 + 5.9 * deviation) and not admitted(parts, 5.0)
    assert admitted(parts, 1.0)  # a drop is none
    guard = parts[0]
    assert guard.history.total == 1 and not guard.gave_up
    other = make_guard(tmp_path, GuardConfig(spike_deviations=6, window=20))
    other[0].load_state_dict(json.loads(json.dumps(guard.state_dict())))
    again = [2.9, 6.0, 7.5, 3.0, 9.0, 20.0]
    assert [admitted(other, loss) for loss in again] == [admitted(parts, loss) for loss in again]
    assert other[0].state_dict() == guard.state_dict()


def test_a_lasting_change_of_level_is_soon_accepted(tmp_path: Path) -> None:
    parts = make_guard(tmp_path, GuardConfig(spike_deviations=3, window=16))
    for step in range(16):
        admitted(parts, 3.0 + 0.01 * (step % 3))
    taken = [admitted(parts, 4.0 + 0.01 * (step % 3)) for step in range(5)]
    assert taken[0] is False and taken[-1] is True


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_skipped_unless_that_is_off(loss: float, norm: float, tmp_path: Path) -> None:
    parts = make_guard(tmp_path, GuardConfig())
    assert admitted(parts, 3.0) and not admitted(parts, loss, norm)
    assert all(math.isfinite(kept) for kept in parts[0].history.losses)
    assert admitted(make_guard(tmp_path, GuardConfig(skip_nonfinite=False)), loss, norm)


def test_the_limit_counts_the_last_window_only(tmp_path: Path) -> None:
    parts = make_guard(tmp_path, GuardConfig(max_skipped=1, window=4))
    for _ in range(3):
        assert not admitted(parts, math.nan) and not parts[0].gave_up
        assert all(admitted(parts, 3.0) for _ in range(3))
    assert not admitted(parts, math.nan) and not admitted(parts, math.nan) and parts[0].gave_up
    assert (tmp_path / "failures" / "step-00000001" / "step.json").exists()
    assert sum(parts[0].history.skipped) == 0 and parts[0].history.total == 5


def test_a_request_to_stop_is_agreed_on(tmp_path: Path) -> None:
    parts = make_guard(tmp_path, GuardConfig())
    admitted(parts, 3.0)
    assert not parts[0].interruption.agreed
    parts[0].interruption.signals.requested = True
    admitted(parts, 3.0)
    assert parts[0].interruption.agreed


def test_history_of_equal_losses_has_no_spikes() -> None:
    assert History(8, [3.0] * 8).spike(4.0) == 0


def test_norms_by_block() -> None:
    assert by_block({"blocks.0.a": 3.0, "blocks.0.b.c": 4.0, "head": 2.0}) == {
        "blocks.0": 5.0, "other": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"spike_deviations": 0.0}, "spike_deviations is 0.0"), ({"window": 2}, "window is 2"),
     ({"max_skipped": 128}, "max_skipped is 128: .*less than guard.window 128"),
     ({"max_skipped": -1}, "max_skipped is -1")],
)  # fmt: skip
def test_bad_config(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"guard.{message}"):
        GuardConfig(**arguments)  # type: ignore[arg-type]
