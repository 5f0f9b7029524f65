"""What a profile of a step says."""

import pytest
import torch

from benchmarks.step_profile import Kernel, kernel_lines, profile_step
from benchmarks.train_speed import Trial, network


def test_counts_what_ran_and_leaves_out_annotations() -> None:
    a = torch.randn(300, 300)

    def step() -> None:
        with torch.profiler.record_function("a part with a name"):
            torch.mm(a, a)
            torch.mm(a, a)
        torch.exp(a[0])

    step()
    kernels = profile_step(step, torch.device("cpu"))
    found = {kernel.name: kernel for kernel in kernels}
    assert found["aten::mm"].launches == 2 and found["aten::exp"].launches == 1
    assert "a part with a name" not in found
    times = [kernel.ms for kernel in kernels]
    assert kernels[0].name == "aten::mm" and times == sorted(times, reverse=True)


def test_lines_name_the_slowest_and_sum_all() -> None:
    kernels = [Kernel("x" * 200, 3.0, 7), Kernel("b", 2.0, 1), Kernel("c", 0.5, 1000)]
    lines = list(kernel_lines(kernels, 2))
    assert [line.split() for line in lines] == [
        ["5.50", "ms", "of", "kernels", "in", "1,008", "launches"],
        ["3.00", "ms", "7", "x", "x" * 100],
        ["2.00", "ms", "1", "x", "b"],
    ]


def test_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    Trial(network("smoke", "softmax"), "chunked", 1, {}).profile(96, 32, 3)
    first, *others = capsys.readouterr().out.splitlines()
    assert "ms of kernels in" in first and len(others) == 3
