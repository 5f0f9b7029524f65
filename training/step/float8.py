"""FP8 matrix products of the blocks' linears, through torchao."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from model.transformer import Block

Float8 = Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
PRECISIONS = ("bf16-mixed", "bf16-true")  # whose products FP8 takes the place of
MULTIPLE = 16  # of the last two sizes of a product (torch._scaled_mm)
CAPABILITY = (8, 9)
EMULATED = False  # on any device, in float32 on operands rounded to FP8: for tests
INSTEAD = "or use model.float8 none"


class Converted(NamedTuple):
    """Numbers of linears in blocks."""

    float8: int
    all: int


def convert_linears(blocks: Sequence[Block], recipe: Float8) -> Converted:
    """Multiply in FP8 in the blocks' projections and feed-forward layers, in place.

    Parameters stay the same objects: names, dtypes, optimizers and checkpoints see no difference. Operands are rounded
    for each product, scaled by the largest magnitude of the tensor ("tensorwise"; gradients e5m2) or of each row (the
    "rowwise" ones; all e4m3), and products are summed up in float32; "rowwise_with_gw_hp" leaves the weights' gradients
    in bfloat16. Temperatures, the gates and phi of NSA, and linears with a size that 16 does not divide, stay as they
    are.

    Raises:
        ValueError: torchao is not installed, or no linear has sizes that fit.
    """
    check_installed(recipe)
    check_linears(recipe, blocks)
    with _without_warnings():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=EMULATED)
    converted, linears = 0, 0
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_fits, config=config)
        found = [module for module in block.modules() if isinstance(module, nn.Linear)]
        converted += sum(type(module) is not nn.Linear for module in found)
        linears += len(found)
    return Converted(converted, linears)


def check_linears(recipe: Float8, blocks: Iterable[Block]) -> None:
    """Raises ValueError where no linear of the blocks is multiplied with in FP8."""
    modules = (one for block in blocks for one in block.named_modules())
    if recipe != "none" and not any(_fits(module, name) for name, module in modules):
        raise ValueError(
            f"model.float8 is {recipe!r}, but no linear of the blocks has sizes that {MULTIPLE} divides: expected "
            f"such a d_model, {INSTEAD}"
        )


def _fits(module: nn.Module, name: str) -> bool:
    return fits(name, tuple(module.weight.shape)) if isinstance(module, nn.Linear) else False


def fits(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a block's matrix of this name and shape is multiplied with in FP8."""
    return not {"temperature", "sparse"} & set(name.split(".")) and all(size % MULTIPLE == 0 for size in shape)


def check_installed(recipe: Float8) -> None:
    """Raises ValueError where torchao is not."""
    if recipe != "none" and find_spec("torchao") is None:
        raise ValueError(f"model.float8 is {recipe!r}, but torchao is not installed: pip install torchao, {INSTEAD}")


def check_device(recipe: Float8, device: torch.device) -> None:
    """Raises ValueError for a device without FP8."""
    if recipe == "none" or EMULATED:
        return
    told = f"model.float8 is {recipe!r}, which needs a CUDA device of compute capability 8.9 or newer (Ada, Hopper)"
    if device.type != "cuda":
        raise ValueError(f"{told}, but the run is on {device.type}: use model.float8 none")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{told}, but {name} has {capability[0]}.{capability[1]}: use model.float8 none")


def check_products(recipe: Float8, *, precision: str, tokens: int, tile_tokens: int) -> None:
    """Raises ValueError for products that FP8 cannot take the place of.

    Args:
        precision: of the Trainer, by Lightning's name.
        tokens: of a micro-batch, of one rank.
        tile_tokens: as model.mlp_tile_tokens.
    """
    if recipe == "none":
        return
    told = f"model.float8 is {recipe!r}"
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision!r}, but {told}, in place of bfloat16: expected "
            f"{' or '.join(PRECISIONS)}, {INSTEAD}"
        )
    if recipe == "rowwise_with_gw_hp":
        return  # the weights' gradients are sums over tokens
    counts = {"data.micro_batch_size x data.sequence_length / parallel.sequence_parallel": tokens}
    for name, count in {**counts, "model.mlp_tile_tokens": tile_tokens}.items():
        if count % MULTIPLE:
            raise ValueError(f"{name} is {count}, but {told}: expected a multiple of {MULTIPLE}, {INSTEAD}")


@contextmanager
def _without_warnings() -> Any:
    """Torchao warns, when it is imported, of extensions that FP8 does not need and of its own use of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
