#!/usr/bin/env bash
# torch 2.13.0 (CPU or CUDA). Guess: selective activation checkpointing keeps the results of the operators it is told to
# keep, and all else is computed again, whatever it is. Seen: backward raises RuntimeError where the second run calls an
# operator more often than the first, also one that nobody asked to keep: here a weight is made before the block runs
# first and within it the second time, as DeepSpeed's ZeRO stage 3 gathers weights. Without a context_fn the same block
# trains, and torch 2.11's selective contexts let it pass too.
# Output seen:
#   plain: gradient 2.0
#   selective: aten.ones.default encountered during backward but not found in storage. This can happen if the opera [...]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

weight: list[torch.Tensor] = []


def block(x):
    if not weight:  # gone, as after a forward pass
        weight.append(torch.ones(()))
    return (x * x).mul(weight.pop())


def gradient(**options):
    x = torch.tensor(1.0, requires_grad=True)
    weight[:] = [torch.ones(())]  # gathered in advance
    checkpoint(block, x, use_reentrant=False, **options).backward()
    return x.grad.item()


print("plain: gradient", gradient())
try:
    gradient(context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.sin.default]))
except RuntimeError as error:
    print("selective:", str(error)[:100], "[...]")
    assert "encountered during backward but not found in storage" in str(error)
else:
    raise AssertionError("the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/run.py"
