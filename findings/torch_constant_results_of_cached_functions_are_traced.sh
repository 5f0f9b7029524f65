#!/usr/bin/env bash
# torch 2.13.0: torch.compiler.assume_constant_result on a function with functools.cache has no effect.
#
# Expected: the function is called while torch.compile traces, as any function so marked is, and its result is a
# constant of the graph: a cache on it only saves calls.
# Seen: torch.compile looks through the cache at the function within, which has no mark, and traces that. What cannot be
# traced (here: the time) ends the compilation. Marked first and cached then, it works, with a warning that the cache is
# ignored.
# So: keep results in a dict of your own, in a plain function that bears the mark (kernels/common/backends.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 \
    --extra-index-url https://download.pytorch.org/whl/cpu
cat > "$folder/show.py" <<'PY'
import time
import warnings
from functools import cache

import torch

warnings.simplefilter("ignore")


def year():
    return time.localtime().tm_year


kinds = {
    "marked": torch.compiler.assume_constant_result(lambda: year()),
    "cached, then marked": torch.compiler.assume_constant_result(cache(lambda: year())),
    "marked, then cached": cache(torch.compiler.assume_constant_result(lambda: year())),
}
found = {}
for name, function in kinds.items():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, function=function: x * function(), backend="eager", fullgraph=True)
    try:
        compiled(torch.ones(1))
        found[name] = "works"
    except torch._dynamo.exc.Unsupported:
        found[name] = "is traced"
print(torch.__version__.split("+")[0], found)
assert found == {"marked": "works", "cached, then marked": "is traced", "marked, then cached": "works"}
PY
"$folder/venv/bin/python" "$folder/show.py"
