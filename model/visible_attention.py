"""Softmax attention over what a function lets each query see: FlexAttention on CUDA, else torch's attention with masks,
for as many queries at a time as keep these small. Of kinds of attention that are trained sparse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from model.block_masks import Visible, block_mask_of_intervals
from model.softmax import FLEX_SCORES, MASK_ELEMENTS, compiled_flex, steady_backends

# float32 scores of one block of rows, 16 MiB or 128 MiB, and a few temporaries of their size, where keys are rated
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}
AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # of checkpoint
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]  # (b, i, j) -> tokens between query i and key j


@dataclass(frozen=True)
class View:
    """What queries see.

    visible: (b, h, i, j) -> bool. bias: (b, h, i, j) -> what is added to scores, float, or None; it may hold a tensor
    that requires grad. first_key, last_key: int64 (b or 1, n), the keys from and up to which each query may see some.
    reach: as in `reached`.
    """

    visible: Visible
    bias: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    first_key: Tensor
    last_key: Tensor
    reach: int | None = None


def alibi(slopes: Tensor | None, distance: Distance) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """A View's bias. slopes: float32 (H,) or None."""
    if slopes is None:
        return None
    return lambda b, h, i, j: -slopes[h] * distance(b, i, j)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, view: View | Callable[[Tensor], View], learned: Tensor | None = None
) -> Tensor:
    """Softmax attention over what is visible; 0 for queries that see nothing. q: (B, H, n, D), k and v:
    (B, G, keys, D). Where gradients are wanted and one block of rows does not hold all, backward computes each block's
    weights again. learned: what `view` makes a View of whose bias has a gradient; then backward always does, since
    torch keeps several times the weights under such a bias."""
    rows = max(16, MASK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [slice(start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows)]
    if not torch.is_grad_enabled() or (len(parts) == 1 and learned is None):
        return torch.cat([_attend_rows(q, k, v, view, learned, part) for part in parts], dim=2)
    # an argument by itself: what a function holds would outlive the recomputation of whole layers
    return torch.cat([checkpoint(_attend_rows, q, k, v, view, learned, part, **AGAIN) for part in parts], dim=2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, view: View | Callable[[Tensor], View], learned: Tensor | None, rows: slice
) -> Tensor:
    """rows: of the queries that are attended with."""
    if not isinstance(view, View):
        assert learned is not None
        view = view(learned)
    keys = keys_of(view, rows, k)
    query, key = (torch.arange(one.start, one.stop, device=q.device) for one in (rows, keys))
    mask, bias = mask_and_bias(view, (q.shape[0], q.shape[1]), query, key)
    seen = mask.any(-1, keepdim=True)
    mask = mask | ~seen  # weights of no key would be 0 / 0
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
    with sdpa_kernel(steady_backends(q, masked=True)):
        out = scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out * seen


def keys_of(view: View, rows: slice, k: Tensor) -> slice:
    """Those of k (B, G, keys, D) that the queries `rows` may see; on CUDA, where asking would wait, those within
    reach."""
    if k.is_cuda:
        return reached(rows, k.shape[2], view.reach)
    return slice(int(view.first_key[:, rows].min()), int(view.last_key[:, rows].max()) + 1)


def reached(rows: slice, n_keys: int, reach: int | None) -> slice:
    """Keys among which are all that the queries `rows` see, without asking the device.

    Args:
        reach: tokens that a query sees at most, up to itself, where query i is key i. None where these differ.
    """
    return slice(0, n_keys) if reach is None else slice(max(0, rows.start - reach + 1), min(rows.stop, n_keys))


def blocks_of_rows(
    n_queries: int, n_keys: int, reach: int | None, scores: int, device: torch.device, stride: int = 1
) -> list[slice]:
    """All queries, as many at a time as SCORES_AT_ONCE allows.

    Args:
        reach: as in `reached`, in tokens. stride: tokens of each of n_keys. scores: of a query and key, as B * heads.
    """
    width = n_keys if reach is None else min(n_keys, -(-2 * reach // stride))  # of a block of at most `reach` rows
    rows = max(1, min(SCORES_AT_ONCE[device.type] // (scores * width), n_queries if reach is None else reach))
    return [slice(start, min(start + rows, n_queries)) for start in range(0, n_queries, rows)]


def mask_and_bias(view: View, heads: tuple[int, int], rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is visible, bool, and what is added to scores, or None; both (B or 1, H or 1, rows, keys). heads: B and H.
    rows, keys: int64, indices."""
    b, h = (torch.arange(size, device=rows.device) for size in heads)
    b, h, i = b[:, None, None, None], h[:, None, None], rows[:, None]
    mask = view.visible(b, h, i, keys)
    mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    return mask, None if view.bias is None else view.bias(b, h, i, keys)


def uses_flex(device: torch.device, n_queries: int, n_keys: int) -> bool:
    """Whether queries are attended with by `attend_flex`: fewer scores take less than compiling it."""
    return device.type == "cuda" and n_queries > 1 and n_queries * n_keys > FLEX_SCORES


def attend_flex(q: Tensor, k: Tensor, v: Tensor, view: View, block_mask: BlockMask) -> Tensor:
    """As attend_masked, by FlexAttention, which skips tiles that block_mask leaves out."""
    bias = view.bias

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + bias(b, h, i, j)

    out: Tensor = compiled_flex()(
        q, k, v, score_mod=None if bias is None else score_mod, block_mask=block_mask,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out


def block_mask_of_view(view: View, n_keys: int, exact: bool = True) -> BlockMask:
    """exact: each query of the view sees all keys between its first and last."""
    return block_mask_of_intervals(view.visible, view.first_key, view.last_key, n_keys, exact)
