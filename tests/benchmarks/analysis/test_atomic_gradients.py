"""benchmarks.analysis.atomic_gradients: that what it times computes gradients."""

import pytest
import torch

from benchmarks.analysis.atomic_gradients import NONE, RED, TMA, launch, main
from tests.kernels.helpers import CUDA, DEVICE, draw, needs_triton


@pytest.mark.parametrize("mode", [NONE, RED, *([TMA] if CUDA else [])])
@pytest.mark.parametrize("tile", [(64, 64, 4), (64, 128, 4), (128, 128, 8)])
class TestLaunch:
    pytestmark = needs_triton

    def test_gradients_of_the_tiles_below_the_diagonal(self, mode: int, tile: tuple[int, int, int]) -> None:
        q, k = (draw(2, 256, 16, seed=seed, dtype=torch.float16) for seed in (0, 1))
        dk, dq = (torch.zeros_like(q, dtype=torch.float32) for _ in range(2))
        launch(q, k, dk, dq, mode, tile)
        block_of_query = torch.arange(256, device=DEVICE)[:, None] // tile[0]
        first_block = torch.arange(256, device=DEVICE) // tile[1] * tile[1] // tile[0]
        ds = (q.float() @ k.float().mT).half().float() * (block_of_query >= first_block)
        # a score between two numbers of 16 bits may round to the other one
        rounding = dict(rtol=1e-5, atol=torch.finfo(q.dtype).eps * ds.max().item() * q.max().item())
        torch.testing.assert_close(dk, ds.mT @ q.float(), **rounding)
        torch.testing.assert_close(dq, ds @ k.float() if mode else torch.zeros_like(dq), **rounding)


@pytest.mark.skipif(CUDA, reason="for machines without one")
def test_without_a_device_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device was found")
