"""Which rank writes what, and what a rank takes from the files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import Unreadable
from training.distributed.checkpoint_state import (
    Fragment,
    SaveError,
    TrainingState,
    agreement,
    plan_files,
    read_state,
    together,
)
from training.distributed.checkpoint_writer import agreed_checksums, take_share


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    writers=st.integers(1, 9),
    file_bytes=st.integers(1, 6000),
)
def test_every_tensor_is_in_one_file_and_ranks_write_alike(sizes: list[int], writers: int, file_bytes: int) -> None:
    shapes = {f"t{number}": (size,) for number, size in enumerate(sizes)}
    plan = plan_files(shapes, writers, file_bytes)
    files = [file for mine in plan for file in mine]
    assert sorted(key for file in files for key in file.keys) == sorted(shapes)
    assert [file.name for file in files] == [f"state-{number:05d}.safetensors" for number in range(len(files))]
    assert all(file.writer == rank for rank, mine in enumerate(plan) for file in mine)
    assert all(len(file.keys) == 1 or sum(4 * shapes[key][0] for key in file.keys) <= file_bytes for file in files)
    load = [sum(4 * shapes[key][0] for file in mine for key in file.keys) for mine in plan]
    assert max(load) - min(load) <= 4 * max(sizes)


def test_missing_and_misshapen_tensors_are_named() -> None:
    state = TrainingState({"weight/a": (2, 3)}, [Fragment("weight/a", 2, torch.zeros(4))], True, {})
    read_state({"weight/a": torch.arange(6.0).view(2, 3)}, state)
    assert state.fragments[0].values.tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"weight/a is missing, expected shape \(2, 3\)"):
        read_state({}, state)
    with pytest.raises(ValueError, match=r"weight/a has shape \(6,\), expected shape \(2, 3\)"):
        read_state({"weight/a": torch.zeros(6)}, state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite_do_not_become_a_run_s(value: float) -> None:
    state = TrainingState({"weight/a": (2,)}, [Fragment("weight/a", 0, torch.zeros(2))], True, {})
    with pytest.raises(ValueError, match="weight/a is not finite: choose another checkpoint"):
        read_state({"weight/a": torch.tensor([1.0, value])}, state)


@pytest.mark.parametrize("mode", [0o755, 0o750])
def test_files_can_be_read_by_whom_the_folder_lets(mode: int, tmp_path: Path) -> None:
    state = TrainingState({"weight/a": (4,)}, [Fragment("weight/a", 0, torch.zeros(4))], True, {})
    tmp_path.chmod(mode)
    take_share(tmp_path, state, torch.device("cpu"), None).write()
    assert (tmp_path / "state-00000.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_a_folder_that_is_not_there_is_a_save_error(tmp_path: Path) -> None:
    state = TrainingState({"weight/a": (4,)}, [Fragment("weight/a", 0, torch.zeros(4))], True, {})
    with pytest.raises(SaveError, match="rank 0: .*No such file"):
        agreed_checksums(take_share(tmp_path / "missing", state, torch.device("cpu"), None).write)


def test_other_errors_are_not_save_errors() -> None:
    with pytest.raises(ZeroDivisionError), agreement():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(5, "Input/output error", "x"), Unreadable), (ValueError("x"), ValueError)]
)
def test_ranks_agree_on_whether_a_file_is_damaged_or_cannot_be_read(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^x") as caught, together():
        raise error
    assert type(caught.value) is kind
