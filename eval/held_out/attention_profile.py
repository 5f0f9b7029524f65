"""Attention of every layer and head at each context length: how far weights spread, where they go, what is zero."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.common.scoring import Runtime
from eval.held_out.config import EvalConfig
from eval.held_out.perplexity import Documents
from model.attention_stats import LayerStats
from model.attention_weights import WeightShape, layer_profiles
from model.config import ModelConfig
from model.transformer import Transformer


@dataclass(frozen=True)
class LayerProfile:
    """Means over documents for one layer at one length; each list has one entry a head.

    Args:
        support: Keys with weight above zero, mean over all queries.
        live_share: Share of the causal 64x64 tiles that hold any weight.
        alpha, temperature: None where the attention kind has none.
        entropy: Of a query's weights in nats, mean over sampled queries (`sample_queries`).
        relative_entropy: The same over the log of the number of visible keys.
        sink_share: Weight on the document's first tokens, mean over sampled queries.
    """

    multiple: int
    layer: int
    support: list[float]
    live_share: list[float]
    alpha: list[float] | None
    temperature: list[float] | None
    entropy: list[float]
    relative_entropy: list[float]
    sink_share: list[float]


def sample_queries(n_tokens: int, count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Positions in 0 ... n_tokens - 1, rising: one at random from each of `count` equal stretches (all positions where
    there are no more), so that means over them are unbiased and no stretch is missed."""
    if n_tokens <= count:
        return np.arange(n_tokens)
    generator = np.random.default_rng(seed)
    edges = np.linspace(0, n_tokens, count + 1)
    return np.floor(generator.uniform(edges[:-1], edges[1:])).astype(np.int64)


def measure_attention(
    model: Transformer,
    store: Documents,
    documents: Sequence[int],
    multiples: Sequence[int],
    base_length: int,
    config: EvalConfig,
    runtime: Runtime,
    label: str,
) -> list[LayerProfile]:
    """Profiles the first multiple * base_length tokens of each document, one context each. Nothing for kinds
    without weights of a query (AttentionConfig.has_profile)."""
    if not model.config.attention.has_profile:
        return []
    profiles: list[LayerProfile] = []
    total = sum(multiples) * base_length * len(documents)
    with tqdm(total=total, desc=f"{label}: attention", unit="tok", unit_scale=True, leave=False) as bar:
        for multiple in multiples:
            each = []
            for document in documents:
                each.append(profile_document(model, store, document, multiple, base_length, config, runtime))
                bar.update(multiple * base_length)
            profiles.extend(average(each))
    return profiles


def profile_document(
    model: Transformer,
    store: Documents,
    document: int,
    multiple: int,
    base_length: int,
    config: EvalConfig,
    runtime: Runtime,
) -> list[LayerProfile]:
    """One LayerProfile a layer."""
    size = multiple * base_length
    tokens = torch.from_numpy(store.document(document)[:size].astype(np.int64)).to(runtime.device)
    queries = sample_queries(size, config.profile_queries, [config.seed, 4, multiple, document])
    with runtime.precision():
        shapes, stats = layer_profiles(
            model, tokens[None], torch.from_numpy(queries).to(runtime.device), config.sink_tokens
        )
    runtime.done()
    if not stats:
        stats = [_dense_stats(model.config, size)] * len(shapes)
    return [_profile(multiple, layer, *both) for layer, both in enumerate(zip(stats, shapes, strict=True))]


def _dense_stats(config: ModelConfig, size: int) -> LayerStats:
    """What softmax attention has by construction: every visible key has weight and every visible tile is live."""
    visible = np.minimum(np.arange(1, size + 1), config.window or size).mean()
    heads = torch.ones(config.n_heads)
    return LayerStats(heads * float(visible), live_share=heads, alpha=None, temperature=None, temperature_max=None)


def _profile(multiple: int, layer: int, stats: LayerStats, shape: WeightShape) -> LayerProfile:
    def listed(heads: Tensor) -> list[float]:
        return heads.detach().double().cpu().tolist()

    return LayerProfile(
        multiple=multiple,
        layer=layer,
        support=listed(stats.support_mean),
        live_share=listed(stats.live_share),
        alpha=None if stats.alpha is None else listed(stats.alpha),
        temperature=None if stats.temperature is None else listed(stats.temperature),
        entropy=listed(shape.entropy),
        relative_entropy=listed(shape.relative_entropy),
        sink_share=listed(shape.sink_share),
    )


def average(each: Sequence[Sequence[LayerProfile]]) -> list[LayerProfile]:
    """The mean over documents of each layer's values, all at one length."""
    return [_average_layer(layer) for layer in zip(*each, strict=True)]


def _average_layer(profiles: Sequence[LayerProfile]) -> LayerProfile:
    means: dict[str, Any] = {}
    for name in (field.name for field in fields(LayerProfile) if field.name not in ("multiple", "layer")):
        known = [value for value in (getattr(one, name) for one in profiles) if value is not None]
        means[name] = np.mean(known, axis=0).tolist() if known else None
    return LayerProfile(profiles[0].multiple, profiles[0].layer, **means)
