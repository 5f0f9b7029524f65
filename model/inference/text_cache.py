"""Decoding of one text over a cache whose memory is freed, whatever frees it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.held_keys import HeldKeys
from model.inference.incremental import cached_pass, make_cache, prefill
from model.kv_cache import Extension, LayerCache
from model.transformer import Transformer


class TextLayer(Protocol):
    """What one layer holds of the text."""

    parts: list[HeldKeys]

    def fill(self, held: LayerCache) -> None:
        """Keep some of a prompt's keys and values: all that `held` has of its first row."""

    def passing(self, extension: Extension) -> LayerCache:
        """What takes a LayerCache's place in a pass over a token."""

    @property
    def nbytes(self) -> int: ...


class TextCache:
    """Keys and values of one text.

    length: tokens of the text so far, those included that are gone.
    """

    def __init__(self, model: Transformer, layers: Sequence[TextLayer]) -> None:
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
        hidden = prefill(self._model, [prompt], whole, chunk_tokens)
        extension = Extension(torch.zeros(1, 1, dtype=torch.int64), None, slice(0, len(prompt)), None)
        for layer, held in zip(self._layers, whole.layers(1, extension), strict=True):
            layer.fill(held)
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
        hidden = cached_pass(self._model, tokens, extension, [layer.passing(extension) for layer in self._layers])
        self.length += 1
        return hidden

    def _check_open(self) -> None:
        """Raises ValueError where the cache cannot be used, or not any more."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds, room for further tokens and what a policy remembers included."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def held(self) -> Tensor:
        """int64 (L, G): keys of each layer and KV head."""
        return torch.tensor([[part.length for part in layer.parts for _ in part.keys] for layer in self._layers])
