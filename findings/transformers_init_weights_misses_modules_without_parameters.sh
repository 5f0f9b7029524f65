#!/usr/bin/env bash
# transformers 5.23.0: a model of your own is not asked to initialise modules that hold no parameters themselves.
#
# Expected: `_init_weights(module)` is called for each module of a model, so that an attention or gate module can give
# its projections their start values there, as transformers' own models do.
# Seen: for a class outside of transformers it is called for modules with parameters or buffers of their own alone. A
# module that only holds a Linear is passed over, and the Linear's bias stays at 0; the same code placed on a module
# with one parameter works. Nothing says so.
# So: mark the Linear itself and look for the mark in `_init_weights` (longsplash/hub.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 \
    --extra-index-url https://download.pytorch.org/whl/cpu
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0
cat > "$folder/show.py" <<'PY'
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Gate(nn.Module):
    """Holds a Linear; with `own`, a parameter as well."""

    def __init__(self, own):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(())) if own else None


class Config(PreTrainedConfig):
    model_type = "gates"


class Gates(PreTrainedModel):
    config: Config

    def __init__(self, config):
        super().__init__(config)
        self.plain, self.with_parameter = Gate(False), Gate(True)
        self.asked = []
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Gate):
            self.asked.append(module)
            nn.init.constant_(module.linear.bias, -3.0)


model = Gates(Config())
found = {name: getattr(model, name).linear.bias[0].item() for name in ("plain", "with_parameter")}
print(transformers.__version__, found, f"asked for {len(model.asked)} of 2")
assert found == {"plain": 0.0, "with_parameter": -3.0} and len(model.asked) == 1
PY
"$folder/venv/bin/python" "$folder/show.py"
