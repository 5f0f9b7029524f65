"""Each option and callback of the installed Lightning is one that works here, or refused with what to use instead."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from common.errors import UsageError
from model.config import AttentionConfig, ModelConfig
from tests.training.conftest import ROOT, TrainProcess
from training.cli import LONGEST_MESSAGE, shortened
from training.distributed.config import ParallelConfig
from training.distributed.strategies import build_strategy
from training.memory.states import parameter_count
from training.options import (
    REFUSED_CALLBACKS,
    REFUSED_OPTIONS,
    WORKING_CALLBACKS,
    WORKING_OPTIONS,
    check_callbacks,
    check_plugins,
    check_tasks,
    check_trainer_options,
    count_processes,
)
from training.setup_checks import check_copy_fits, check_runs_here, first_device

PARAMETERS = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items() if name != "self"}


def test_every_option_and_callback_of_lightning_is_known() -> None:
    assert sorted([*WORKING_OPTIONS, *REFUSED_OPTIONS]) == sorted(PARAMETERS)
    assert sorted([*WORKING_CALLBACKS, *REFUSED_CALLBACKS]) == sorted(lightning_callbacks.__all__)


class Options(SimpleNamespace):
    """As jsonargparse's Namespace."""

    def get(self, key: str) -> Any:
        return getattr(self, key)


def check(**changed: object) -> None:
    options = Options(
        **{**PARAMETERS, "max_steps": 5, "max_tokens": None, "log_every_n_steps": 10, "accelerator": "cpu", **changed}
    )
    check_trainer_options(options, PARAMETERS)


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_a_refused_option_says_what_to_use(name: str) -> None:
    check()
    with pytest.raises(ValueError, match=f"trainer.{name} is 4: leave it out and use "):
        check(**{name: 4})


@pytest.mark.parametrize(
    ("name", "values"),
    [("devices", ["two", -2, 0, "0", [], "1,x"]), ("accelerator", ["tpu", "mps"]),
     ("gradient_clip_val", [-1.0, float("nan"), float("inf")]), ("log_every_n_steps", [0, -1]), ("num_nodes", [0]),
     ("max_steps", [0, -1, 10**22, 10**10]), ("precision", ["16-true", "64-true", "transformer-engine", 64, "fp7"])],
)  # fmt: skip
def test_values_that_cannot_work(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"trainer.{name} is"):
            check(**{name: value})


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 1, "2", [0], [0, 1], "0,1", "3,"])
def test_devices_that_work(devices: object) -> None:
    check(devices=devices)


@pytest.mark.parametrize("precision", [None, 32, "32-true", "bf16", "bf16-mixed", "bf16-true"])
def test_precisions_that_work(precision: object) -> None:
    check(precision=precision)


def test_half_precision_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("16-mixed", "16", 16):
        with pytest.raises(ValueError, match=f"trainer.precision is {precision!r}, which needs a CUDA device"):
            check(precision=precision)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check(precision="16-mixed", accelerator="gpu")


def test_callbacks_and_plugins_that_are_refused() -> None:
    check_callbacks([LearningRateMonitor()])
    for callback, instead in (
        (ModelCheckpoint(), "checkpoint"), (EMAWeightAveraging(), "not be saved"), (EarlyStopping("x"), "a signal"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"trainer.callbacks has {type(callback).__name__}: .*{instead}"):
            check_callbacks([callback])
    with pytest.raises(ValueError, match="trainer.plugins has async: expected cluster environments only"):
        check_plugins(["async"])


JOB = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


def test_processes_are_as_many_as_slurm_has_started() -> None:
    check_tasks(2, {})
    check_tasks(2, JOB | STEP)
    check_tasks(1, JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    check_tasks(1, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"})
    with pytest.raises(ValueError, match="srun started 2 tasks, but trainer.devices x trainer.num_nodes is 1"):
        check_tasks(1, JOB | STEP)
    for processes in (1, 2):
        with pytest.raises(ValueError, match=f"job of 2 tasks without srun .* is {processes}\\): start it with srun"):
            check_tasks(processes, JOB)


def test_one_callback_without_a_list_works_and_no_progress_bar(train: TrainProcess, tmp_path: Any) -> None:
    options = ("--trainer.max_steps", 4, "--trainer.enable_progress_bar", "false")
    options += ("--profile.steps", 2)
    done = train("--run_dir", tmp_path / "run", "--trainer.callbacks=DeviceStatsMonitor", *options)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" not in done.stderr
    assert "profile.steps is 2, but nothing was traced: the session ended at step 4, before step 5" in done.stderr
    (metrics,) = (tmp_path / "run" / "metrics").glob("*/metrics.csv")
    assert "DeviceStatsMonitor" in metrics.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("devices", "ranks", "first"),
    [("auto", 4, 0), (-1, 4, 0), ("-1", 4, 0), (2, 2, 0), ("2", 2, 0), ([3, 1], 2, 3), ("3,1", 2, 3), ("2,", 1, 2)],
)
def test_each_way_of_asking_for_gpus_is_read(
    devices: Any, ranks: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check(accelerator="gpu", devices=devices)
    options = dict(accelerator="gpu", devices=devices, num_nodes=2)
    assert count_processes(options) == 2 * ranks
    assert first_device(options) == torch.device("cuda", first)
    options["accelerator"] = "cpu"
    assert first_device(options) == torch.device("cpu")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_cluster_has_its_ranks_and_strategy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node of 8 GPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    config = yaml.safe_load(file.read_text())
    options, parallel = {"num_nodes": 2, **config["trainer"]}, ParallelConfig(**config.get("parallel", {}))
    check(**options)
    alone = file.stem in ("cpu", "one_gpu")
    assert count_processes(options) == (2 if alone else 16)
    device = first_device(options)
    assert device == (torch.device("cpu") if file.stem == "cpu" else torch.device("cuda", 0))
    strategy = build_strategy(parallel, processes=count_processes(options) // 2, device=device)
    kind = SingleDeviceStrategy if alone else DeepSpeedStrategy if parallel.zero_stage else DDPStrategy
    assert isinstance(strategy, kind)


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ModelConfig(attention=AttentionConfig(kind="entmax", backend="triton"))
    check_runs_here(network, torch.device("cuda", 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_runs_here(network, torch.device("cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UsageError, match="attention.backend is 'triton', which needs CUDA: use auto or torch on a CPU"):
        check_runs_here(network, torch.device("cpu"))


def test_a_copy_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ModelConfig()
    parameters = parameter_count(network)
    monkeypatch.setattr("training.setup_checks._host_memory", lambda: 9 * parameters)
    check_copy_fits(network, "adamw", nodes=2)
    with pytest.raises(UsageError, match="checkpoint.asynchronous is true: the copy .* expected false, or more nodes"):
        check_copy_fits(network, "adamw", nodes=1)
    check_copy_fits(network, "muon", nodes=1)


def test_messages_of_types_that_have_many_forms_are_short() -> None:
    forms = ", ".join(f"Literal['form {number}']" for number in range(100))
    message = f'Parser key "trainer.precision":\n  Does not validate against Union[{forms}].\n  Got value: fp7'
    line = shortened(message)
    assert line == ('Parser key "trainer.precision": Does not validate against one of several types. Got value: fp7')
    two = "Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n"
    message = f"Does not validate against any of the Union subtypes\n  {two}  Given value type: <class 'str'>\n"
    assert shortened(f'Parser key "x":\n  {message}  Given value: fp7') == (
        'Parser key "x": Expected int or null. Got value: fp7'
    )
    assert len(shortened("a word " * 1000)) <= LONGEST_MESSAGE + 10
