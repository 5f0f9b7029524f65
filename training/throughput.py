"""Time and work between two log lines: tokens per second, step time, MFU, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GIB = 2**30


class StepClock:
    """Seconds of training since the last reset, without what happened while paused (validation, saves, statistics)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def pause(self) -> None:
        synchronize()  # work queued on the GPU so far belongs to training
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        synchronize()
        self._start += time.perf_counter() - self._paused_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()


@dataclass
class Work:
    """What this process did since the last log line. Counted on the CPU: adding to it never waits for the device."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0


def speed_metrics(
    *, tokens: float, flops: float, steps: int, seconds: float, devices: int, peak: float | None
) -> dict[str, float]:
    """Throughput of a window.

    MFU = model FLOPs / (seconds * devices * peak), where the model FLOPs (model.flops.train_flops) count forward and
    backward of the documents in the batch, causal attention at half, without recomputation, and a teacher's forward
    pass where there is one, which the loss needs (model.flops.forward_flops), and peak is the dense peak
    of one device for the training dtype in FLOP/s (bfloat16's, where FP8 takes its place). It is left out where the
    peak is not known, as on CPUs.

    Args:
        tokens, flops: of the window, summed over all devices.
        steps, seconds: of the window.
    """
    metrics = {
        "throughput/tokens_per_second": tokens / seconds,
        "throughput/tokens_per_second_per_device": tokens / seconds / devices,
        "throughput/step_seconds": seconds / steps,
    }
    if peak is not None:
        metrics["throughput/mfu"] = flops / (seconds * devices * peak)
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory since the start: allocated by torch on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
