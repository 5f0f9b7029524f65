"""Decoding of models of kind "dms" over a cache that really forgets.

    cache = ForgettingCache(model)
    hidden = cache.prefill(prompt, chunk_tokens=8192)
    hidden = cache.extend(token)

Gives what the model gives over a KVCache, which hides evicted keys and keeps them. The prompt is read whole first. Each
KV head holds its keys by itself, so that none pays for another; a step asks the device for each layer's decisions.
"""

from model.dms.cache import ForgettingKeys
from model.inference.text_cache import TextCache
from model.transformer import Transformer


class ForgettingCache(TextCache):
    """Keys and values of one text. Raises ValueError for models of another kind."""

    def __init__(self, model: Transformer) -> None:
        dms = model.config.attention.dms
        if dms is None:
            raise ValueError(f"this model's kind is {model.config.attention.kind!r}: only dms decides what to forget")
        alibi = model.config.positions == "nape"
        super().__init__(model, [ForgettingKeys(dms.window, alibi) for _ in model.layers()])
