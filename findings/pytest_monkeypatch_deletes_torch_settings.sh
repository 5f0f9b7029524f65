#!/usr/bin/env bash
# pytest 9.2.0 with torch 2.13.0. Guess: monkeypatch.setattr(torch._inductor.config, "compile_threads", 3) is undone to the value before.
# Seen: undoing deletes the setting (since 9.2 an attribute that does not stand in its owner's __dict__ counts as not set). Reading it
# raises AttributeError for the rest of the process, so that whatever is compiled in a later test fails far from the cause.
# torch._dynamo.config is alike. pytest 9.1.1 restores the value, and so does the modules' own patch(...).
# Output seen:
#   torch._inductor.config.compile_threads: 3 while patched, then AttributeError: torch._inductor.config.compile_threads does not exist
#   torch._dynamo.config.recompile_limit: 3 while patched, then AttributeError: torch._dynamo.config.recompile_limit does not exist
#   torch._dynamo.config.accumulated_recompile_limit by its own patch(): 3 while patched, then 256
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pytest==9.2.0
cat >"$folder/run.py" <<'PY'
import pytest
import torch._dynamo.config
import torch._inductor.config


def value(config, name):
    try:
        return getattr(config, name)
    except AttributeError as error:
        return f"AttributeError: {error}"


for config, name in ((torch._inductor.config, "compile_threads"), (torch._dynamo.config, "recompile_limit")):
    patch = pytest.MonkeyPatch()
    patch.setattr(config, name, 3)
    during = value(config, name)
    patch.undo()
    after = value(config, name)
    print(f"{config.__name__}.{name}: {during} while patched, then {after}")
    if during != 3 or "does not exist" not in str(after):
        raise SystemExit("the behaviour has changed")
config = torch._dynamo.config
before = config.accumulated_recompile_limit
with config.patch(accumulated_recompile_limit=3):
    during = config.accumulated_recompile_limit
after = config.accumulated_recompile_limit
print(f"torch._dynamo.config.accumulated_recompile_limit by its own patch(): {during} while patched, then {after}")
if (during, after) != (3, before):
    raise SystemExit("the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
