"""A device that fails: what is said, and how the run goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from common.errors import LESS_MEMORY, out_of_memory, user_errors
from model.checkpoint import checkpoint_folder
from model.config import AttentionConfig, ModelConfig
from tests.training.conftest import TrainProcess, assert_same_weights, callbacks
from tests.training.faults.callbacks import OUT_OF_MEMORY
from training.faults.devices import less_memory

MODE, TILE, SHARED = "model.activation_checkpointing", "model.mlp_tile_tokens", "parallel.sequence_parallel"
MEMORY = OUT_OF_MEMORY[: OUT_OF_MEMORY.index(". Of the")]


def failed_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def test_out_of_memory_is_one_line_and_the_run_goes_on(undisturbed: Path, train: TrainProcess, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("--run_dir", run_dir, "--resume", "auto")
    before = train(*options, callbacks(("FailDevice", {"step": 2, "kind": "memory"})))
    assert before.returncode == 1 and "Traceback" not in before.stderr
    line = failed_line(before.stderr)
    assert line.startswith("error: rank 0 (cpu of ") and f"is out of memory behind step 2: {MEMORY}; less is" in line
    assert (
        "; less is needed with model.activation_checkpointing full, model.mlp_tile_tokens below 128 or "
        "data.micro_batch_size below 2; python -m training.memory" in line
    )
    assert line.endswith("; there is no checkpoint yet")
    behind = train(*options, callbacks(("FailDevice", {"step": 7, "kind": "memory"})))
    assert behind.returncode == 1
    newest = checkpoint_folder(run_dir, 5)
    assert failed_line(behind.stderr).endswith(f"checkpoint is {newest}, from which --resume auto continues")
    assert train(*options).returncode == 0
    assert_same_weights(run_dir, undisturbed)


def test_a_failed_device_shows_its_own_traceback_and_one_line(train: TrainProcess, tmp_path: Path) -> None:
    failing = callbacks(("FailDevice", {"step": 7, "kind": "access"}))
    ended = train("--run_dir", tmp_path / "run", failing)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1 and "another exception" not in ended.stderr
    assert "in on_train_batch_start" in ended.stderr and "trainer._teardown" not in ended.stderr
    line = failed_line(ended.stderr)
    assert " failed behind step 7: CUDA error: an illegal memory access was encountered; if it comes again" in line
    assert "CUDA_LAUNCH_BLOCKING=1" in line and line.endswith("from which --resume auto continues")
    raised = train("--run_dir", tmp_path / "debugged", failing, "--debug")
    assert raised.returncode == 1 and "another exception" in raised.stderr and "CUDA_LAUNCH" not in raised.stderr


def test_an_error_of_another_kind_before_it_is_shown_too(train: TrainProcess, tmp_path: Path) -> None:
    ended = train("--run_dir", tmp_path / "run", callbacks(("FailDevice", {"step": 7, "kind": "kernel"})))
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 2
    assert ended.stderr.index("RuntimeError: Triton Error") < ended.stderr.index("AcceleratorError")
    assert " failed behind step 7: Triton Error [CUDA]: an illegal memory access" in failed_line(ended.stderr)


def test_any_rank_says_that_its_device_failed(train: TrainProcess, tmp_path: Path) -> None:
    two = ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    ended = train(
        "--run_dir", tmp_path / "run", *two, callbacks(("FailDevice", {"step": 7, "kind": "memory", "rank": 1}))
    )
    assert ended.returncode != 0
    assert (
        "error: rank 1 (cpu of " in ended.stderr
        and "model.mlp_tile_tokens below 64 or parallel.sequence_parallel 2 on as many devices; python" in ended.stderr
    )


@pytest.mark.parametrize(
    ("settings", "network", "named"),
    [
        ({"mode": "selective", "size": 4}, {}, [f"{MODE} full", f"{TILE} 16384", "data.micro_batch_size below 4"]),
        ({"mode": "full", "tile": 512}, {}, [f"{MODE} offload", f"{TILE} 512", f"{SHARED} 2"]),
        ({"mode": "offload", "tile": 1 << 20, "shared": 2}, {"n_heads": 4}, [f"{TILE} 2048", f"{SHARED} 4"]),
        (
            {"mode": "offload", "tile": 1, "length": 999},
            {"d_model": 96, "n_heads": 6, "n_kv_heads": 3},
            [f"{SHARED} 3"],
        ),  # 2 do not
        ({"mode": "offload", "tile": 1, "shared": 4}, {"n_heads": 4}, []),
        ({"mode": "offload", "tile": 1}, {"attention": AttentionConfig(kind="nsa")}, []),
        ({"graphs": True, "size": 4}, {}, [f"model.cuda_graphs false with {MODE} full"]),
        ({"mode": "offload", "tile": 16, "float8": "rowwise", "size": 2}, {}, ["data.micro_batch_size below 2"]),
    ],
)
def test_named_is_what_can_still_need_less(settings: dict[str, Any], network: dict[str, Any], named: list[str]) -> None:
    given = {"mode": "none", "tile": 0, "graphs": False, "size": 1, "shared": 1, "float8": "none", "length": 4096}
    given |= settings
    model = Namespace(
        activation_checkpointing=given["mode"], mlp_tile_tokens=given["tile"], cuda_graphs=given["graphs"],
        float8=given["float8"],
    )  # fmt: skip
    data = Namespace(micro_batch_size=given["size"], sequence_length=given["length"])
    parallel = Namespace(sequence_parallel=given["shared"])
    told = less_memory(Namespace(model=model, data=data, parallel=parallel), ModelConfig(**network))
    assert [one.replace(f"{TILE} below", TILE).removesuffix(" on as many devices") for one in told] == named


def test_out_of_memory_before_the_first_step_is_the_same_crash(train: TrainProcess, tmp_path: Path) -> None:
    """For srun's script, too; options that need fewer activations would not help."""
    ended = train("--run_dir", tmp_path / "run", callbacks(("FailDevice", {"step": -1, "kind": "memory"})))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert f"out of memory behind step 0: {MEMORY}; python -m training.memory with" in failed_line(ended.stderr)


def test_commands_say_in_one_line_that_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended, user_errors():
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {MEMORY}; {LESS_MEMORY}\n"
    with pytest.raises(RuntimeError), user_errors():
        raise RuntimeError(OUT_OF_MEMORY)
    monkeypatch.setattr(sys, "argv", ["command", "--debug"])
    with pytest.raises(torch.OutOfMemoryError), user_errors():
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_other_words_of_torch_are_kept_whole() -> None:
    assert out_of_memory(torch.OutOfMemoryError("HIP out of memory.\nTried a lot.")) == "HIP out of memory. Tried a lot"
    assert not out_of_memory(ValueError("out of memory"))
