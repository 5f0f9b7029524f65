"""The kernels, with gradients into blocks' weights, against masks; needs a CUDA device."""

import pytest
import torch
from torch import Tensor

import model.hierarchical.attention
from model.hierarchical.attention import HierarchicalEntmax
from tests.kernels.helpers import weight_rounding
from tests.model.hierarchical.looped import draw, network
from tests.model.sparse_inputs import DOCUMENTS, SLOPES, longest, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_outputs_and_gradients(
    documents: Tensor | None, slopes: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' error against float64 is at most twice (of gradients three times) that of masks in its dtype, and in
    float32 what CUDA's powers lose."""
    config, device = network(64, head_dim=32), torch.device("cuda")
    layer = HierarchicalEntmax(config, 0)
    inputs = [torch.cat([x] * 4, dim=-1).to(device) for x in draw(1536, scale=6.0)]
    inputs.append(torch.tensor([1.1, 1.5, 1.75, 1.9], dtype=torch.float64, device=device))
    cotangent = torch.randn(1, 4, 1536, 32, dtype=torch.float64, device=device)
    bounds, slopes = (None if x is None else x.to(device) for x in (documents, slopes))
    blocks = HierarchicalEntmax.metadata(config, 1536, bounds, longest(1536, documents), device)
    q, k, _, alpha = inputs
    visible = blocks.visible(torch.arange(1536, device=device))[:, None]
    dead = (layer.choose(q, k, blocks, slopes, alpha) == -torch.inf) & visible
    assert 0.3 < float(dead.sum() / (4 * visible.sum())) < 0.95

    def run(kernels: bool, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(model.hierarchical.attention, "runs_on_triton", lambda _: kernels)
        leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
        leaves.append(alpha.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        out = layer(torch.empty(0), *leaves[:3], blocks, slopes, alpha=leaves[3])
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    truth = run(False, torch.float64)
    powers = weight_rounding(1536) if dtype == torch.float32 else 0
    for i, (ours, plain, exact) in enumerate(zip(run(True, dtype), run(False, dtype), truth, strict=True)):
        limit = max((3 if i else 2) * relative(plain, exact), 4 * torch.finfo(dtype).eps)
        assert relative(ours, exact) <= limit + powers, i
