"""Makes an entmax run of a softmax run: the same weights, and queries scaled head by head so that outputs stay close.

    python -m eval.to_entmax RUN --data FOLDER --alpha 1.5 --output runs/entmax

alpha-entmax of softmax's own scores is far too sharp. For each head the factor of its scores is found with which
entmax's outputs come closest to softmax's, in squares, over windows of the corpus's train split; it goes into the
projection of that head's queries. Where queries are normalised by head, which undoes such factors, one for all heads of
a layer goes into the norm's weight. Then each layer's projection of outputs is fitted to what is left, by least squares
over the same windows (--refit false leaves it). OUTPUT is a run folder of step 0, for `train.py --init_from` (with
configs/stages/converted.yaml) and the commands of eval.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.command_line import CommandParser
from common.errors import UsageError
from common.new_folder import check_new, written_aside
from common.outputs import check_writable
from data.tokenizer import load_tokenizer
from eval.common.calibrating import calibrating_parser, open_calibrating, run_calibrating
from eval.common.options import check_least
from eval.common.windows import choose_windows
from model.checkpoint import NETWORK, CheckpointInfo
from model.config import AttentionConfig, ModelConfig
from model.hub.run_folder import write_run
from model.softmax_to_entmax import LARGEST_FACTOR, SMALLEST_FACTOR, ConvertedLayer, converted_weights, find_factors

GIB = 2**30


@dataclass(frozen=True)
class ConversionConfig:
    """How factors are found.

    Args:
        alpha: Of all heads; more than 1.01 and less than 2, where training may move it.
        samples: Windows that are looked at, all at once.
        length: Tokens of a window. None takes the checkpoint's training length, 2,048 at most.
        seed: Of the choice of windows.
        refit: Whether projections of attention's outputs are fitted anew, as far as that serves tokens they were not
            fitted to; that takes more than one window.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
    """

    alpha: float = 1.5
    samples: int = 8
    length: int | None = None
    seed: int = 0
    refit: bool = True
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_least(self, {"samples": 1, "length": 16, "seed": 0})
        bounds = AttentionConfig(kind="entmax")  # of a learned alpha
        if not bounds.alpha_min < self.alpha < bounds.alpha_max:
            raise ValueError(
                f"alpha is {self.alpha}: expected more than {bounds.alpha_min}, less than {bounds.alpha_max}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""
    return run_calibrating(to_entmax, ConversionConfig, _parser(), arguments, "nothing is written")


def _parser() -> CommandParser:
    parser = calibrating_parser("to_entmax", __doc__, required=True, help="a new run folder")
    parser.add_class_arguments(ConversionConfig)
    return parser


def to_entmax(run: str, data: Path, output: Path, config: ConversionConfig) -> list[str]:
    """Writes the run folder `output`. Returns the lines of a table.

    Raises FileNotFoundError, ValueError: what cannot be converted, and the way out.
    """

    def check(found: CheckpointInfo) -> None:
        check_new(output, "--output", outside=[found.belongings, data])
        check_writable(output.resolve().parent)
        if (kind := found.architecture.attention.kind) != "softmax":
            raise UsageError(f"{run} has attention {kind}: expected a softmax model")

    opened = open_calibrating(run, data, config.device, config.precision, check)
    loaded, store = opened.loaded, opened.store("train")
    length = config.length or min(loaded.training_length, 2048)
    if length > loaded.training_length:
        raise UsageError(f"length is {length}: expected at most the training length, {loaded.training_length} tokens")
    windows = choose_windows(store, length, config.samples, config.seed)
    if not windows:
        raise UsageError(f"{data}/train has no document of {length} tokens: pass a smaller --length")
    refit = config.refit and len(windows) > 1
    _check_memory(loaded.config, len(windows), length, refit, opened.device)
    tokens, precision = opened.tokens(store, windows, length), opened.runtime(length).precision()
    with tqdm(total=loaded.config.n_layers, desc="factors, by layer", leave=False) as bar:
        layers = find_factors(loaded.model, tokens, config.alpha, precision, refit, bar.update)
    _check_finite(layers)
    attention = AttentionConfig(kind="entmax", alpha=config.alpha, learn_alpha=True)
    network = replace(loaded.config, attention=attention)
    weights = converted_weights(loaded.model, network, layers)
    tokenizer = load_tokenizer(store.tokenizer_path)
    with written_aside(output, "--output") as aside:
        write_run(
            aside, output, network, weights, tokenizer,
            length=loaded.training_length, source=f"{opened.checkpoint}, softmax as alpha-entmax",
        )  # fmt: skip
    stay = ["one window: projections of outputs stay, as a fit to it could be judged by itself alone"]
    return [*table(layers), *bounded(layers), *(stay if config.refit and not refit else []),
            f"{output}: alpha {config.alpha}, {len(windows)} windows of {length:,} tokens",
            f"train with it: train.py --config {output / NETWORK} --config configs/stages/converted.yaml "
            f"--init_from {output} ..."]  # fmt: skip


def _check_finite(layers: Sequence[ConvertedLayer]) -> None:
    """Raises UsageError for a layer whose attention overflows."""
    for number, layer in enumerate(layers):
        if not bool(layer.error.isfinite().all()):
            raise UsageError(
                f"attention's outputs of layer {number} are not finite on these windows: expected weights that a pass "
                "does not overflow with; if --precision is bfloat16, try float32"
            )


def _memory(device: torch.device) -> int:
    """Bytes of the device: free ones of a GPU, the machine's for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(network: ModelConfig, windows: int, length: int, refit: bool, device: torch.device) -> None:
    """Raises UsageError for more tokens than the device can hold: a system that runs out of memory kills unrelated
    programs."""
    channels = network.n_heads * network.head_size
    width = 4 * network.d_model + 3 * network.d_ff + (20 if refit else 8) * channels  # alive at once
    products = 10 * 8 * channels**2 if refit else 0
    needed, there = 4 * windows * length * width + products, _memory(device)
    if needed > there:
        raise UsageError(
            f"{windows:,} windows of {length:,} tokens need about {needed / GIB:,.1f} GiB, all at once, and {device} "
            f"has {there / GIB:,.1f}: pass at most --samples {max(1, windows * there // needed)}, or a smaller --length"
        )


def table(layers: Sequence[ConvertedLayer]) -> list[str]:
    """One line a layer. Errors: mean over heads; behind them, of the layer's projected outputs, before and after these
    were fitted, each half of the tokens under a fit to the other half."""
    lines = ["layer  factor: least, median, most   error at factor 1   error   keys with weight"]
    if layers[0].refit is not None:
        lines[0] += "   projected: error, refitted"
    for number, one in enumerate(layers):
        low, middle, high = (float(one.factor.quantile(share)) for share in (0, 0.5, 1))
        lines.append(
            f"{number:>5}  {low:13.2f}  {middle:6.2f}  {high:4.2f}   {float(one.error_at_1.mean()):17.3f}   "
            f"{float(one.error.mean()):5.3f}   {float(one.keys.mean()):16.1f}"
            + ("" if one.refit is None else f"   {one.refit.error_before:16.4f}   {one.refit.error:8.4f}")
        )
    return lines


def bounded(layers: Sequence[ConvertedLayer]) -> list[str]:
    """A line about the heads for which the search ended at a bound, if any did."""
    heads = [
        f"{number}.{head}" for number, one in enumerate(layers) for head in one.at_bound.nonzero().flatten().tolist()
    ]
    if not heads:
        return []
    more = f" and {len(heads) - 8} more" if len(heads) > 8 else ""
    return [f"the search ended at a bound of {SMALLEST_FACTOR:.4f} to {LARGEST_FACTOR:.0f} for layer.head "
            f"{', '.join(heads[:8])}{more}: compare perplexities before and after"]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
