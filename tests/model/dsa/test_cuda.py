"""Kernels that choose and learn, and FlexAttention, compiled, against masks; needs a CUDA device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import model.dsa.attention
from model.config import DSAConfig
from model.dsa.attention import DeepSeekSparseAttention, DSAMetadata
from model.dsa.indexer import IndexInputs, select_tokens
from model.dsa.tokens import packed_tokens
from model.sparse_attention import collected_auxiliary
from tests.kernels.helpers import weight_rounding
from tests.model.dsa.looped import module, network
from tests.model.sparse_inputs import DOCUMENTS, SLOPES, draw, longest, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_choose_what_masks_choose(dtype: torch.dtype, documents: Tensor | None) -> None:
    """Of scores that are exact, and often tie."""
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    sizes = (1, 3, 1536, 8), (1, 1536, 8), (1, 3, 1536)
    index = IndexInputs(*(torch.randint(-2, 3, size, generator=generator).to(device, dtype) for size in sizes))
    bounds = None if documents is None else documents.cuda()
    tokens = packed_tokens(1536, bounds, longest(1536, documents), device)
    bits = [select_tokens(index, tokens, 60, backend) for backend in ("triton", "torch")]
    assert torch.equal(*bits) and bits[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["sparse", "warmup"])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_outputs_and_gradients(
    documents: Tensor | None, slopes: Tensor | None, stage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error against float64 is at most twice (of gradients three times) that of masks in its dtype, as
    flash-attention's tests have it, and in float32 what CUDA's powers lose. The tokens are those that float64 chooses:
    which are best turns on rounding. The loss in float32 is left to tests/kernels/lightning_indexer: its gradients are
    differences of weights, which cancel."""
    config = network(DSAConfig(3, 8, 60, stage=stage), head_dim=32)  # type: ignore[arg-type]
    layer, device = module(config).cuda().train(), torch.device("cuda")
    x, *inputs = (x.cuda() for x in draw(1536, config))
    cotangent = torch.randn(1, 4, 1536, 32, dtype=torch.float64, device=device)
    bounds, slopes = (None if one is None else one.cuda() for one in (documents, slopes))
    flex = DeepSeekSparseAttention.metadata(config, 1536, bounds, longest(1536, documents), device)
    assert flex.flex and (flex.dense is None) == (stage == "sparse")
    chosen: list[Tensor] = []

    def selected(*arguments: object) -> Tensor:
        if not chosen:
            chosen.append(model_selection(*arguments))  # type: ignore[arg-type]
        return chosen[0]

    model_selection = model.dsa.attention.select_tokens
    monkeypatch.setattr(model.dsa.attention, "select_tokens", selected)

    def run(metadata: DSAMetadata, dtype: torch.dtype) -> list[Tensor]:
        layer.to(dtype)
        leaves = [one.to(dtype).requires_grad_() for one in inputs]
        with collected_auxiliary(layer) as losses:
            out = layer(x.to(dtype), *leaves, metadata, slopes)
        found = torch.autograd.grad(out, leaves, cotangent.to(dtype))
        return [out.detach(), *found, losses[0].detach(), *torch.autograd.grad(losses[0], list(layer.parameters()))]

    masked = replace(flex, flex=False, dense=None)
    checked = 4 if dtype == torch.float32 else None  # output, dq, dk, dv
    powers = weight_rounding(1536) if dtype == torch.float32 else 0
    # float64 first: it chooses the tokens, and the layer's weights are rounded after it
    truth, *found = (run(*given)[:checked] for given in ((masked, torch.float64), (flex, dtype), (masked, dtype)))
    for i, (ours, plain, exact) in enumerate(zip(*found, truth, strict=True)):
        limit = max((3 if i else 2) * relative(plain, exact), 4 * torch.finfo(dtype).eps)
        assert relative(ours, exact) <= limit + powers, i
