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
from torch.nn.functional import pad, scaled_dot_product_attention

from model.attention import AttentionMetadata
from model.config import ModelConfig
from model.inference.incremental import cached_pass, make_cache, prefill
from model.kv_cache import Extension
from model.override import override_attention
from model.policies.eviction import EvictingPolicy
from model.policies.policy import SequenceView
from model.transformer import Transformer

SPARE = 256  # tokens that a layer has room for beyond those that it holds, whenever it allocates


class EvictingCache:
    """Keys and values of one text, made by `evicting`.

    length: tokens of the text so far, evicted ones included.
    """

    def __init__(self, model: Transformer, layers: Sequence["_EvictingLayer"]) -> None:
        self.length = 0
        self._model, self._layers = model, layers

    def prefill(self, prompt: Sequence[int], chunk_tokens: int) -> Tensor:
        """Reads the prompt with the model's own attention and evicts. Returns (1, C), the last token's hidden state.

        While it reads, the whole prompt's keys and values are in memory. chunk_tokens: most tokens of a forward pass.

        Raises: ValueError for an empty prompt, or a second one.
        """
        if self.length:
            raise ValueError(f"the cache holds a text of {self.length} tokens: use another one for another prompt")
        self._check_open()
        whole = make_cache(self._model, 1, max(1, len(prompt)))
        for layer in self._layers:
            layer.memory.clear()  # of a prompt that has failed
        hidden = prefill(self._model, [prompt], whole, chunk_tokens)
        extension = Extension(torch.zeros(1, 1, dtype=torch.int64), None, slice(0, len(prompt)), None)
        for layer, held in zip(self._layers, whole.layers(1, extension), strict=True):
            layer.fill(held.keys[0], held.values[0])
        self.length = len(prompt)
        return hidden

    def extend(self, tokens: Tensor) -> Tensor:
        """Hidden states, (1, 1, C), of one token, int64 (1, 1), that continues the text.

        Raises: ValueError for more tokens at once, or before a prompt.
        """
        if tokens.shape != (1, 1):
            raise ValueError(f"tokens have the shape {tuple(tokens.shape)}: expected (1, 1), one token at a time")
        if not self.length:
            raise ValueError("the cache holds no text: prefill it with the prompt first")
        self._check_open()
        position = torch.full((1, 1), self.length, device=tokens.device)
        extension = Extension(position, None, slice(0, self.length + 1), None)
        hidden = cached_pass(self._model, tokens, extension, [_Passing(extension)] * len(self._layers))  # type: ignore[list-item]
        self.length += 1
        return hidden

    def _check_open(self) -> None:
        if self._model.layers()[0].attention.override is not self._layers[0]:
            raise ValueError("the with block of `evicting` has ended, and its cache with it: decode inside it")

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds, room for further tokens and what the policy remembers included."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def held(self) -> Tensor:
        """int64 (L, G): keys of each layer and KV head."""
        return torch.tensor([[part.length for part in layer.parts for _ in part.keys] for layer in self._layers])


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


@dataclass
class _Part:
    """Heads of one layer that hold as many keys as each other: the first `length` of keys and values, (g, slots, D).
    places: int64 (g, slots), their positions in the text, where ALiBi asks for them. own: no other cache's memory."""

    keys: Tensor
    values: Tensor
    places: Tensor | None
    length: int
    own: bool = False

    def append(self, k: Tensor, v: Tensor, place: int) -> None:
        """k, v: (g, D)."""
        if self.length == self.keys.shape[1]:
            self._move(slice(None))
        self.keys[:, self.length], self.values[:, self.length] = k, v
        if self.places is not None:
            self.places[:, self.length] = place
        self.length += 1

    def keep(self, kept: Tensor) -> list["_Part"]:
        """What is left of it. kept: bool (g, length)."""
        counts = kept.sum(-1).tolist()
        if len(set(counts)) > 1:
            return [part for i in range(len(counts)) for part in self._head(i).keep(kept[i : i + 1])]
        if self.own and self.keys.shape[1] - counts[0] <= SPARE:
            self._close_up(kept)
        else:
            self._move(kept)
        return [self]

    def _head(self, i: int) -> "_Part":
        places = None if self.places is None else self.places[i : i + 1]
        return _Part(self.keys[i : i + 1], self.values[i : i + 1], places, self.length)

    def _move(self, kept: Tensor | slice) -> None:
        """Into memory of their own, with room."""

        def moved(x: Tensor) -> Tensor:
            held = x[:, : self.length]
            held = held if isinstance(kept, slice) else held[kept].unflatten(0, (len(x), -1))
            return pad(held, (0,) * (2 * x.dim() - 4) + (0, SPARE))

        length = self.length if isinstance(kept, slice) else int(kept[0].sum())
        places = None if self.places is None else moved(self.places)
        self.keys, self.values, self.places, self.length = moved(self.keys), moved(self.values), places, length
        self.own = True

    def _close_up(self, kept: Tensor) -> None:
        """Within its memory. kept: bool (g, length), as many of each head."""
        length = int(kept[0].sum())
        for x in self.tensors:
            x[:, :length] = x[:, : self.length][kept].unflatten(0, (len(x), -1))
        self.length = length

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values, self.places) if x is not None]


class _EvictingLayer:
    """One layer's attention: the model's own over the prompt, which the policy watches, then over what is left."""

    def __init__(self, policy: EvictingPolicy, layer: int, config: ModelConfig) -> None:
        self.policy, self.layer, self.config = policy, layer, config
        self.parts: list[_Part] = []
        self.memory: dict[str, Any] = {}
        self.slopes: Tensor | None = None

    def fill(self, k: Tensor, v: Tensor) -> None:
        """k, v: (G, prompt, D), of which the policy keeps some."""
        n_keys = k.shape[1]
        places = None if self.slopes is None else torch.arange(n_keys, device=k.device).expand(len(k), -1)
        with torch.autocast(k.device.type, enabled=False):  # it would turn the float32 of selection into bfloat16
            kept = self.policy.evict(k, self._view(n_keys))
        if kept is None:
            kept = torch.ones(1, n_keys, dtype=torch.bool, device=k.device)
        self.parts = _Part(k, v, places, n_keys).keep(kept.expand(len(k), -1))

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
        return sum(x.nbytes for x in (*(one for part in self.parts for one in part.tensors), *remembered))
