"""Factors of scores and projections of outputs with which alpha-entmax stands in for softmax attention: found, and
built into weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import entmax_attention
from model.attention import Attention, AttentionMetadata
from model.config import ModelConfig
from model.kv_cache import Extension
from model.override import override_attention
from model.refit import Refit, refit_projection
from model.softmax import softmax_attention
from model.transformer import Transformer

SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-7, 1.0  # of the search
STEPS = 12  # of the golden-section search: factors to 2 %
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ConvertedLayer:
    """Found for a layer; of its heads, float32 (H,): factors of their scores, squared error of outputs relative
    to softmax's outputs at a factor of 1 and at the one found, and keys with weight, mean over queries, at the latter.
    refit: the layer's projection of outputs, None where it is to stay."""

    factor: Tensor
    error_at_1: Tensor
    error: Tensor
    keys: Tensor
    refit: Refit | None = None

    @property
    def at_bound(self) -> Tensor:
        """bool (H,): heads whose factor ended beside a bound of the search, beyond which it might be better."""
        near = 1.05  # the search ends within 2.4 % of a bound that it runs into
        return (self.factor < SMALLEST_FACTOR * near) | (self.factor > LARGEST_FACTOR / near)


@torch.no_grad()
def find_factors(
    model: Transformer,
    tokens: Tensor,
    alpha: float,
    precision: AbstractContextManager[Any],
    refit: bool = False,
    layer_done: Callable[[], object] = lambda: None,
) -> list[ConvertedLayer]:
    """One ConvertedLayer a layer, of a softmax model's forward pass over tokens (B, T) under the context `precision`.

    Each head's factor makes the squared differences of entmax's outputs from softmax's least. Where queries are
    normalised by head, which undoes factors in their projection, all heads of a layer share one. With `refit` each
    layer's projection of outputs is fitted to what is left (`refit_projection`).
    """
    shared = model.config.qk_norm
    searches = [_FactorSearch(block.attention, alpha, shared, refit, layer_done) for block in model.layers()]
    with override_attention(model, searches), precision:
        model(tokens)
    return [search.found for search in searches]


class _FactorSearch:
    """Attends as one softmax layer does, and finds its heads' factors from the first q, k, v that it sees.

    shared: one factor for all heads.
    """

    found: ConvertedLayer

    def __init__(
        self, attention: Attention, alpha: float, shared: bool, refit: bool, layer_done: Callable[[], object]
    ) -> None:
        self.attention, self.alpha, self.shared, self.refit = attention, alpha, shared, refit
        self.layer_done = layer_done

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, extension: Extension | None
    ) -> Tensor:
        assert metadata.exchange is None and extension is None
        window, slopes = self.attention.config.window, metadata.alibi_slopes
        out = softmax_attention(
            q, k, v, cu_seqlens=metadata.cu_seqlens, max_seqlen=metadata.max_seqlen, alibi_slopes=slopes,
            window=window, block_mask=metadata.block_mask,
        )  # fmt: skip
        size = out.float().square().sum((0, 2, 3))  # [H]

        def attend(factor: Tensor, return_stats: bool = False) -> Any:
            scaled = (q.float() * factor[:, None, None]).to(q.dtype)
            return entmax_attention(
                scaled, k, v, alpha=self.alpha, alibi_slopes=slopes, window=window, return_stats=return_stats,
                backend=self.attention.config.attention.backend,
            )  # fmt: skip

        def error(attended: Tensor) -> Tensor:
            squares = (attended.float() - out.float()).square().sum((0, 2, 3))
            return squares.sum().expand_as(squares) if self.shared else squares

        bounds = torch.full_like(size, SMALLEST_FACTOR), torch.full_like(size, LARGEST_FACTOR)
        factor = golden_section(lambda factor: error(attend(factor)), *bounds, STEPS)
        found, stats = attend(factor, True)
        total = (size.sum() if self.shared else size).clamp(min=torch.finfo(size.dtype).tiny)  # of heads that give 0
        at_1, best = error(attend(torch.ones_like(size))) / total, error(found) / total
        refit = refit_projection(found, out, self.attention.wo.weight) if self.refit else None
        keys = stats.support.float().mean((0, 2))
        self.found = ConvertedLayer(factor.cpu(), at_1.cpu(), best.cpu(), keys.cpu(), refit)
        self.layer_done()
        return out


def golden_section(error: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Where each of several errors with one minimum is least, searched on a logarithmic scale.

    Args:
        error: of positive (n,), float32 (n,), each of its own entry of the argument.
        low, high: float32 (n,), positive.

    Returns: float32 (n,), to a share of 0.618 ** (steps - 1) of log(high / low).
    """
    low, high = low.log(), high.log()
    inner = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    values = error(inner[0].exp()), error(inner[1].exp())
    for _ in range(steps - 2):
        left = values[0] < values[1]  # the minimum lies below the upper of the two
        low, high = torch.where(left, low, inner[0]), torch.where(left, inner[1], high)
        kept, kept_value = torch.where(left, *inner), torch.where(left, *values)
        new = torch.where(left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        new_value = error(new.exp())
        inner = torch.where(left, new, kept), torch.where(left, kept, new)
        values = torch.where(left, new_value, kept_value), torch.where(left, kept_value, new_value)
    return torch.where(values[0] < values[1], *inner).exp()


def converted_weights(
    model: Transformer, network: ModelConfig, layers: Sequence[ConvertedLayer]
) -> Iterator[tuple[str, Tensor]]:
    """All parameters of `network`, factors of scores of each layer within its queries'."""
    state = dict(model.state_dict())
    for layer, one in enumerate(layers):
        prefix, factor = f"blocks.{layer}.attention.", one.factor
        if one.refit is not None:
            state[f"{prefix}wo.weight"] = one.refit.weight
        if network.qk_norm:
            names, factor = ["q_norm.weight"], factor[0].expand(network.head_size)
        else:
            names, factor = ["wq.weight", "wq.bias"], factor.repeat_interleave(network.head_size)
        for name in (prefix + name for name in names if prefix + name in state):
            weight = state[name].float()
            state[name] = weight * factor.to(weight.device).view(-1, *(1 for _ in weight.shape[1:]))
        state[f"{prefix}alpha.alpha_raw"] = torch.zeros(network.n_heads)
    yield from ((name, tensor.cpu()) for name, tensor in state.items())
