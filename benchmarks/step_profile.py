"""Where the time of a training step goes: the kernels that take most of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Kernel:
    """ms: of all its launches in a step together."""

    name: str
    ms: float
    launches: int


def profile_step(step: Callable[[], None], device: torch.device) -> list[Kernel]:
    """Kernels of one step on a CUDA device (on a CPU: operators, without what they call), the slowest first. Times of
    streams that run at once add up. step: has run before, or what it compiles and allocates counts."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    found = [
        Kernel(event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.count)
        for event in record.key_averages()
        if not event.is_user_annotation
    ]
    return sorted((kernel for kernel in found if kernel.ms > 0), key=lambda kernel: -kernel.ms)


def kernel_lines(kernels: list[Kernel], count: int) -> Iterator[str]:
    """A line for all together and one for each of the `count` slowest, names cut to 100 characters."""
    yield f"{sum(one.ms for one in kernels):10.2f} ms of kernels in {sum(one.launches for one in kernels):,} launches"
    for one in kernels[:count]:
        yield f"{one.ms:10.2f} ms {one.launches:6,} x {one.name[:100]}"
