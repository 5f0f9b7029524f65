"""Parsers of the commands: errors of a config file name it, and a key that is there twice is refused."""

from argparse import ArgumentError
from pathlib import Path

import jsonargparse
import pytest

from common.command_line import CommandParser, refuse_duplicate_keys
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
     ("steps: many\n", "many")],
)  # fmt: skip
def test_what_is_wrong_in_a_config_file_names_it(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises((UsageError, ArgumentError), match=problem) as caught:
        parser().parse_args(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_a_key_that_is_there_twice_is_named_with_its_lines() -> None:
    refuse_duplicate_keys()
    refuse_duplicate_keys()  # once more changes nothing
    load = jsonargparse.get_loader("yaml")
    assert load("a: {b: 1}\nc: 2\n") == {"a": {"b": 1}, "c": 2}
    with pytest.raises(Exception, match=r"the key a.b is there twice, in lines 2 and 4: keep one of them"):
        load("a:\n  b: 1\n  c: 2\n  b: 3\n")
