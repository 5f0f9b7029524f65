"""What the suite "trained" counts and adds up."""

import pytest
import torch

from benchmarks.measure import Measurement, Timing
from benchmarks.trained import GRANULES, live_shares, position_free, summed
from benchmarks.workloads import Workload
from kernels.alpha_entmax.reference import entmax_reference
from tests.kernels.helpers import DEVICE, draw, needs_triton

SLOPES = [0.5, 0.0, 0.0, 0.0]


def layer(slopes: list[float] | None) -> Workload:
    """128 tokens, 4 query heads on 2 key heads."""
    q, k, v = draw(1, 4, 128, 16, size=2.0), draw(1, 2, 128, 16, seed=1), draw(1, 2, 128, 16, seed=2)
    alpha = torch.tensor([1.3, 1.5, 1.6, 1.9], device=DEVICE)
    given = None if slopes is None else torch.tensor(slopes, device=DEVICE)
    return Workload("layer", q, k, v, alpha=alpha.requires_grad_(), alibi_slopes=given)


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["no bias", "bias"])
@pytest.mark.skipif(*needs_triton[0].args, **needs_triton[0].kwargs)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_shares_are_those_of_dense_weights(slopes: list[float] | None) -> None:
    one = layer(slopes)
    keys = one.k.detach().double().repeat_interleave(2, 1)
    scores = one.q.detach().double() @ keys.mT / 4
    position = torch.arange(128, device=DEVICE)
    if one.alibi_slopes is not None:
        scores -= one.alibi_slopes.double()[:, None, None] * (position[:, None] - position)
    scores = scores.masked_fill(position > position[:, None], -torch.inf)
    assert isinstance(one.alpha, torch.Tensor)
    held = entmax_reference(scores, one.alpha.detach().double()[:, None, None])[0, :, 64:, :64] > 1e-9
    expected = {
        name: float(held.view(4, 64 // rows, rows, 64 // columns, columns).any(4).any(2).double().mean())
        for name, (rows, columns) in GRANULES.items()
    }
    assert live_shares(one) == pytest.approx(expected, abs=2 / (4 * 64 * 64))  # two pairs at the edge of support
    assert 0 < expected["pairs"] < expected["64x1"] < 1


def test_position_free_heads_keep_their_key_heads() -> None:
    one = layer([0.5, 0.25, 0.0, 0.0])
    free = position_free(one)
    assert free is not None and free.alibi_slopes is None
    assert torch.equal(free.q, one.q[:, 2:]) and torch.equal(free.k, one.k[:, 1:])
    apart = position_free(layer(SLOPES))  # one of three heads has a key head that the biased one shares
    assert apart is not None and torch.equal(apart.k, one.k[:, [0, 1, 1]])
    assert position_free(layer([0.5, 0.25, 0.125, 1.0])) is None and position_free(layer(None)) is not None


def test_layers_add_up() -> None:
    one = Measurement(Timing(1.0, 0.5, 2.0), Timing(0.25, 0.25, 0.25), 100, "without the ALiBi bias")
    found = summed([one, one, Measurement(Timing(3.0, 3.0, 3.0), None, 50)])
    assert found.both == Timing(5.0, 4.0, 7.0) and found.forward is None
    assert found.extra_bytes == 100 and found.note == "without the ALiBi bias"
