#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0. Guess: an accelerator's parse_devices takes what Trainer(devices=) takes, "auto" included, and gives the
# devices. Seen: it raises for "auto", of two kinds; the Trainer replaces "auto" by auto_device_count() before it asks. (Here a multi-GPU
# run ended in "invalid literal for int()" with devices: auto, and with no other value, so that no test with a number of devices saw it.)
# Output seen:
#   Trainer with auto: 1 device
#   CPUAccelerator with auto: TypeError: `devices` selected with `CPUAccelerator` should be an int > 0.
#   CUDAAccelerator with auto: ValueError: invalid literal for int() with base 10: 'auto'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6
cat >"$folder/run.py" <<'PY'
import logging
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.INFO)

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

trainer = Trainer(accelerator="cpu", devices="auto", logger=False, enable_checkpointing=False)
print(f"Trainer with auto: {trainer.num_devices} device")
for accelerator in (CPUAccelerator, CUDAAccelerator):
    try:
        accelerator.parse_devices("auto")
    except (TypeError, ValueError) as error:
        print(f"{accelerator.__name__} with auto: {type(error).__name__}: {error}")
    else:
        raise SystemExit("the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
