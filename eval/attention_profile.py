"""Support size, live tiles, alpha and temperature of every layer and head at each context length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.perplexity import Documents
from eval.scoring import Runtime
from model.transformer import LayerStats, Transformer


@dataclass(frozen=True)
class LayerProfile:
    """Means over documents for one layer at one length; each list has one entry a head.

    Args:
        support: Keys with weight above zero, mean over queries.
        live_share: Share of the causal 64x64 tiles that hold any weight.
        alpha, temperature: None where the attention kind has none.
    """

    multiple: int
    layer: int
    support: list[float]
    live_share: list[float]
    alpha: list[float] | None
    temperature: list[float] | None


def measure_attention(
    model: Transformer,
    store: Documents,
    documents: Sequence[int],
    multiples: Sequence[int],
    base_length: int,
    runtime: Runtime,
    label: str,
) -> list[LayerProfile]:
    """Profiles the first multiple * base_length tokens of each document, one context each."""
    profiles: list[LayerProfile] = []
    total = sum(multiples) * base_length * len(documents)
    with tqdm(total=total, desc=f"{label}: attention", unit="tok", unit_scale=True, leave=False) as bar:
        for multiple in multiples:
            size = multiple * base_length
            each: list[Sequence[LayerStats]] = []
            for document in documents:
                tokens = torch.from_numpy(store.document(document)[:size].astype(np.int64)).to(runtime.device)
                cu_seqlens = torch.tensor([0, size], dtype=torch.int32, device=runtime.device)
                with torch.no_grad(), runtime.precision():
                    each.append(model.attention_stats(tokens[None], cu_seqlens))
                bar.update(size)
            profiles.extend(_average(multiple, each))
    return profiles


def _average(multiple: int, each: Sequence[Sequence[LayerStats]]) -> list[LayerProfile]:
    def mean(values: list[Tensor]) -> list[float]:
        return torch.stack([value.detach().double().cpu() for value in values]).mean(0).tolist()

    def optional(values: list[Tensor | None]) -> list[float] | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    return [
        LayerProfile(
            multiple,
            layer,
            mean([stats.support_mean for stats in stats_of_layer]),
            mean([stats.live_share for stats in stats_of_layer]),
            optional([stats.alpha for stats in stats_of_layer]),
            optional([stats.temperature for stats in stats_of_layer]),
        )
        for layer, stats_of_layer in enumerate(zip(*each, strict=True))
    ]


def dense_profile(
    layers: int, heads: int, multiples: Sequence[int], base_length: int, window: int | None
) -> list[LayerProfile]:
    """What softmax attention has by construction: every visible key has weight and every visible tile is live."""
    profiles: list[LayerProfile] = []
    for multiple in multiples:
        size = multiple * base_length
        visible = np.minimum(np.arange(1, size + 1), window or size).mean()
        profiles.extend(
            LayerProfile(multiple, layer, [float(visible)] * heads, [1.0] * heads, None, None)
            for layer in range(layers)
        )
    return profiles
