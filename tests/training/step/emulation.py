"""FP8 products on CPUs, which train.py refuses there."""

import torch

import training.step.float8


def emulate(on: bool = True) -> None:
    """Convert linears to emulated products in this process. torchao's linears ask for CUDA's autocast, whatever device
    they are on: it is on too."""
    training.step.float8.EMULATED = on
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", on)
