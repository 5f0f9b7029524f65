from pathlib import Path

import pytest

from eval.common.metrics import Series, read_metrics
from tests.eval.conftest import write_metrics


def test_a_later_session_wins_from_its_first_step_on(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"step": s, "train/loss": 10 + s} for s in range(6)])
    write_metrics(tmp_path, 4, [{"step": s, "train/loss": 20 + s} for s in (4, 5, 6)])
    write_metrics(tmp_path, 5, [{"step": s, "train/loss": 30 + s} for s in (5,)])
    assert read_metrics(tmp_path)["train/loss"] == Series([0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 24, 35])


def test_columns_are_logged_at_steps_of_their_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "epoch": 0, "train/loss": 3.0, "val/loss": ""},
        {"step": 0, "epoch": 0, "train/loss": "", "val/loss": 2.5},
        {"step": 1, "epoch": 0, "train/loss": 2.0, "val/loss": ""},
    ]
    write_metrics(tmp_path, 0, rows)
    assert read_metrics(tmp_path) == {"train/loss": Series([0, 1], [3, 2]), "val/loss": Series([0], [2.5])}


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"step": 0, "train/loss": 1.0, "lr": 2.0}])
    with (tmp_path / "metrics/step-00000000/metrics.csv").open("a") as file:
        file.write("1,0.5")
    metrics = read_metrics(tmp_path)
    assert metrics["train/loss"].steps == [0, 1] and metrics["lr"].steps == [0]


def test_a_run_without_metrics_has_none_and_a_missing_run_is_an_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_metrics(tmp_path / "absent")


def test_damaged_files_name_the_file_and_the_value(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, [{"step": 0, "train/loss": "oops"}])
    with pytest.raises(ValueError, match=r"metrics\.csv line 2: train/loss is 'oops'"):
        read_metrics(tmp_path)
    write_metrics(tmp_path / "other", 0, [{"loss": 1.0}])
    with pytest.raises(ValueError, match="expected a step column"):
        read_metrics(tmp_path / "other")
