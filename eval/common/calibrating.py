"""What commands share that calibrate sparse attention for one checkpoint, over windows of a prepared corpus."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UsageError
from data.store import TokenStore
from eval.common.options import check_output_file
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, check_tokenizer, choose_autocast, choose_device
from eval.common.windows import choose_windows
from model.checkpoint import resolve_checkpoint
from model.loading import LoadedModel, load_model

Windows = Sequence[tuple[int, int]]  # document and first token


@dataclass(frozen=True)
class Calibrating:
    """A checkpoint and the corpus that it is calibrated on."""

    loaded: LoadedModel
    checkpoint: Path
    data: Path
    device: torch.device
    autocast: torch.dtype | None

    def store(self, split: str) -> TokenStore:
        return TokenStore(self.data / split, verify="size")

    def train_windows(self, length: int, samples: int, seed: int, options: str) -> Windows:
        """Of the train split. options: that make fewer or shorter ones do. Raises ValueError for too few."""
        windows = choose_windows(self.store("train"), length, samples, seed)
        if len(windows) < samples:
            raise ValueError(
                f"{self.data}/train has {len(windows)} windows of {length} tokens within documents, fewer than the "
                f"{samples} samples: pass a smaller {options}"
            )
        return windows

    @torch.no_grad()
    def read(self, split: str, windows: Windows, length: int, doing: str) -> None:
        """The model's forward pass over each window."""
        store, runtime = self.store(split), Runtime(self.device, self.autocast, length)
        for document, start in tqdm(windows, desc=doing, leave=False):
            tokens = torch.from_numpy(store.document(document)[start : start + length].astype(np.int64))
            with runtime.precision():
                self.loaded.model(tokens.to(self.device)[None])


def open_calibrating(
    run: str, data: Path, output: Path, read: Callable[[Path], object], device: str, precision: str
) -> Calibrating:
    """read: of the files that the command writes, of which `output` may be an older one.

    Raises: FileNotFoundError, ValueError: what cannot be calibrated, and the way out.
    """
    chosen = choose_device(device)
    found = resolve_checkpoint(run)
    subject = Subject(found.path.name, found)
    check_output_file(output)
    if output.exists():
        try:
            read(output)
        except ValueError as error:
            raise UsageError(f"--output {output} is a file of something else: choose another name") from error
    loaded = load_model(found.path, chosen)
    opened = Calibrating(loaded, found.path, data, chosen, choose_autocast(precision, subject, chosen))
    check_tokenizer(subject, data, opened.store("train"))
    return opened
