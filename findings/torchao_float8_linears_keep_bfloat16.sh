#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0. Guess: a linear that multiplies in FP8 keeps its operand in FP8 for backward, as Transformer Engine does, so
# that activations take half of bfloat16's memory. Seen: it keeps the bfloat16 input and rounds it again in backward, with every recipe:
# eager training in FP8 saves no activation memory. (torch.compile may choose to keep the rounded copy.)
# Output seen:
#   nn.Linear keeps 8388608 bytes for backward, of torch.bfloat16
#   tensorwise keeps 8388608 bytes for backward, of torch.bfloat16
#   rowwise keeps 8388608 bytes for backward, of torch.bfloat16
#   rowwise_with_gw_hp keeps 8388608 bytes for backward, of torch.bfloat16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0
cat >"$folder/run.py" <<'PY'
import logging
from dataclasses import replace

logging.disable(logging.WARNING)  # of extensions that this does not need

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training


def kept(model, x):
    """Dtype and bytes of each storage that forward keeps, parameters apart."""
    parameters, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = (tensor.dtype, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum().backward()
    return list(found.values())


x = torch.randn(4096, 1024, dtype=torch.bfloat16, requires_grad=True)
for recipe in (None, "tensorwise", "rowwise", "rowwise_with_gw_hp"):
    model = nn.Sequential(nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16))
    if recipe:  # emulated: the same module, with products that any device has
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        convert_to_float8_training(model, config=config)
    ((dtype, size),) = kept(model, x)
    print(f"{recipe or 'nn.Linear'} keeps {size} bytes for backward, of {dtype}")
    assert (dtype, size) == (torch.bfloat16, 2 * x.numel()), "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
