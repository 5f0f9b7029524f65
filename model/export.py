"""Writes the weights of a checkpoint as a model of its own, in the files that the Hugging Face hub uses.

    python -m model.export runs/30m-asentmax exported/30m-asentmax --dtype bfloat16
    python -m model.export runs/smollm2 exported/smollm2 --format transformers

OUTPUT gets model.safetensors (in parts with model.safetensors.index.json where it is large) and config.json: the
architecture, the tokenizer's path and fingerprint, the training length. `model.loading.load_model` and eval.run
read it. With --format transformers `AutoModelForCausalLM` and `AutoTokenizer` load it: a softmax model without this
code, an entmax model after `import longsplash.hub`.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from common.command_line import CommandParser
from common.errors import run_command
from common.new_folder import check_new, written_aside
from model.checkpoint import EXPORT_CONFIG, CheckpointInfo, resolve_checkpoint, write_complete
from model.hub.files import save_weights
from model.hub.transformers_export import export_for_transformers
from model.loading import stored_weights

WRITTEN = ("format", "files", "tensors", "checksums", "checksum")  # by write_complete
Layout = Literal["longsplash", "transformers"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export(
    checkpoint: str | Path,
    output: str | Path,
    dtype: torch.dtype,
    shard_size: str = "5GB",
    layout: Layout = "longsplash",
) -> str:
    """Write the weights of `checkpoint`, in `dtype`, to the folder `output`; one tensor file holds at most shard_size.

    The folder is written aside and renamed: it is complete or not there.

    Returns:
        A line on what is there now.

    Raises:
        FileNotFoundError, ValueError: as model.checkpoint.resolve_checkpoint, `output` cannot take an export, or
            transformers has no such model.
        OSError: the disk refuses; nothing is left.
    """
    found, output = resolve_checkpoint(checkpoint), Path(output)
    check_output(found, output)
    if layout == "transformers":
        n_weights = export_for_transformers(found, output, dtype, shard_size)
    else:
        n_weights = _export(found, output, dtype, shard_size)
    files = list(output.iterdir())
    return (
        f"{output}: {n_weights:,} weights of {found.path} (step {found.step}) in {str(dtype).removeprefix('torch.')}, "
        f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB"
    )


def _export(found: CheckpointInfo, output: Path, dtype: torch.dtype, shard_size: str) -> int:
    """As `export` with layout longsplash. Returns the number of weights."""
    with written_aside(output) as aside:
        weights = {name: tensor.to(dtype) for name, tensor in stored_weights(found).items()}
        save_weights(weights, aside, output, shard_size)
        meta = {key: value for key, value in found.meta.items() if key not in WRITTEN}
        write_complete(aside, {**meta, "dtype": str(dtype).removeprefix("torch.")}, marker=EXPORT_CONFIG)
    return sum(map(torch.numel, weights.values()))


def check_output(checkpoint: CheckpointInfo, output: Path) -> None:
    """Raises UsageError for a folder that is not new, or inside the checkpoint or its run."""
    check_new(output, outside=[checkpoint.belongings])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        return [export(options.checkpoint, options.output, DTYPES[options.dtype], layout=options.format)]

    return run_command(work, arguments, stopped="stopped by Ctrl-C: nothing is written")


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m model.export", description=__doc__)
    parser.add_argument(
        "checkpoint", type=str, help="a run folder (its newest complete checkpoint) or one of its checkpoints"
    )
    parser.add_argument("output", type=str, help="a new folder")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the written weights")
    parser.add_argument(
        "--format", choices=get_args(Layout), default="longsplash",
        help="transformers: what AutoModelForCausalLM loads, with tokenizer and card; softmax needs positions rope",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
