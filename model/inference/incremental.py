"""Incremental forward passes over a KVCache: prompts in chunks, then token by token.

What a token sees is exactly what it sees in a full forward pass (documents start at position 0): its position for
rotary angles, ALiBi distances and log-position temperatures, the keys of its own row, the window.

entmax runs on kernels.entmax_attention, in decoding too (kernels/README.md says what that costs), softmax on
model.softmax.cached_softmax_attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import cached_metadata
from model.kv_cache import Extension, KVCache, LayerCache
from model.transformer import Transformer


def make_cache(model: Transformer, rows: int, max_tokens: int, reserved: int | None = None) -> KVCache:
    """A cache in the dtype that the model's keys have here: autocast's where that is on, else the weights'. Arguments
    and errors as of KVCache."""
    weight = model.embedding.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache(model.config, rows, max_tokens, dtype, weight.device, reserved)


def extend(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Hidden states after the final norm, (b, n, C), of tokens that continue the first b rows of a cache; stores their
    keys and values.

    tokens: int64 (b, n). Raises ValueError where they do not fit.
    """
    rows, n_tokens = tokens.shape
    hidden = cached_pass(model, tokens, *cache.open(rows, n_tokens))
    cache.advance(rows, n_tokens)
    return hidden


@torch.no_grad()
def cached_pass(model: Transformer, tokens: Tensor, extension: Extension, layers: Sequence[LayerCache]) -> Tensor:
    """As `extend`, for an extension that was opened before; counts nothing."""
    metadata = cached_metadata(model.config, extension, model.alpha_progress())
    x = model.embedding(tokens)  # [b, n, C]
    for block, layer in zip(model.layers(), layers, strict=True):
        x = block.forward(x, metadata, layer)  # .forward: a compiled block would be traced anew for each length
    return model.norm(x)


@torch.no_grad()
def prefill(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache, chunk_tokens: int) -> Tensor:
    """Fills the first rows of an empty cache with prompts. Returns (B, C), the hidden state of each one's last token.

    Args:
        prompts: token ids, longest prompt first: rows that have ended are left out of later chunks.
        chunk_tokens: most tokens of one forward pass, all rows together (at least one a row), which bounds activations.

    Raises: ValueError for an empty prompt, another order, a cache that is not empty or too small.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or lengths != sorted(lengths, reverse=True):
        raise ValueError(f"prompts have {lengths} tokens: expected at least one prompt, none empty, the longest first")
    if any(cache.lengths):
        raise ValueError(f"rows of the cache hold {cache.lengths} tokens: expected an empty one")
    device = model.embedding.weight.device
    last: list[Tensor] = []  # of the rows that end in each chunk; later chunks hold earlier rows
    start = 0
    while start < lengths[0]:
        active = sum(length > start for length in lengths)
        stop = min(start + max(1, chunk_tokens // active), lengths[0])
        if stop == lengths[0] - 1 and stop > start + 1:
            stop -= 1  # a token by itself would be taken for one that is decoded
        padded = [[*prompt[start:stop], *[0] * (stop - len(prompt))] for prompt in prompts[:active]]
        hidden = extend(model, torch.tensor(padded, device=device), cache)
        ended = [row for row in range(active) if lengths[row] <= stop]
        last.append(hidden[ended, [lengths[row] - 1 - start for row in ended]])
        start = stop
    for row, length in enumerate(lengths):
        cache.truncate(row, length)
    return torch.cat(last[::-1])
