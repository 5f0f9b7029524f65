"""Several processes that measure cells beside each other: the same results as of one, and what ends them."""

import json
import os
from collections import deque
from collections.abc import Sequence
from multiprocessing import Value
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eval.sparse_frontier.command
from data.tokenizer import load_tokenizer
from eval.ruler.files import FrozenTask
from eval.sparse_frontier.command import main
from eval.sparse_frontier.config import FrontierConfig
from eval.sparse_frontier.measure import Measuring, Place
from eval.sparse_frontier.processes import QUIET, Work, _open, _raise_failure, _take, measure_beside
from tests.eval.conftest import BASE_LENGTH, MakeRun
from tests.eval.sparse_frontier.test_ruler import freeze, without_plots

OPTIONS = ["--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2", "--lengths", "1"]
OPTIONS += ["--decode_tokens", "3", "--timed_runs", "1", "--device", "cpu", "--densities", "0.5", "--policies"]


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("frontier_processes")
    return [str(make_run(folder / kind, kind)) for kind in ("softmax", "asentmax")]


def test_processes_measure_what_one_does(
    corpus: Path, runs: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command itself no policy, whose cells it finds."""
    measured: list[str] = []
    measure = Measuring._measure

    def note(self: Measuring, method: str, *place: Any) -> Any:
        measured.append(method)
        return measure(self, method, *place)

    monkeypatch.setattr(Measuring, "_measure", note)
    found = {}
    for processes in ("2", "1"):
        output = tmp_path / processes
        arguments = ["--softmax", runs[0], "--entmax", runs[1], "--data", str(corpus), "--output", str(output)]
        assert main([*arguments, *OPTIONS, "window", "snapkv", "--processes", processes]) == 0
        cells = json.loads((output / "sparse_frontier.json").read_text())["cells"]
        found[processes] = [{k: v for k, v in cell.items() if k not in ("date", "seconds")} for cell in cells]
        if processes == "2":
            assert set(measured) == {"dense", "entmax"}
    assert found["2"] == found["1"] and len(found["1"]) > 6
    assert QUIET not in os.environ


def test_told_is_what_was_kept_before(
    corpus: Path, runs: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each: by the processes, which are this one here, or by the command."""

    def beside(work: Work, places: Sequence[Place]) -> None:
        measuring, sets = _open(work, 0)
        for place in places:
            measuring.measure_place(place, sets)

    monkeypatch.setattr(eval.sparse_frontier.command, "measure_beside", beside)
    without_plots(monkeypatch)
    samples = [{"index": 0, "prompt": "a b", "answers": ["c"], "tokens": 9}]
    frozen = FrozenTask("vt", BASE_LENGTH, "", samples)
    ruler = freeze(tmp_path / "ruler", load_tokenizer(corpus / "tokenizer.model"), [frozen], [])
    arguments = ["--softmax", runs[0], "--entmax", runs[1], "--data", str(corpus), "--output", str(tmp_path)]
    arguments += [*OPTIONS, "window", "snapkv", "--processes", "2", "--ruler", str(ruler)]
    assert main(arguments) == 0
    assert "reusing" not in capsys.readouterr().err
    for name in ("*-ruler-vt-window-prefill-*", "*-cell-snapkv-decode-*"):
        for path in (tmp_path / "results").glob(name):
            path.unlink()
    left = sorted(f"reusing {path}" for path in (tmp_path / "results").iterdir())
    assert main(arguments) == 0
    assert sorted(line for line in capsys.readouterr().err.splitlines() if "reusing" in line) == left


def test_what_a_process_meets_ends_the_command(corpus: Path, runs: list[str], tmp_path: Path) -> None:
    config = FrontierConfig(lengths=[1], device="cpu", processes=2)
    work = Work([str(tmp_path / "nowhere"), runs[1]], corpus, tmp_path, config)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        measure_beside(work, [("window", "prefill", 1, 0.5)] * 2)


@pytest.mark.parametrize(("code", "told"), [(-9, "was killed, as for want of memory"), (1, "ended with a traceback")])
def test_a_process_that_was_ended_is_told(code: int, told: str) -> None:
    running = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=code)]
    with pytest.raises(ValueError, match=f"one of the 3 processes of --processes {told}: .* with fewer goes on"):
        _raise_failure(running, SimpleNamespace(empty=lambda: True))
    _raise_failure(running[:2], SimpleNamespace(empty=lambda: True))


def test_what_a_process_says_comes_before_its_end() -> None:
    said = deque(["no memory"])
    errors = SimpleNamespace(empty=lambda: not said, get=said.popleft)
    with pytest.raises(ValueError, match="^no memory$"):
        _raise_failure([SimpleNamespace(exitcode=1)], errors)


def test_each_place_is_taken_once() -> None:
    places: list[Any] = [("window", "prefill", 1, 0.5), ("quest", "decode", 1, 0.5)]
    taken = Value("l", 0)
    assert [_take(places, taken) for _ in range(4)] == [*places, None, None]
