"""The branches by FlexAttention, compiled, and the kernel for selected blocks against masks; needs a CUDA device."""

import pytest
import torch
from torch import Tensor

import model.nsa.attention
from model.config import NSAConfig
from model.nsa.attention import NativeSparseAttention, NSAMetadata
from model.nsa.blocks import packed_blocks
from model.nsa.selection import block_scores, select_blocks
from tests.model.nsa.looped import module, network
from tests.model.sparse_inputs import DOCUMENTS, SLOPES, draw, longest, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_selected_blocks_are_the_best(documents: Tensor | None, slopes: Tensor | None, dtype: torch.dtype) -> None:
    """Each one chosen has an importance in float64 that none left out exceeds by more than float32 rounds it: scores to
    100, of which a weight has the relative error EPS * 100, and sums of two heads' weights up to 4."""
    config = NSAConfig(select_count=5)
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    bounds, slopes = (None if x is None else x.cuda() for x in (documents, slopes))
    blocks = packed_blocks(config, 1536, bounds, longest(1536, documents), device)
    q, k = (
        torch.randn(1, heads, n, 64, generator=generator, device=device).to(dtype)
        for heads, n in ((4, 1536), (2, len(blocks.first_key)))
    )
    chosen = select_blocks(q, k, blocks, slopes)
    scores = block_scores(q.double(), k.double(), blocks, slice(0, 1536), slopes, config.select_local)
    taken = torch.zeros(*scores.shape[:3], blocks.n_select + 1, dtype=torch.bool, device=device)
    taken = taken.scatter_(-1, chosen.where(chosen >= 0, blocks.n_select), True)[..., :-1]
    assert torch.equal(taken.sum(-1), (scores > -torch.inf).sum(-1).clamp(max=5))
    worst = scores.masked_fill(~taken, torch.inf).amin(-1)
    best_left = scores.masked_fill(taken, -torch.inf).amax(-1)
    assert bool(best_left.isfinite().any()) and bool((best_left - worst <= 4 * 100 * 2**-23).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_outputs_and_gradients(
    documents: Tensor | None, slopes: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their error against float64 is at most twice (of gradients three times) that of masks in their dtype,
    as flash-attention's tests have it. The blocks are those that float64 selects: which are best turns on rounding."""
    config = network(NSAConfig(select_count=5), head_dim=32)
    layer, device = module(config).cuda(), torch.device("cuda")
    inputs = [x.cuda() for x in draw(1536, config)]
    cotangent = torch.randn(1, 4, 1536, 32, dtype=torch.float64, device=device)
    bounds, slopes = (None if x is None else x.cuda() for x in (documents, slopes))
    flex = NativeSparseAttention.metadata(config, 1536, bounds, longest(1536, documents), device)
    assert flex.compression is not None
    chosen = []

    def selected(*arguments: object) -> object:
        if not chosen:
            chosen.append(model_selection(*arguments))  # type: ignore[arg-type]
        return chosen[0]

    model_selection = model.nsa.attention.select_blocks
    monkeypatch.setattr(model.nsa.attention, "select_blocks", selected)

    def run(metadata: NSAMetadata, dtype: torch.dtype) -> list[Tensor]:
        layer.to(dtype)
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = layer(*leaves, metadata, slopes)
        return [out.detach(), *torch.autograd.grad(out, [*leaves, *layer.parameters()], cotangent.to(dtype))]

    masked = NSAMetadata(flex.blocks, None, None)
    with monkeypatch.context() as by_masks:
        by_masks.setattr(model.nsa.attention, "runs_on_triton", lambda q: False)
        truth, theirs = run(masked, torch.float64), run(masked, dtype)
    for i, (ours, plain, exact) in enumerate(zip(run(flex, dtype), theirs, truth, strict=True)):
        limit = max((3 if i else 2) * relative(plain, exact), 4 * torch.finfo(dtype).eps)
        assert relative(ours, exact) <= limit, i
