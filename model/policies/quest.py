"""Quest: pages of keys, chosen by a bound of their scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.policies.block_attention import BlockPolicy
from model.policies.blocks import block_edges, check_least, top_count
from model.policies.policy import Phase, SequenceView
from model.policies.selection import BlockSelection


@dataclass(frozen=True)
class Quest(BlockPolicy):
    """Decoding reads the `pages` pages of keys whose scores have the largest upper bound (Quest, arXiv:2406.10774): the
    sum over channels of the larger of q * min and q * max, with the least and largest value of each channel in the page
    (eq. 1 and 2); the newest page always; everything in the first `dense_layers` layers. Dense where pages cover all
    keys.

    ALiBi's bias enters the bound at the page's nearest key. Pages count from the text's first key, and bounds are of
    the keys that a window leaves visible, so that rows of a cache choose as they would alone. Simplified: bounds are
    computed anew at each step, where the paper keeps them; the density does not count what reading them costs, 2 / page
    of the cache. The kernel (BlockPolicy) takes pages of multiples of 64, not the default.
    """

    name: ClassVar[str] = "quest"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    pages: int
    page: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_least(1, pages=self.pages, page=self.page)
        check_least(0, dense_layers=self.dense_layers)

    @property
    def sizes(self) -> tuple[int, int]:
        return 1, self.page

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> BlockSelection:
        offset = view.key_start % self.page
        if view.layer < self.dense_layers:
            n_pages = -(-(k.shape[1] + offset) // self.page)
            chosen = torch.ones(1, 1, n_pages, dtype=torch.bool, device=k.device)
        else:
            bound = self.bounds(q, k, view)
            bound[..., -1] = torch.inf
            chosen = top_count(bound, self.pages)[:, None]
        return BlockSelection(chosen, *self.sizes, key_offset=offset)

    def bounds(self, q: Tensor, k: Tensor, view: SequenceView) -> Tensor:
        """Upper bounds of the scores of one query, (H, 1, D), in each page: float32 (H, pages), -inf where it sees none
        of the page's keys."""
        n_keys, offset = k.shape[1], view.key_start % self.page
        hidden = ~view.visible(slice(0, 1), n_keys, k.device)[0, :, None]  # [keys, 1]
        pad = (0, 0, offset, -(n_keys + offset) % self.page)

        def least_of(x: Tensor) -> Tensor:
            """Of each page and channel: (G, keys, D) -> (G, pages, D)."""
            padded = torch.nn.functional.pad(x.masked_fill(hidden, torch.inf), pad, value=torch.inf)
            return padded.unflatten(1, (-1, self.page)).amin(2)

        least, largest = least_of(k.float()), -least_of(-k.float())
        query = q.float().unflatten(0, (len(k), -1))  # [G, H / G, 1, D]
        per_channel = torch.maximum(query * least[:, None], query * largest[:, None])  # [G, H / G, pages, D]
        bound = per_channel.sum(-1).flatten(0, 1) * view.scale
        nearest = block_edges(n_keys + offset, self.page, k.device)[1] - offset
        if view.alibi_slopes is not None:
            bound = bound - view.alibi_slopes[:, None] * (view.query_start - nearest)
        if view.window is not None:
            bound = bound.masked_fill(view.query_start - nearest >= view.window, -torch.inf)
        return bound
