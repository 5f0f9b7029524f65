"""Parsers of the commands: errors of a config file name it, and a key that is there twice is refused."""

from argparse import ArgumentError
from pathlib import Path

import jsonargparse
import pytest

from common.command_line import CommandParser, strict_yaml
from common.errors import UsageError


class Optimizer:
    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr


def parser() -> CommandParser:
    made = CommandParser(prog="x")
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
