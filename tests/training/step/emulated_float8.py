"""Emulates FP8 in a process of train.py, which imports this file to find a callback."""

from lightning.pytorch import Callback

from tests.training.step.emulation import emulate

emulate()


class Emulated(Callback):
    """Does nothing."""
