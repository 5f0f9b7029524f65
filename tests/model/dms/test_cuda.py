"""FlexAttention, compiled, with gradients into decisions, and over tiles that eviction leaves, against masks; needs a
CUDA device."""

import pytest
import torch
from torch import Tensor

import model.dms.attention
from model.config import DMSConfig
from model.dms.attention import DynamicMemorySparsification
from tests.model.dms.looped import module, network
from tests.model.sparse_inputs import DOCUMENTS, SLOPES, draw, longest, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_outputs_and_gradients(
    documents: Tensor | None,
    slopes: Tensor | None,
    training: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlexAttention's error against float64 is at most twice (of gradients three times) that of masks in its dtype.
    Logits are float32's in both, as in a model: what is evicted turns on their rounding."""
    config = network(DMSConfig(window=100, scale=2.0, offset=-0.5), head_dim=32)
    layer, device = module(config).cuda().train(training), torch.device("cuda")
    x, *inputs = (one.cuda() for one in draw(1536, config))
    cotangent = torch.randn(1, 4, 1536, 32, dtype=torch.float64, device=device)
    bounds, slopes = (None if one is None else one.cuda() for one in (documents, slopes))

    def run(flex: bool, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(model.dms.attention, "uses_flex", lambda *_: flex)
        made = DynamicMemorySparsification.metadata(config, 1536, bounds, longest(1536, documents), device)
        leaves = [one.to(dtype).requires_grad_() for one in inputs]
        weight = layer.eviction.weight
        out = layer(x.to(torch.promote_types(dtype, torch.float32)), *leaves, made, slopes)
        wanted = [*leaves, weight] if training else leaves
        return [out.detach(), *torch.autograd.grad(out, wanted, cotangent.to(dtype))]

    truth = run(False, torch.float64)
    for i, (ours, plain, exact) in enumerate(zip(run(True, dtype), run(False, dtype), truth, strict=True)):
        limit = max((3 if i else 2) * relative(plain, exact), 4 * torch.finfo(dtype).eps)
        assert relative(ours, exact) <= limit, i


@torch.no_grad()
def test_noise_is_that_of_the_cpu() -> None:
    """Products of 64 bits wrap alike; logarithms may differ by a unit in the last place."""
    numbers = torch.arange(4096)[None] * 977 + 2**40
    here = model.dms.attention.logistic_noise(numbers, 5, 8)
    there = model.dms.attention.logistic_noise(numbers.cuda(), 5, 8).cpu()
    torch.testing.assert_close(there, here, rtol=1e-14, atol=1e-14)
