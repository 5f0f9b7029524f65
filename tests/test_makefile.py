"""What make gives to the commands it runs."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_bytecode_is_kept_whatever_the_environment_says() -> None:
    """A process of a command starts in less than half of the time with it."""
    rule = "bytecode: ; @echo [$$PYTHONDONTWRITEBYTECODE]"
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        ["make", "--eval", rule, "bytecode"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
