"""A cache that forgets what Dynamic Memory Sparsification has evicted: each KV head by itself, in place."""

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.held_keys import HeldKeys
from model.kv_cache import Extension, LayerCache
from model.softmax import steady_backends


class ForgettingKeys:
    """What one layer holds of one text: of each KV head the last window + 1 tokens, and those before that are not
    evicted. A new token takes the slot of the one that leaves the window, where that is, else one more.

    alibi: whether scores need the tokens' places in the text.
    """

    def __init__(self, window: int, alibi: bool) -> None:
        self.window, self.alibi = window, alibi
        self.parts: list[HeldKeys] = []  # of each head
        self.rings: list[list[int]] = []  # of each head, the slot of the near token t at t modulo (window + 1)
        self.doomed: list[list[bool]] = []  # of each head, whether that token is evicted, in the same places
        self.extension: Extension | None = None

    def fill(self, held: LayerCache) -> None:
        k, v = held.keys[0], held.values[0]  # [G, prompt, D]
        n, device = k.shape[1], k.device
        decided = held.extra[0, 0].mT[:, 1:] != 0  # [G, prompt - 1], on each token but the last
        evicted = torch.cat([decided, decided.new_zeros(len(k), 1)], 1)
        token = torch.arange(n, device=device)
        near = token >= n - 1 - self.window
        self.parts, self.rings, self.doomed = [], [], []
        for g, gone in enumerate(evicted):
            places = token[None] if self.alibi else None
            (part,) = HeldKeys(k[g : g + 1], v[g : g + 1], places, n).keep((near | ~gone)[None])
            ring, doomed = [0] * (self.window + 1), [False] * (self.window + 1)
            for t, flag in zip(token[near].tolist(), gone[near].tolist(), strict=True):
                ring[t % len(ring)], doomed[t % len(ring)] = part.length - n + t, flag
            self.parts.append(part)
            self.rings.append(ring)
            self.doomed.append(doomed)

    def passing(self, extension: Extension) -> LayerCache:
        self.extension = extension
        return self  # type: ignore[return-value]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As LayerCache: `attend` stores them."""
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, decisions: Tensor, slopes: Tensor | None) -> Tensor:
        """Stores a token and attends with it. q: (1, H, 1, D), k and v: (1, G, 1, D), decisions: bool (1, G, 1), on the
        token before -> (1, H, 1, D)."""
        assert self.extension is not None
        place, out = int(self.extension.keys.stop) - 1, []
        queries = q.view(k.shape[1], -1, q.shape[-1])  # [G, H / G, D]
        slopes = None if slopes is None else slopes.view(k.shape[1], -1, 1)
        for g, evicts in enumerate(decisions.flatten().tolist()):
            part = self._store(g, place, k[0, g : g + 1, 0], v[0, g : g + 1, 0], evicts)
            keys, values, bias = part.keys[:, : part.length], part.values[:, : part.length], None
            if slopes is not None and part.places is not None:
                bias = (-slopes[g] * (place - part.places[:, : part.length])).to(q.dtype)[None]
            head = queries[None, g : g + 1]
            with sdpa_kernel(steady_backends(q, masked=bias is not None)):
                out.append(scaled_dot_product_attention(head, keys[None], values[None], attn_mask=bias))
        return torch.cat(out, dim=1).view_as(q)

    def _store(self, g: int, place: int, k: Tensor, v: Tensor, evicts: bool) -> HeldKeys:
        """evicts: the token before."""
        part, ring, doomed = self.parts[g], self.rings[g], self.doomed[g]
        doomed[(place - 1) % len(ring)] = evicts
        here = place % len(ring)  # that of the token which leaves the window
        if place > self.window and doomed[here]:
            part.replace(ring[here], k, v, place)
        else:
            part.append(k, v, place)
            ring[here] = part.length - 1
        doomed[here] = False
        return part

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
