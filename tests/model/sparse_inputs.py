"""What tests of the kinds that are trained sparse share."""

import pytest
import torch
from torch import Tensor, nn

import model.visible_attention
from model.config import ModelConfig

# of tests on CUDA
DOCUMENTS = torch.tensor([0, 300, 300, 301, 1000, 1536], dtype=torch.int32)
SLOPES = torch.tensor([1.0, 0.25, 0.0, 0.0])


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def draw(n_tokens: int, config: ModelConfig, rows: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, q, k, v, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    heads = (config.n_heads, config.n_cached_heads, config.n_cached_heads)
    q, k, v = (normal(count, n_tokens, config.head_size) for count in heads)
    return normal(n_tokens, config.d_model), q, k, v


@torch.no_grad()
def with_large_weights(module: nn.Module) -> None:
    """So that it chooses clearly."""
    for p in module.parameters():
        p.copy_(torch.randn_like(p) * 0.5)


def graphs_of_flex(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What FlexAttention compiles from now on."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(torch.nn.attention.flex_attention.flex_attention, backend=backend, fullgraph=True)
    monkeypatch.setattr(model.visible_attention, "compiled_flex", lambda: compiled)
    return graphs


def longest(n_tokens: int, cu_seqlens: Tensor | None) -> int:
    """max_seqlen of such documents."""
    return n_tokens if cu_seqlens is None else int(cu_seqlens.diff().max())
