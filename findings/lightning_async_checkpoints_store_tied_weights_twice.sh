#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0. Guess: AsyncCheckpointIO decides when a checkpoint is written, so that the file is the one that the
# Trainer writes without it. Seen: it clones each tensor of the checkpoint by itself. Weights that share memory (an output head tied to
# the embedding) share none afterwards: the file holds them once for each name, and so does the copy in memory while it is written.
# Output seen:
#   without: 5123369 bytes, 1 storage
#   with AsyncCheckpointIO: 10243429 bytes, 2 storages
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6
cat >"$folder/run.py" <<'PY'
import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn


class Tied(LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20_000, 64)
        self.head = nn.Linear(64, 20_000, bias=False)
        self.head.weight = self.embedding.weight

    def training_step(self, batch, index):
        return self.head(self.embedding(batch)).logsumexp(-1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def saved(name, plugins):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    folder = Path(sys.argv[1])
    trainer = Trainer(max_steps=1, accelerator="cpu", plugins=plugins, default_root_dir=folder, **quiet)
    trainer.fit(Tied(), torch.utils.data.DataLoader(torch.randint(20_000, (4, 8)), batch_size=4))
    path = folder / f"{name}.ckpt"
    trainer.save_checkpoint(path)
    for plugin in plugins:
        plugin.teardown()  # waits for the writer
    weights = torch.load(path, weights_only=False)["state_dict"]
    return path.stat().st_size, len({x.untyped_storage().data_ptr() for x in weights.values()})


plain, threaded = saved("plain", []), saved("threaded", [AsyncCheckpointIO()])
print(f"without: {plain[0]} bytes, {plain[1]} storage")
print(f"with AsyncCheckpointIO: {threaded[0]} bytes, {threaded[1]} storages")
assert (plain[1], threaded[1]) == (1, 2) and threaded[0] > 1.9 * plain[0], "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null
