"""Every command ends a user's error with exit code 2 and one line that names the value and what was expected."""

from pathlib import Path

import pytest

from tests.bad_input import checkpoints, data, evaluation, kernels, training
from tests.bad_input.cases import Call, Case, Place
from tests.training.conftest import TINY, child_environment, make_corpus
from tests.training.warm import Ended, warm_interpreter

AREAS = (training, checkpoints, data, evaluation, kernels)
NAMED = {f"{area.__name__.rpartition('.')[2]}: {row.name}": row for area in AREAS for row in area.CASES}
COMMANDS = {name: row for name, row in NAMED.items() if isinstance(row, Case)}
CALLS = {name: row for name, row in NAMED.items() if isinstance(row, Call)}
MODULES = (
    "data.prepare", "training.memory", "model.export", "eval.run", "eval.twins", "eval.generate",
    "eval.calibrate", "eval.length_generalisation", "eval.sparse_frontier", "eval.tasks", "eval.ruler",
)  # fmt: skip
PACKAGES = ("eval.length_generalisation", "eval.sparse_frontier", "eval.tasks", "eval.ruler")
IMPORTED = (*(f"{package}.command" for package in PACKAGES), "eval.tasks.evaluation", "attrs")  # takes seconds


def start(command: list[str], timeout: float, **environment: str) -> Ended:
    return warm_interpreter("train", "training.cli", *MODULES, *IMPORTED, quick=True).run(
        command, child_environment() | environment, timeout
    )


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Corpus and run of all cases that damage nothing."""
    folder = tmp_path_factory.mktemp("bad_input")
    corpus = make_corpus(folder / "corpus", seed=0)
    place = Place(corpus, folder / "run", folder / "tiny.yaml", folder)
    place.tiny.write_text(TINY.replace("CORPUS", str(corpus)))
    command = ["train.py", "--config", "{tiny}", "--run_dir", "{run}", "--trainer.max_steps", "10"]
    trained = start([place.fill(part) for part in command], 120)
    assert trained.returncode == 0, trained.stderr
    return place


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the lock that whoever may write there leaves."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_error_line(name: str, shared: Place, tmp_path: Path) -> None:
    case = COMMANDS[name]
    place = Place(shared.corpus, shared.run, shared.tiny, tmp_path)
    if case.damage:
        place = place.copied()
        case.damage(place)
    before = [contents(folder) for folder in (place.corpus, place.run)]

    ended = start([place.fill(part) for part in case.command], case.timeout, **case.environment)

    assert ended.returncode == 2, ended
    assert not ended.left, f"{ended.left} processes do not end: {ended}"
    *notes, line = ended.stderr.splitlines()
    assert line.startswith("error: ") and all(note.startswith(tuple(case.notes)) for note in notes), ended.stderr
    assert "Traceback" not in ended.stdout, ended.stdout
    missing = [part for part in map(place.fill, case.parts) if part not in line]
    assert not missing, f"{missing} not in {line}"
    assert [contents(folder) for folder in (place.corpus, place.run)] == before, "files have changed"


@pytest.mark.parametrize("name", CALLS)
def test_one_line_from_a_call(name: str) -> None:
    row = CALLS[name]
    with pytest.raises(row.raises) as caught:
        row.call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    missing = [part for part in row.parts if part not in message]
    assert not missing, f"{missing} not in {message}"


def test_every_command_and_a_hundred_cases() -> None:
    rows = [row for area in AREAS for row in area.CASES]
    assert len(NAMED) == len(rows), "a name stands twice in an area"
    assert all(row.parts for row in rows)
    first = {" ".join(case.command[: 1 + (case.command[0] == "-m")]) for case in COMMANDS.values()}
    assert first == {"train.py", *(f"-m {module}" for module in MODULES)}
    print(f"{len(COMMANDS)} commands and {len(CALLS)} calls")
    assert len(rows) >= 100
