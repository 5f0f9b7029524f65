"""What the indexer learns from (DeepSeek-V3.2-Exp, equations 3 and 4): its scores' distance to attention's weights."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.block_sparse.attention import BACKENDS
from kernels.common.backends import choose_backend
from kernels.lightning_indexer.indexer import indexer_loss, unsupported_loss
from model.dsa.indexer import IndexInputs, head_scores, wide
from model.dsa.tokens import Tokens
from model.visible_attention import View, blocks_of_rows, keys_of, mask_and_bias


def index_loss(
    index: IndexInputs,
    q: Tensor,
    k: Tensor,
    tokens: Tokens,
    slopes: Tensor | None,
    chosen: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """sum_t KL(p_t || softmax(I_t)) over the visible keys, or those of them that are chosen, in nats, float32 (float64
    for such): a scalar that only `index` gets gradients from. p: the softmax weights of these keys, averaged over the
    heads, which sums to 1.

    Scores of all queries and keys never exist at once: the gradient is computed with the loss, in blocks of rows.

    Args:
        q: (B, H, n, D), k: (B, G, keys, D), of attention.
        slopes: of ALiBi, float32 (H,) or None.
        chosen: bits, as `select_tokens` gives them, None for all that is visible.
        backend: "triton" (kernels.lightning_indexer: CUDA, or the CPU under TRITON_INTERPRET=1; not float64), "torch"
            or "auto": triton on CUDA where it can, else torch.
    """
    if choose_backend(backend, BACKENDS, q, unsupported_loss(q, index.q)) == "triton":
        seen = tokens.first_key, tokens.own_key
        return indexer_loss(*index, q, k, *seen, chosen=chosen, alibi_slopes=slopes)
    loss: Tensor = _IndexLoss.apply(*index, q.detach(), k.detach(), tokens.view(slopes, chosen))
    return loss


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, index_k: Tensor, weights: Tensor, q: Tensor, k: Tensor, view: View
    ) -> Tensor:
        given = IndexInputs(index_q, index_k, weights)
        with torch.autocast(q.device.type, enabled=False):
            index = wide(given)
            gradients = IndexInputs(*(torch.zeros_like(x) for x in index))
            heads = max(q.shape[1], index_q.shape[1])
            loss = index.q.new_zeros(())
            for rows in blocks_of_rows(q.shape[2], k.shape[2], view.reach, q.shape[0] * heads, q.device):
                loss += _add_rows(index, q, k, view, rows, gradients)
        ctx.dtypes = [x.dtype for x in given]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((grad * one).to(dtype) for one, dtype in parts), None, None, None)


def _add_rows(index: IndexInputs, q: Tensor, k: Tensor, view: View, rows: slice, gradients: IndexInputs) -> Tensor:
    """The loss of some queries, which adds its gradients to `gradients`."""
    keys = keys_of(view, rows, k)
    row, key = (torch.arange(one.start, one.stop, device=q.device) for one in (rows, keys))
    mask, bias = mask_and_bias(view, (q.shape[0], q.shape[1]), row, key)  # [B or 1, 1, rows, keys]
    p = _mean_weights(q[:, :, rows], k[:, :, keys], mask, bias)
    by_head, w = head_scores(index, rows, keys), index.weights[:, :, rows, None]
    scores = (by_head * w).sum(1).masked_fill(~mask[:, 0], -torch.inf)
    log_q = scores.log_softmax(-1)
    loss = (p.xlogy(p) - p * log_q.masked_fill(~mask[:, 0], 0.0)).sum()
    d_scores = (log_q.exp() - p)[:, None]  # [B, 1, rows, keys]
    gradients.weights[:, :, rows] = (by_head * d_scores).sum(-1)
    d_products = (d_scores * w).mul_(by_head.gt(0))  # [B, index_heads, rows, keys]
    gradients.q[:, :, rows] = d_products @ index.k[:, None, keys]
    gradients.k[:, keys] += (d_products.mT @ index.q[:, :, rows]).sum(1)
    return loss


def _mean_weights(q: Tensor, k: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax weights of attention, averaged over heads: (B, rows, keys)."""
    dtype, groups = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    grouped = q.to(dtype).unflatten(1, (groups, -1)) * q.shape[-1] ** -0.5
    scores = (grouped @ k.to(dtype)[:, :, None].mT).flatten(1, 2)  # [B, H, rows, keys]
    if bias is not None:
        scores += bias
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1).mean(1)
