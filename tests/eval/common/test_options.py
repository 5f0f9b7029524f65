"""Outputs are tried before the work, and Ctrl-C says what becomes of it."""

import errno
import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from eval.common.options import check_output, check_output_file
from eval.held_out.config import GREATEST
from eval.held_out.needle import WORDS


def test_an_output_that_can_be_written_is_left_empty(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "folder"]
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    check_output_file(tmp_path / "other" / "file")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file", ""), ("file/below", "Not a directory"), ("a" * 300, "File name too long"),
     ("/proc/none", "No such file or directory")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_named(output: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    problem = f"cannot be written \\({reason}\\): choose" if reason else "is a file: expected a folder"
    with pytest.raises(UsageError, match=f"^--output .*{output[-50:]} {problem}"):
        check_output(tmp_path / output)
    assert (tmp_path / "file").read_text() == "kept"
    if output != "file":  # which may be written again
        with pytest.raises(UsageError, match=f"^--output .* cannot be written \\({reason}\\): choose"):
            check_output_file(tmp_path / output if "/" not in output[1:] else tmp_path / output / "name")


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: expected the name of a file"):
        check_output_file(tmp_path)


KEPT = "what was measured is kept, the same command continues"


@pytest.mark.parametrize(
    ("module", "work", "arguments", "line"),
    [
        ("eval.run", "evaluate", ["r", "--data", "d"], KEPT),
        ("eval.tasks.command", "evaluate", ["r", "--tasks", "piqa"], KEPT),
        ("eval.length_generalisation.command", "evaluate", ["r"], KEPT),
        ("eval.sparse_frontier.command", "evaluate", ["--softmax", "a", "--entmax", "b", "--data", "d"],
         KEPT),
        ("eval.ruler.command", "find_tokenizer", ["--tokenizer", "t"],
         "what was built is kept, the same command continues"),
        ("eval.calibrate", "calibrate", ["r", "--data", "d"], "nothing is written"),
        ("eval.generate", "write_continuation", ["r", "--prompt", "p"], "stopped by Ctrl-C"),
    ],
)  # fmt: skip
def test_ctrl_c_is_one_line(
    module: str, work: str, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    command = importlib.import_module(module)
    owner = importlib.import_module("eval.tasks.evaluation") if module == "eval.tasks.command" else command
    monkeypatch.setattr(owner, work, stopped)
    assert command.main(arguments) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("stopped by Ctrl-C") and line in said and "\n" not in said


def test_a_sample_has_as_many_needles_as_there_are_names() -> None:
    assert GREATEST["needle_count"] == len(WORDS)


@pytest.mark.parametrize("inside", [["checkpoints"], ["heldout", "tokenizer.model"]])
def test_folders_of_runs_and_corpora_are_not_written_to(inside: list[str], tmp_path: Path) -> None:
    (tmp_path / inside[0]).mkdir()
    for name in inside[1:]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="own folder: choose another one"):
        check_output(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == inside
