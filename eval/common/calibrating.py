"""What commands share that fit something to one checkpoint, over windows of a prepared corpus: their options, what is
opened, and passes over the windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import UsageError, run_command
from data.store import TokenStore
from eval.common.options import Config, check_output_file, config_of
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, check_tokenizer, choose_autocast, choose_device
from eval.common.windows import choose_windows
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.loading import LoadedModel, load_model

Windows = Sequence[tuple[int, int]]  # document and first token


def calibrating_parser(
    name: str, description: str | None, splits: str = "a train split", **output: Any
) -> CommandParser:
    """With the options that all have. splits: of --data; output: of add_argument."""
    parser = CommandParser(prog=f"python -m eval.{name}", description=description)
    parser.add_argument("run", type=str, help="run folder (newest complete checkpoint), checkpoint or export")
    parser.add_argument("--data", type=str, required=True, help=f"prepared corpus with {splits}")
    parser.add_argument("--output", type=str, **output)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    return parser


def run_calibrating(
    work: Callable[[str, Path, Path, Config], list[str]],
    config: type[Config],
    parser: CommandParser,
    arguments: Sequence[str] | None,
    lost: str,
) -> int:
    """Prints the lines of work(run, data, output, config). lost: what the line says that Ctrl-C ends in. Returns the
    exit code: 0, or 2 after one "error:" line on stderr."""

    def parse_and_work(given: list[str]) -> list[str]:
        options = parser.parse_args(given)
        return work(options.run, Path(options.data), Path(options.output), config_of(config, options))

    return run_command(parse_and_work, arguments, stopped=f"stopped by Ctrl-C: {lost}")


@dataclass(frozen=True)
class Calibrating:
    """A checkpoint and the corpus that something is fitted to it on."""

    loaded: LoadedModel
    checkpoint: Path
    data: Path
    device: torch.device
    autocast: torch.dtype | None

    def store(self, split: str) -> TokenStore:
        return TokenStore(self.data / split, verify="size")

    def tokens(self, store: TokenStore, windows: Windows, length: int) -> torch.Tensor:
        """int64 (windows, length), on the device. Raises UsageError for tokens that the model does not have."""
        vocab_size = self.loaded.config.vocab_size
        found = np.stack([store.document(number)[start : start + length] for number, start in windows])
        if (most := int(found.max())) >= vocab_size:
            raise UsageError(f"{store.folder} has token {most} of {vocab_size}: {store.way_out}")
        return torch.from_numpy(found.astype(np.int64)).to(self.device)

    def runtime(self, length: int) -> Runtime:
        return Runtime(self.device, self.autocast, length)

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
        store = self.store(split)
        for window in tqdm(windows, desc=doing, leave=False):
            tokens = self.tokens(store, [window], length)
            with self.runtime(length).precision():
                self.loaded.model(tokens)


def open_calibrating(
    run: str, data: Path, device: str, precision: str, check: Callable[[CheckpointInfo], object] = lambda _: None
) -> Calibrating:
    """check: raises for a checkpoint that is none to fit to, or an output that lies where it must not.

    Raises: FileNotFoundError, ValueError: what cannot be opened, and the way out, before the weights are read.
    """
    chosen, found = choose_device(device), resolve_checkpoint(run)
    check(found)
    subject = Subject(found.path.name, found)
    check_tokenizer(subject, data, TokenStore(data / "train", verify="size"))
    autocast = choose_autocast(precision, subject, chosen)
    return Calibrating(load_model(found.path, chosen), found.path, data, chosen, autocast)


def check_replaceable(output: Path, read: Callable[[Path], object]) -> None:
    """read: of the files that the command writes. Raises UsageError where `output` is something else."""
    check_output_file(output)
    if output.exists():
        try:
            read(output)
        except ValueError as error:
            raise UsageError(f"--output {output} is a file of something else: choose another name") from error
