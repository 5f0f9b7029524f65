"""The key/value cache of incremental decoding: each row from slot 0 on (prompts are padded on the right).

Token t of a row stands in slot t, so that prompts of different lengths share positions while they are prefilled: there
the keys of shorter rows' padding come after all their tokens, invisible to them by causality, and are overwritten
before any later token could see them. In decoding each row has its own length, which kernels.entmax_attention takes as
kv_lens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True)
class Extension:
    """What one forward pass over n further tokens of each of the first b rows writes and sees, alike in all layers.

    position: int64 (b, n), or (1, n) where all rows are of one length: of each token in its sequence.
    slots: the n slots they are written to, where all rows are of one length; else None (they are the positions).
    keys: the slots that any of them may see: under a sliding window not all that are filled.
    kv_lens: int32 (b,), how many of `keys` each row has, counting from keys.start; the last token stands at the last of
        them. None where every row has all.
    """

    position: Tensor
    slots: slice | None
    keys: slice
    kv_lens: Tensor | None

    @property
    def key_index(self) -> Tensor:
        """int64 (b or 1, n): the tokens' positions counted from keys.start."""
        return self.position - self.keys.start


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer during one forward pass, (b, G, slots, D), and what else it keeps of each token,
    (b, 1, slots, ModelConfig.n_cached_extra): views of the cache's memory."""

    keys: Tensor
    values: Tensor
    extra: Tensor
    extension: Extension

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v, (b, G, n, D), and returns all that the n tokens may see, (b, G, keys, D), without copying.

        Raises ValueError where k has another dtype than the cache.
        """
        if k.dtype != self.keys.dtype:
            raise ValueError(
                f"the cache holds {self.keys.dtype}, but the model now gives keys of {k.dtype}: make the cache under "
                "the autocast that it is used in"
            )
        return self._stored(self.keys, k), self._stored(self.values, v)

    def append_extra(self, x: Tensor) -> Tensor:
        """Stores x, (b, n, n_cached_extra), and returns that of all tokens that the n may see, (b, keys, ...)."""
        return self._stored(self.extra, x[:, None])[:, 0]

    def _stored(self, memory: Tensor, new: Tensor) -> Tensor:
        if self.extension.slots is not None:
            memory[:, :, self.extension.slots] = new
        else:
            row = torch.arange(len(new), device=new.device)[:, None]
            memory[row, :, self.extension.position] = new.transpose(1, 2)  # [b, n, G, D]
        return memory[:, :, self.extension.keys]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: slots that no row has filled get weight 0, and 0 * NaN would be NaN. Raises ValueError without room."""
    try:
        return torch.zeros(*shape, dtype=dtype, device=device)
    except RuntimeError as error:  # of the allocators of CPU and CUDA
        gib = math.prod(shape) * dtype.itemsize / 2**30
        raise ValueError(
            f"keys and values of {shape[2]} x {shape[4]:,} tokens take {gib:,.1f} GiB, for which {device} has no room: "
            "ask for fewer new tokens or a shorter prompt"
        ) from error


class KVCache:
    """Keys and values of up to `rows` sequences of up to `max_tokens` tokens.

    Memory: 2 * L * G * D * (bytes of dtype) for each slot of each row: 36 KiB a token for configs/models/125m.yaml in
    bfloat16 (4.5 GiB at 131,072 tokens), 128 KiB for 8b.yaml. Three times that for attention.kind nsa, whose branches
    have keys and values of their own: compressed keys are computed again in each pass, and the window's are kept for
    all tokens, where a ring of `window` tokens would do. Kind dsa has index_dim numbers a layer besides. `reserved`
    slots are allocated when it is made, twice as many whenever they are full; None: all max_tokens at once, which never
    moves.

    Attributes: lengths (list of int), tokens held of each row. max_tokens (int).

    Raises: ValueError where the device has no room for it.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        reserved: int | None = None,
    ) -> None:
        if rows < 1 or max_tokens < 1:
            raise ValueError(f"a cache of {rows} rows of {max_tokens} tokens: expected at least 1 of both")
        slots = max_tokens if reserved is None else min(reserved, max_tokens)
        shape = (config.n_layers, 2, rows, config.n_cached_heads, slots, config.head_size)
        self._memory = _zeros(shape, dtype, device)
        self._extra = _zeros((config.n_layers, 1, rows, 1, slots, config.n_cached_extra), dtype, device)
        self.window, self.max_tokens, self.dtype = config.window, max_tokens, dtype
        self.lengths = [0] * rows

    def open(self, rows: int, n_tokens: int) -> tuple[Extension, list[LayerCache]]:
        """For a forward pass over n_tokens further tokens of each of the first `rows` rows: the extension, and one
        LayerCache a layer. Raises ValueError where they do not fit."""
        self.check_room(rows, n_tokens)
        self.reserve(rows, n_tokens)
        extension = self._extension(self.lengths[:rows], n_tokens)
        return extension, self.layers(rows, extension)

    def check_room(self, rows: int, n_tokens: int) -> None:
        """Raises ValueError where n_tokens more of each of the first `rows` rows do not fit."""
        if not 1 <= rows <= len(self.lengths):
            raise ValueError(f"tokens of {rows} rows were given to a cache of {len(self.lengths)}")
        longest = max(self.lengths[:rows])
        if longest + n_tokens > self.max_tokens:
            raise ValueError(
                f"{n_tokens} tokens after {longest} make {longest + n_tokens}, but the cache has room for "
                f"{self.max_tokens}: make it larger"
            )

    @property
    def slots(self) -> int:
        """Tokens of each row that there is memory for."""
        return self._memory.shape[4]

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, room for further tokens included."""
        return self._memory.nbytes + self._extra.nbytes

    def reserve(self, rows: int, n_tokens: int) -> bool:
        """Make memory for n_tokens more of each of the first `rows` rows; true where that has moved all of it."""
        needed = max(self.lengths[:rows]) + n_tokens
        if needed <= self.slots:
            return False
        slots = min(self.max_tokens, max(needed, 2 * self.slots))
        self._memory, self._extra = (self._moved(before, slots) for before in (self._memory, self._extra))
        return True

    def _moved(self, before: Tensor, slots: int) -> Tensor:
        """A copy with room for more tokens."""
        memory = _zeros((*before.shape[:4], slots, before.shape[5]), self.dtype, before.device)
        memory[:, :, :, :, : before.shape[4]] = before
        return memory

    def layers(self, rows: int, extension: Extension) -> list[LayerCache]:
        """What each layer reads and writes in a forward pass over the first `rows` rows."""
        memory = zip(self._memory, self._extra, strict=True)
        return [LayerCache(both[0, :rows], both[1, :rows], extra[0, :rows], extension) for both, extra in memory]

    def _extension(self, before: Sequence[int], n_tokens: int) -> Extension:
        device, after = self._memory.device, max(before) + n_tokens
        first = 0 if self.window is None else max(0, min(before) - self.window + 1)
        keys = slice(first, after)
        if min(before) == max(before):
            slots = slice(before[0], after)
            return Extension(torch.arange(before[0], after, device=device)[None], slots, keys, None)
        start = torch.tensor(before, device=device)
        position = start[:, None] + torch.arange(n_tokens, device=device)
        return Extension(position, None, keys, (start + (n_tokens - first)).int())

    def advance(self, rows: int, n_tokens: int) -> None:
        """Counts n_tokens more in each of the first `rows` rows, once every layer has stored them."""
        self.lengths[:rows] = [length + n_tokens for length in self.lengths[:rows]]

    def truncate(self, row: int, length: int) -> None:
        """Forgets the tokens of a row from position `length` on. Raises ValueError if it has fewer."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot cut row {row} to {length} tokens: it has {self.lengths[row]}")
        self.lengths[row] = length

    def copy_row(self, source: int, target: int) -> None:
        """Replaces a row by a copy of another one."""
        held = self.lengths[source]
        for memory in (self._memory, self._extra):
            memory[:, :, target, :, :held] = memory[:, :, source, :, :held]
        self.lengths[target] = held
