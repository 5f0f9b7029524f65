"""Throughput numbers and the clock behind them."""

import pytest
import torch

from training import throughput
from training.throughput import StepClock, peak_memory_gib, speed_metrics


def test_speed_metrics() -> None:
    metrics = speed_metrics(tokens=8000, flops=4e12, steps=4, seconds=2.0, devices=2, peak=1e13)
    assert metrics == {
        "throughput/tokens_per_second": 4000.0,
        "throughput/tokens_per_second_per_device": 2000.0,
        "throughput/step_seconds": 0.5,
        "throughput/mfu": pytest.approx(0.1),
    }


def test_mfu_is_left_out_where_the_peak_is_unknown() -> None:
    assert "throughput/mfu" not in speed_metrics(tokens=1, flops=1, steps=1, seconds=1.0, devices=1, peak=None)


class Hands:
    """A time that goes on only where a test says so."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(throughput, "time", hands)
    return hands


def test_the_clock_leaves_out_pauses(hands: Hands) -> None:
    clock = StepClock()
    hands.now += 2
    with clock.paused():
        hands.now += 30
    hands.now += 1
    assert clock.seconds() == 3
    clock.reset()
    assert clock.seconds() == 0


def test_a_pause_ends_when_its_work_fails(hands: Hands) -> None:
    clock = StepClock()
    with pytest.raises(RuntimeError), clock.paused():
        hands.now += 20
        raise RuntimeError
    hands.now += 1
    assert clock.seconds() == 1


def test_peak_memory_of_the_process_counts_what_was_allocated() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(2**28, dtype=torch.uint8)  # 256 MiB
    assert block.numel() and peak_memory_gib(torch.device("cpu")) >= max(before, 0.25)
