#!/usr/bin/env bash
# jsonargparse 4.53.0. Guess: a subclass of ArgumentParser may fix a keyword argument in its __init__, as subclasses of argparse's
# parser do: class Quiet(ArgumentParser) with super().__init__(exit_on_error=False, **kwargs). Seen: it parses options of any
# plain type, so that it looks right. But for an argument whose type is a class, jsonargparse makes an inner parser of the outer
# one's type at parse time and hands it exit_on_error itself: Python's TypeError about two values comes back as an error of that
# argument, whatever value the user gave.
# Output seen:
#   plain option: 3
#   class-typed option: patched_init() got multiple values for keyword argument 'exit_on_error'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'jsonargparse[signatures]==4.53.0'
cat >"$folder/run.py" <<'PY'
from argparse import ArgumentError

from jsonargparse import ArgumentParser


class Quiet(ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, exit_on_error=False, **kwargs)


class Optimizer:
    def __init__(self, lr: float = 0.1):
        self.lr = lr


parser = Quiet()
parser.add_argument("--steps", type=int)
parser.add_argument("--optimizer", type=Optimizer)
print("plain option:", parser.parse_args(["--steps", "3"]).steps)
try:
    parser.parse_args(["--optimizer=Optimizer"])
    raise SystemExit("the behaviour has changed: a class-typed option parses")
except ArgumentError as error:
    text = str(error)
    wanted = "got multiple values for keyword argument 'exit_on_error'"
    assert wanted in text, f"the behaviour has changed: {text}"
    print("class-typed option:", "patched_init()", wanted)
PY
"$folder/venv/bin/python" "$folder/run.py"
