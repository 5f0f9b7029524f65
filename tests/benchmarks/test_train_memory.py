"""The memory benchmark's cases train; its measurement needs a GPU."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import train_memory
from benchmarks.train_memory import MODES, make_setup, network_of, train
from common.errors import UsageError
from training.memory.estimate import estimate


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("attention", ["softmax", "asentmax"])
@pytest.mark.parametrize("mode", MODES)
def test_every_case_trains(mode: str, attention: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODES[mode], "mlp_tile_tokens", 24 if "tiled" in mode else 0)
    network = replace(network_of("smoke", attention), n_layers=2, d_model=32, d_ff=48, vocab_size=64)
    setup = make_setup(network, 64, mode, torch.device("cpu"), ranks)
    assert math.isfinite(train(setup, torch.device("cpu"))) and estimate(setup).total > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_memory"])
    with pytest.raises(UsageError, match="no CUDA device"):
        train_memory.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_estimates_are_near_measured_peaks() -> None:
    device = torch.device("cuda")
    for mode in MODES:
        setup = make_setup(network_of("30m", "asentmax"), 8192, mode, device)
        assert 0.8 < estimate(setup).total / train_memory.measure(setup, device) < 1.25, mode
