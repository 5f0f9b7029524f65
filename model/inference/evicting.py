"""Decoding over a cache whose memory eviction policies free.

    with evicting(model, PyramidKV(4096)) as cache:
        hidden = cache.prefill(prompt, chunk_tokens=8192)
        hidden = cache.extend(token)

Gives what the same policy gives under model.policies.policy.use_policy, which hides keys and keeps them (and takes a
token of the prompt that is passed alone, with chunk_tokens=1, for a decoded one, as this does not). Each layer
holds the keys and values that are left of the prompt, and those of later tokens: heads together where they keep as
many, else each by itself, so that no head pays for another. Rotary keys stay turned for their position in the text, and
ALiBi's distances are those in the text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.attention import AttentionMetadata
from model.config import ModelConfig
from model.held_keys import HeldKeys
from model.inference.text_cache import TextCache
from model.kv_cache import Extension, LayerCache
from model.override import override_attention
from model.policies.eviction import EvictingPolicy
from model.policies.policy import SequenceView
from model.softmax import steady_backends
from model.transformer import Transformer


class EvictingCache(TextCache):
    """Keys and values of one text, made by `evicting`."""

    def __init__(self, model: Transformer, layers: Sequence["_EvictingLayer"]) -> None:
        super().__init__(model, layers)
        self._evicting = layers

    def _check_open(self) -> None:
        if self._model.layers()[0].attention.override is not self._evicting[0]:
            raise ValueError("the with block of `evicting` has ended, and its cache with it: decode inside it")
        if not self.length:
            for layer in self._evicting:
                layer.memory.clear()  # of a prompt that has failed


@contextmanager
def evicting(model: Transformer, policy: EvictingPolicy) -> Iterator[EvictingCache]:
    """Inside, the cache that is given reads one prompt and decodes after it; the model is to be used for nothing else.

    Raises: ValueError for a model that is not softmax, one with a sliding window, a policy that evicts nothing or whose
    budgets free nothing, or a model that is under a policy already.
    """
    config = model.config
    if not isinstance(policy, EvictingPolicy):
        raise ValueError(f"{policy.name} evicts no keys: expected SnapKV, PyramidKV, AdaSnapKV or H2O")
    if not config.attention.is_softmax:
        kind = config.attention.kind
        raise ValueError(f"policies prune softmax attention, and this model's kind is {kind!r}: give its softmax twin")
    if config.window is not None:
        raise ValueError(f"window is {config.window}: {policy.name} chooses from the whole text")
    policy.check(config)
    policy.check_freeing()
    layers = [_EvictingLayer(policy, i, config) for i in range(config.n_layers)]
    with override_attention(model, layers):
        yield EvictingCache(model, layers)


@dataclass(frozen=True)
class _Passing:
    """Takes a LayerCache's place: the layer's own attention stores what comes."""

    extension: Extension

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class _EvictingLayer:
    """One layer's attention: the model's own over the prompt, which the policy watches, then over what is left."""

    def __init__(self, policy: EvictingPolicy, layer: int, config: ModelConfig) -> None:
        self.policy, self.layer, self.config = policy, layer, config
        self.parts: list[HeldKeys] = []
        self.memory: dict[str, Any] = {}
        self.slopes: Tensor | None = None

    def fill(self, held: LayerCache) -> None:
        k, v = held.keys[0], held.values[0]  # [G, prompt, D]
        n_keys = k.shape[1]
        places = None if self.slopes is None else torch.arange(n_keys, device=k.device).expand(len(k), -1)
        with torch.autocast(k.device.type, enabled=False):  # it would turn the float32 of selection into bfloat16
            kept = self.policy.evict(k, self._view(n_keys))
        if kept is None:
            kept = torch.ones(1, n_keys, dtype=torch.bool, device=k.device)
        self.parts = HeldKeys(k, v, places, n_keys).keep(kept.expand(len(k), -1))

    def passing(self, extension: Extension) -> LayerCache:
        return _Passing(extension)  # type: ignore[return-value]

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, extension: Extension | None
    ) -> Tensor | None:
        """As model.attention.AttentionOverride."""
        if extension is None or len(q) > 1:
            raise ValueError(f"{self.policy.name} evicts from the cache of one text: use that of `evicting`")
        self.slopes = metadata.alibi_slopes
        with torch.autocast(q.device.type, enabled=False):
            if not self.parts:
                self.policy.observe(q[0], k[0], self._view(k.shape[2] - q.shape[2]))
                return None
            if k.shape[2] > 1:
                raise ValueError(f"{k.shape[2]} keys came from another cache: inside `evicting`, use its own alone")
            return self._decode(q, k[0, :, 0], v[0, :, 0], int(extension.keys.stop) - 1)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, place: int) -> Tensor:
        """q: (1, H, 1, D), k, v: (G, D), of the token at `place` -> (1, H, 1, D)."""
        if self.policy.weighs:
            held = self.parts[0]  # such policies have one
            kept = self.policy.evict(held.keys[:, : held.length], self._view(held.length))
            if kept is not None:
                self.parts = held.keep(kept.expand(len(k), -1))
        queries = q.view(len(k), -1, q.shape[-1])  # [G, H / G, D]
        slopes = None if self.slopes is None else self.slopes.view(len(k), -1, 1)
        out, weights, first = [], [], 0
        for part in self.parts:
            heads = slice(first, first := first + len(part.keys))
            part.append(k[heads], v[heads], place)
            keys, values = part.keys[:, : part.length], part.values[:, : part.length]
            if not self.policy.weighs and slopes is None:
                with sdpa_kernel(steady_backends(q, masked=False)):
                    out.append(scaled_dot_product_attention(queries[None, heads], keys[None], values[None])[0])
                continue
            scores = queries[heads].float() @ keys.float().mT * q.shape[-1] ** -0.5
            if slopes is not None and part.places is not None:
                scores -= slopes[heads] * (place - part.places[:, None, : part.length])
            weights.append(torch.softmax(scores, -1))  # [g, H / G, keys]
            out.append((weights[-1] @ values.float()).to(q.dtype))
        if self.policy.weighs:
            self.policy.attended(weights[0].flatten(0, 1), len(k), self._view(self.parts[0].length - 1))
        return torch.cat(out).view_as(q)

    def _view(self, query_start: int) -> SequenceView:
        n_layers, scale = self.config.n_layers, self.config.head_size**-0.5
        return SequenceView(self.layer, n_layers, True, query_start, 0, scale, None, self.slopes, self.memory)

    @property
    def nbytes(self) -> int:
        remembered = [x for x in self.memory.values() if isinstance(x, Tensor)]
        return sum(part.nbytes for part in self.parts) + sum(x.nbytes for x in remembered)
