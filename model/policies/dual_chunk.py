"""Dual Chunk Attention: no rotary distance beyond those of the trained length, and nothing left out."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.common.visibility import TILE
from model.config import ModelConfig
from model.policies.blocks import check_least
from model.policies.policy import Attended, SequenceView, SparsePolicy
from model.policies.selection import Selection, TokenSelection
from model.policies.window import refuse_dynamic
from model.rotary import turned
from model.softmax import HALF

FLASH_CHANNELS = 256  # of a head, at most


@dataclass(frozen=True)
class DualChunk(SparsePolicy):
    """Dual Chunk Attention (arXiv:2402.17463), for rotary models beyond their trained length.

    Keys count within chunks of farthest - local tokens; a query meets those of a chunk from as far as it is from the
    first of them, but at most from `farthest`. So its own chunk and the `local` tokens before have their true
    distances, and none is above `farthest`. Each query sees all keys. Up to farthest + 1 tokens it is dense attention.

    farthest: below the trained length; at least 2 local. The logarithmic factor on scores that the authors' code has,
    and their paper does not, is left out.
    """

    name: ClassVar[str] = "dual_chunk"
    farthest: int
    local: int

    def __post_init__(self) -> None:
        check_least(1, local=self.local)
        check_least(2 * self.local, farthest=self.farthest)

    @classmethod
    def of_trained_length(cls, tokens: int) -> "DualChunk":
        """The authors' setting: no distance above 3/4 of the trained length, 1/8 of it true. Raises ValueError below 8
        tokens."""
        check_least(8, trained_length=tokens)
        return cls(tokens * 3 // 4, tokens // 8)

    def check(self, config: ModelConfig) -> None:
        if config.positions != "rope":
            raise ValueError(f"positions is {config.positions!r}: {self.name} changes rotary ones, and there are none")
        if config.window is not None:
            raise ValueError(f"window is {config.window}: {self.name} is for models that attend to the whole text")
        refuse_dynamic(self, config)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        return TokenSelection(torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=k.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        """One chunk of keys after the other, as they are cached: queries behind it are turned to where they have the
        wanted distance from it."""
        position = torch.arange(q.shape[1], device=q.device) + view.query_start
        out, lse = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        chunk, n_keys = self.farthest - self.local, k.shape[1]
        for start in range(0, n_keys, chunk):
            stop = min(start + chunk, n_keys)
            # queries that stand in this chunk, and those behind it
            inside, behind = (max(0, edge - view.query_start) for edge in (start, stop))
            if inside < behind:
                first = view.query_start + inside  # keys before it are seen by all queries of the chunk
                merge(out, lse, slice(inside, behind), q[:, inside:behind], k, v, slice(start, first), view.scale)
                merge(out, lse, slice(inside, behind), q[:, inside:behind], k, v, slice(first, stop), view.scale, True)
            if behind < q.shape[1]:
                met_from = start + (position[behind:] - start).clamp(max=self.farthest)
                part = turned(q[:, behind:], position[behind:], met_from, view.frequencies).to(q.dtype)
                merge(out, lse, slice(behind, None), part, k, v, slice(start, stop), view.scale)
        kept, tiles = _all_pairs(position)
        return Attended(out.to(q.dtype), kept.expand(len(q)), kept, tiles.expand(len(q)), tiles)


def merge(
    out: Tensor, lse: Tensor, rows: slice, q: Tensor, k: Tensor, v: Tensor, keys: slice, scale: float,
    causal: bool = False,
) -> None:  # fmt: skip
    """Takes attention of the queries `rows` over further keys up into what they have already.

    out: float32 (H, Tq, D), attention over the keys before. lse: float32 (H, Tq), log of the sum of their exp(score).
    q: (H, rows, D), of `rows`. causal: query i sees key i and those before, for as many keys as queries.
    """
    if keys.start == keys.stop:
        return
    further, weight = attention_and_lse(q, k[:, keys], v[:, keys], scale, causal)
    both = torch.logaddexp(lse[:, rows], weight)
    before, share = (lse[:, rows] - both).exp(), (weight - both).exp()
    out[:, rows] = before[..., None] * out[:, rows] + share[..., None] * further.float()
    lse[:, rows] = both


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention (H, Tq, D) and the log of its sums, float32 (H, Tq), by torch's fused kernels, which
    scaled_dot_product_attention asks without the sums. q: (H, Tq, D), k and v: (G, Tk, D)."""
    repeat, size = len(q) // len(k), q.shape[2]
    k, v = (x.repeat_interleave(repeat, 0) for x in (k, v))
    q, k, v = (torch.nn.functional.pad(x, (0, -size % 8))[None] for x in (q, k, v))  # as the kernels want channels
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype in HALF and size <= FLASH_CHANNELS:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out[0, ..., :size], lse[0, :, : q.shape[2]].float()  # the last one's sums are padded


def _all_pairs(position: Tensor) -> tuple[Tensor, Tensor]:
    """int64 (): pairs of causal attention of queries at these positions, int64 (Tq,), in a row; 64 x 64 tiles that hold
    one."""
    last = (
        torch.cat([position[TILE - 1 :: TILE], position[-1:]]) if len(position) % TILE else position[TILE - 1 :: TILE]
    )
    return (position + 1).sum(), (last // TILE + 1).sum()
