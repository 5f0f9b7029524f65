#!/usr/bin/env bash
# torch 2.13.0 (CPU or CUDA). Guess: each module that `Module.compile` compiles may recompile torch._dynamo.config's
# recompile_limit times, 8. Seen: the count belongs to the code of `forward`, which all modules of a class share. Once one of
# them has met 8 shapes, another one, compiled by itself, is never compiled at all: it runs uncompiled from its first call on.
# So a frozen teacher beside a student of the same class, or training and validation, use up each other's recompilations.
# Output seen:
#   first module: 8 of 12 shapes compiled, second: 0 of 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch

graphs = []


def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def compiled_for(module, sizes):
    before = len(graphs)
    for size in sizes:
        module(torch.ones(size))
    return len(graphs) - before


first, second = Double(), Double()
for module in (first, second):
    module.compile(backend=backend, dynamic=False)
found = compiled_for(first, range(2, 14)), compiled_for(second, range(20, 23))
print(f"first module: {found[0]} of 12 shapes compiled, second: {found[1]} of 3")
assert found == (8, 0), "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
