#!/usr/bin/env bash
# torch 2.13.0 (CPU or CUDA). Guess: a custom backward marked @once_differentiable makes torch raise when somebody
# differentiates twice. Seen: it raises only where the gradient that comes in requires grad itself. Behind a plain sum that
# gradient is a constant, and the second derivative of x**3 + x**2 at 2 is 2 instead of 14, without error or warning: the
# custom function's part is missing.
# Output seen:
#   first 16.0 (true 16), second 2.0 (true 14)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


x = torch.tensor(2.0, requires_grad=True)
(first,) = torch.autograd.grad(Cube.apply(x) + x**2, x, create_graph=True)
(second,) = torch.autograd.grad(first, x)
print(f"first {first.item()} (true 16), second {second.item()} (true 14)")
assert first.item() == 16.0 and second.item() == 2.0, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py"
