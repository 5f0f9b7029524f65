"""What make gives to the commands it runs."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_bytecode_is_kept_whatever_the_environment_says() -> None:
    """A process of a command starts in a third of the time with it."""
    rule = "bytecode: ; @echo [$$PYTHONDONTWRITEBYTECODE]"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["make", "--eval", rule, "bytecode"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
