"""Which keys a query sees. Every rule (causal, documents, window, key lengths) reduces to one interval of keys per
query."""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64  # live tiles are always counted as TILE x TILE, whatever tiles a backend works in


@dataclass(frozen=True)
class VisibleKeys:
    """Query i of batch row b sees keys first[b, i] <= j < end[b, i]; none when first >= end.

    first, end: int64 (B or 1, Tq). position: int64 (B or 1, Tq), the key index that query i stands at.
    """

    first: Tensor
    end: Tensor
    position: Tensor

    def mask(self, i_start: int, i_stop: int, j_start: int, j_stop: int) -> Tensor:
        """Bool (B or 1, i_stop - i_start, j_stop - j_start), True where the key is visible."""
        key = torch.arange(j_start, j_stop, device=self.first.device)
        rows = slice(i_start, i_stop)
        return (key >= self.first[:, rows, None]) & (key < self.end[:, rows, None])

    def blocks(self, size: int) -> list[tuple[int, int, bool]]:
        """For each block of `size` queries: the keys [lo, hi) that any of its queries sees, and whether all see all
        of them.

        Reads from the device once (a host synchronisation on CUDA).
        """
        n_queries = self.first.shape[1]
        n_blocks = -(-n_queries // size)
        empty = self.first >= self.end
        far = 2**40  # exact in the double that pad takes

        def fold(x: Tensor, fill: int) -> Tensor:
            x = torch.nn.functional.pad(x, (0, n_blocks * size - n_queries), value=fill)
            return x.view(-1, n_blocks, size).transpose(0, 1).flatten(1)  # [blocks, B * size]

        lo = fold(self.first.masked_fill(empty, far), far).amin(1)
        hi = fold(self.end.masked_fill(empty, -1), -1).amax(1)
        full = fold(torch.where(empty, far, self.first), -1).amax(1) <= lo
        full &= fold(torch.where(empty, -1, self.end), far).amin(1) >= hi
        rows = torch.stack([lo, hi, full.long()]).tolist()
        return [(a, b, bool(f)) if b > 0 else (0, 0, True) for a, b, f in zip(*rows, strict=True)]

    def total_tiles(self) -> Tensor:
        """int64 (B or 1,): TILE x TILE tiles in which some query sees some key. Does not synchronise."""
        empty = self.first >= self.end
        far = 2**40
        pad = -self.first.shape[1] % TILE
        lo = torch.nn.functional.pad(self.first.masked_fill(empty, far), (0, pad), value=far)
        hi = torch.nn.functional.pad(self.end.masked_fill(empty, 0), (0, pad))
        lo, hi = lo.unflatten(1, (-1, TILE)).amin(2) // TILE, hi.unflatten(1, (-1, TILE)).amax(2)
        return (-(-hi // TILE) - lo).clamp(min=0).sum(1)


def visible_keys(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    window: int | None,
    device: torch.device,
) -> VisibleKeys:
    """Intervals of visible keys; arguments as in `kernels.entmax_attention`, already checked there, but for the values
    of lengths on a device: whatever they are, no interval leaves 0 ... n_keys."""
    query = torch.arange(n_queries, device=device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device=device, dtype=torch.int64).clamp(0, n_keys)
        document = torch.searchsorted(bounds, query, right=True)  # empty documents are stepped over
        document = document.clamp(1, len(bounds) - 1)
        start, stop = bounds[document - 1][None], bounds[document][None]
        position = query[None]
    else:
        all_keys = torch.full((1, 1), n_keys, device=device)
        stop = all_keys if kv_lens is None else kv_lens.to(device).long()[:, None].clamp(0, n_keys)
        position = stop - n_queries + query
        start = torch.zeros_like(position)
        stop = stop.expand_as(position)
    end = torch.minimum(position + 1, stop).clamp(min=0) if causal else stop
    first = start if window is None else torch.maximum(start, position - window + 1)
    return VisibleKeys(first, end, position)
