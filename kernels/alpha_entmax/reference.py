"""Alpha-entmax attention in dense PyTorch: the truth that every faster path is tested against.

Float64-capable, any alpha in (1, 2], differentiable in q, k, v and alpha by autograd alone (no hand-written
backward), O(Tq * Tk) memory. Entmax: Peters et al. 2019 (arXiv:1905.05702); learnable alpha: Correia et al. 2019
(arXiv:1909.00015).
"""

import math

import torch
from torch import Tensor

from kernels.common.autocast import outside_autocast
from kernels.common.stats import AttentionStats, count_live_tiles
from kernels.common.visibility import VisibleKeys


def _powers(u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """u ** beta and u ** (beta - 1), 0 outside the support (0 ** 0 would be 1 at alpha = 2). NaN stays NaN. No power of
    0 is taken: above alpha = 1.5 its second derivative is infinite."""
    inside = ~(u <= 0)
    u = torch.where(inside, u, 1)
    return u**beta * inside, u ** (beta - 1) * inside


def _bisect_threshold(z: Tensor, alpha: Tensor) -> Tensor:
    """The tau with sum(max(z - tau, 0) ** (1 / (alpha - 1))) = 1 over the last dim, by bisection to the dtype's
    precision.

    z: (..., n) with the row maximum at 0, so that tau lies in [-1, 0). Bisection shares no idea with the fast paths'
        Newton steps.
    """
    lo = torch.full_like(z[..., :1], -1)
    hi = torch.zeros_like(lo)
    for _ in range(4 - round(math.log2(torch.finfo(z.dtype).eps))):
        middle = (lo + hi) / 2
        too_low = ((z - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        lo = torch.where(too_low, middle, lo)
        hi = torch.where(too_low, hi, middle)
    return lo


def entmax_reference(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """Alpha-entmax along one dimension: exact zeros, rows sum to 1; softmax as alpha -> 1, sparsemax at alpha = 2.
    Nothing is checked here.

    Args:
        x: scores, floating point, any shape. -inf entries get exactly 0; a slice that is -inf throughout gives 0
            throughout.
        alpha: in (1, 2]; a number or a tensor that broadcasts against x with size 1 at `dim`. May require grad.
        dim: the dimension that sums to 1.

    Returns: probabilities, shape and dtype of x; twice differentiable in x and alpha.

    The threshold is found without gradient. A Newton step from it, taken with gradient, is off by the square of the
    distance to the true threshold, and so has its first derivative; a second step is off by the fourth power, and has
    the second derivative (and the third) too. Their values move by rounding only.
    """
    if x.numel() == 0:
        return x * alpha  # differentiable in both
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    x = x.movedim(dim, -1)
    if alpha.dim() > 0:
        alpha = alpha.reshape((1,) * (x.dim() - alpha.dim()) + alpha.shape).movedim(dim, -1)
    visible = x != -torch.inf  # NaN is visible and spoils its row
    top = torch.where(visible, x, -torch.inf).amax(-1, keepdim=True).detach()
    z = (alpha - 1) * (
        torch.where(visible, x, 0) - torch.where(top > -torch.inf, top, 0)
    )  # finite: -inf would make alpha's gradient NaN
    z = torch.where(visible, z, -torch.inf)
    beta = 1 / (alpha - 1)
    with torch.no_grad():
        tau = _bisect_threshold(z, alpha)
    for _ in range(2):
        p, w = _powers(z - tau, beta)
        total, slope = p.sum(-1, keepdim=True), beta * w.sum(-1, keepdim=True)
        tau = torch.where(total > 0, tau + (total - 1) / torch.where(slope > 0, slope, 1), tau)
    return _powers(z - tau, beta)[0].movedim(-1, dim)


@outside_autocast
def entmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    visible: VisibleKeys,
    scale: float,
    alibi_slopes: Tensor | None,
    return_stats: bool,
) -> tuple[Tensor, AttentionStats | None]:
    """Dense attention. Shapes as in `kernels.entmax_attention`; alpha (H,) in the computing dtype; nothing is
    checked here."""
    n_heads, n_queries, n_keys = q.shape[1], q.shape[2], k.shape[2]
    repeat = n_heads // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    dtype = q.dtype
    q, k, v = (x.to(alpha.dtype) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale  # [B, H, Tq, Tk]
    if alibi_slopes is not None:
        distance = visible.position[:, :, None] - torch.arange(n_keys, device=q.device)
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance[:, None]
    mask = visible.mask(0, n_queries, 0, n_keys)[:, None]
    p = entmax_reference(scores.masked_fill(~mask, -torch.inf), alpha[:, None, None])
    out = (p @ v).to(dtype)
    if not return_stats:
        return out, None
    live = p.detach() > 0
    total = visible.total_tiles().expand(q.shape[0])
    return out, AttentionStats(live.sum(-1, dtype=torch.int32), count_live_tiles(live, 0), total)
