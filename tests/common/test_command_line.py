"""Parsers of the commands: errors of a config file name it, a key that is there twice and an empty text are refused,
what is given whole takes nothing from an earlier file, and messages say what to do."""

from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import pytest

from common.command_line import CommandParser, strict_yaml
from common.errors import UsageError, error_line


class Optimizer:
    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr


class Faster(Optimizer):
    def __init__(self, lr: float = 0.2, beta: float = 0.9) -> None:
        super().__init__(lr)


OPTIMIZERS = "Expected list[Optimizer], Optimizer or null, classes by name or import path"


class Reader:
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths


@dataclass
class Source:
    path: str
    weight: float = 1.0


def parser() -> CommandParser:
    made = CommandParser(prog="x", may_be_empty=["prompt"])
    made.add_argument("runs", type=str, nargs="*")
    made.add_argument("--prompt", type=str, default="")
    made.add_argument("--sources", type=list[Source], default=[])
    made.add_argument("--config", action="config")
    made.add_argument("--steps", type=int, default=1)
    made.add_argument("--optimizer", type=Optimizer)
    return made


def test_options_of_plain_types_and_of_classes_parse(tmp_path: Path) -> None:
    name = f"{__name__}.Optimizer"
    given = parser().parse_args(["--steps=3", f"--optimizer={name}", "--optimizer.lr=0.5"])
    assert given.steps == 3 and given.optimizer.init_args.lr == 0.5
    file = tmp_path / "a.yaml"
    file.write_text(f"steps: 4\noptimizer:\n  class_path: {name}\n")
    assert parser().parse_args(["--config", str(file)]).steps == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [("steps: [1", "line 1"), ("steps: 1\nsteps: 2\n", "the key steps is there twice, in lines 1 and 2"),
     ("steps: many\n", "many"), ("step: 3\n", "the key step is not an option .* nearest one is steps"),
     ("a: &a [*a]", "a has an alias to itself"), ("", "expected options.* found an empty file"),
     (f"steps: {2**63}\n", "steps is 9223372036854775808: expected a whole number of 64 bits")],
)  # fmt: skip
def test_what_is_wrong_in_a_config_file_names_it(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises((UsageError, ArgumentError), match=problem) as caught:
        parser().parse_args(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_a_key_that_is_there_twice_is_named_with_its_lines() -> None:
    strict_yaml()
    strict_yaml()  # once more changes nothing
    load = jsonargparse.get_loader("yaml")
    assert load("a: {b: 1}\nc: 2\n") == {"a": {"b": 1}, "c": 2}
    with pytest.raises(Exception, match=r"the key a.b is there twice, in lines 2 and 4: keep one of them"):
        load("a:\n  b: 1\n  c: 2\n  b: 3\n")


def test_numbers_that_fit_stay_what_they_are() -> None:
    name = f"{__name__}.Optimizer"
    given = parser().parse_args([f"--steps={2**63 - 1}", f"--optimizer={name}", "--optimizer.lr=3.4e38"])
    assert given.steps == 2**63 - 1 and given.optimizer.init_args.lr == 3.4e38


@pytest.mark.parametrize("lr", ["1e39", "-1e300", "1e-45"])
def test_numbers_that_float32_does_not_hold_are_refused_however_deep(lr: str) -> None:
    with pytest.raises((UsageError, ArgumentError), match=r"lr is .*: expected a number that float32 holds"):
        parser().parse_args([f"--optimizer={__name__}.Optimizer", f"--optimizer.lr={lr}"])


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file with a source and an optimizer."""
    path = tmp_path / "a.yaml"
    path.write_text(
        f"sources:\n- path: a\n  weight: 3\noptimizer:\n  class_path: {__name__}.Faster\n  init_args: {{lr: 7}}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--sources=[{path: b}]"], [("b", 1.0)]),
        (["--config=LATER"], [("b", 1.0)]),
        (["--sources.weight=5"], [("a", 5.0)]),
        (["--sources+={path: b}"], [("a", 3.0), ("b", 1.0)]),
        (["--sources=[]"], []),
    ],
)
def test_items_of_a_list_take_nothing_from_an_earlier_one(
    given: list[str], wanted: list[tuple[str, float]], file: str, tmp_path: Path
) -> None:
    (tmp_path / "later.yaml").write_text("sources:\n- path: b\n")
    given = [one.replace("LATER", str(tmp_path / "later.yaml")) for one in given]
    found = parser().parse_args(["--config", file, *given])
    assert [(source.path, source.weight) for source in found.sources] == wanted


@pytest.mark.parametrize("given", ["--sources=[{}]", "--sources=[{weight: 2}]"])
def test_what_is_needed_does_not_come_from_an_earlier_file(given: str, file: str) -> None:
    with pytest.raises((UsageError, ArgumentError), match="path"):
        parser().parse_args(["--config", file, given])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--optimizer=OURS.Optimizer"], {"lr": 0.1}),
        (["--optimizer={}"], {"lr": 0.1}),
        (["--optimizer={class_path: OURS.Optimizer}"], {"lr": 0.1}),
        (["--optimizer=OURS.Faster"], {"lr": 7, "beta": 0.9}),
        (["--optimizer.beta=0.5"], {"lr": 7, "beta": 0.5}),
    ],
)
def test_another_class_has_its_own_arguments(given: list[str], wanted: dict[str, float], file: str) -> None:
    found = parser().parse_args(["--config", file, *(one.replace("OURS", __name__) for one in given)])
    assert found.optimizer.init_args.as_dict() == wanted


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--sources=[{path: ''}]"], "--sources.path"),
        (["a", " "], "the argument runs"),
        (["--config=FILE"], "--sources.path"),
    ],
)
def test_an_empty_text_is_refused(given: list[str], name: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sources:\n- path: ''\n")
    with pytest.raises(UsageError, match=f"^{name} is empty: expected a path"):
        parser().parse_args([one.replace("FILE", str(tmp_path / "a.yaml")) for one in given])
    assert parser().parse_args(["--prompt="]).prompt == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "^runs and --data are needed: expected a value, none was given; add it"),
        (["a"], "^--data is needed: expected a value, none was given; add it"),
        (["a", "--data=b", "--sources=[{weight: 2}]"], "^sources lacks path, which it needs: give sources.path"),
        (["a", "--data=b", "--reader=OURS.Reader"], "^reader lacks paths, which it needs: give reader.paths"),
        (["a", "--data=b", "--stepz=3"], "^unrecognized arguments: --stepz=3; the nearest option is --steps"),
        (["a", "--data=b", "--steps=many"], "(?s)steps.*int.*many"),
        (["a", "--data=b", "--steps"], "^argument --steps: expected one argument"),
    ],
)
def test_what_is_missing_or_unknown_is_told_with_what_to_do(given: list[str], message: str) -> None:
    made = CommandParser(prog="x")
    made.add_argument("runs", type=str, nargs="+")
    made.add_argument("--data", type=str, required=True)
    made.add_argument("--steps", type=int, default=1)
    made.add_argument("--sources", type=list[Source], default=[])
    made.add_argument("--reader", type=Reader)
    with pytest.raises(UsageError, match=message) as caught:
        made.parse_args([one.replace("OURS", __name__) for one in given])
    assert str(caught.value).count("(--help lists all options)") == 1


@pytest.mark.parametrize(
    ("given", "wanted", "file"),
    [
        ("--chunk=abc", 'Parser key "chunk": Expected int or null. Got value: abc', False),
        ("--tokens=NaN", 'Parser key "tokens": Expected int, float or null. Got value: NaN', False),
        ("--tokens=[1, 2]", 'Parser key "tokens": Expected int, float or null. Got value: [1, 2]', True),
        ("--mode=fp7", """Parser key "mode": Expected 16, 'bf16', 'all' or bool. Got value: fp7""", False),
        ("--source.weight=x", """Parser key "source.weight": Expected a <class 'float'>. Got value: x""", False),
        ("--source=x", """Parser key "source": Expected Source's options or null. Got value: x""", False),
        ("--optimizers=x", f"""Parser key "optimizers": {OPTIMIZERS}. Got value: x""", False),
        ("--optimizers=[x]", f"""Parser key "optimizers": {OPTIMIZERS}. Got value: ['x']""", True),
        ("--form=x", """Parser key "form": Expected one of 'a', 'b'. Got value: x""", True),
        ("--sources=x", """Parser key "sources": Expected a <class 'list'>. Got value: x""", False),
    ],
)
def test_one_line_says_which_types_a_value_may_have(given: str, wanted: str, file: bool, tmp_path: Path) -> None:
    made = CommandParser(prog="x")
    made.add_argument("--config", action="config")
    made.add_argument("--chunk", type=int | None, default=None)
    made.add_argument("--tokens", type=int | float | None, default=None)
    made.add_argument("--source", type=Source | None, default=None)
    made.add_argument("--sources", type=list[Source], default=[])
    made.add_argument("--optimizers", type=list[Optimizer] | Optimizer | None, default=None)
    made.add_argument("--form", type=Literal["a", "b"], default="a")
    made.add_argument("--mode", type=Literal[16] | Literal["bf16", "all"] | bool, default=16)
    name = ""
    if file:
        config = tmp_path / "a.yaml"
        config.write_text(given.removeprefix("--").replace("=", ": "))
        given, name = f"--config={config}", f"{config}: "
    with pytest.raises(UsageError) as caught:
        made.parse_args([given])
    assert error_line(caught.value) == f"{name}{wanted} (--help lists all options)"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["OURS.Nope"], "Problem with given class_path 'OURS.Nope': module 'OURS' has no attribute 'Nope'"),
        (["OURS.Reader"], f"{OPTIMIZERS}. Got value: OURS.Reader"),
        (["OURS.Faster", "betaz=3"], "the key betaz is not an option of this command; the nearest one is beta"),
        (["OURS.Faster", "beta=x"], """Parser key "beta": Expected a <class 'float'>. Got value: x"""),
    ],
)
def test_one_line_says_what_is_wrong_inside_a_class(given: list[str], told: str) -> None:
    made = CommandParser(prog="x")
    made.add_argument("--optimizers", type=list[Optimizer] | Optimizer | None, default=None)
    kind, *arguments = (one.replace("OURS", __name__) for one in given)
    with pytest.raises(UsageError) as caught:
        made.parse_args([f"--optimizers={kind}", *(f"--optimizers.{one}" for one in arguments)])
    line = error_line(caught.value)
    assert line.startswith('Parser key "optimizers": ') and told.replace("OURS", __name__) in line
    assert "Subtypes" not in line and len(line) < 250
