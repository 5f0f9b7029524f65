"""What plain PyTorch reaches in an input dtype: the yardstick of the kernels' rounding errors. Dense, one call."""

import torch
from torch import Tensor

NEWTON_STEPS = 40


def _threshold(z: Tensor, alpha: Tensor) -> Tensor:
    """tau (..., 1) with sum(max(z - tau, 0) ** beta) = 1, by Newton's method on the norm form from -1, which climbs to
    the root and, but for rounding, never passes it. z: row maxima 0."""
    beta = 1 / (alpha - 1)
    tau = torch.full_like(z[..., :1], -1)
    for _ in range(NEWTON_STEPS):
        u = (z - tau).clamp(min=0)
        w = torch.where(u > 0, u, 1) ** (beta - 1) * (u > 0)
        total, slope = (w * u).sum(-1, keepdim=True), w.sum(-1, keepdim=True)
        norm = total ** (alpha - 1)
        step = (norm - 1) * norm ** (beta - 1) / slope
        tau = tau + step.clamp(min=0)
        if not bool((step > torch.finfo(z.dtype).eps).any()):
            break
    return tau


@torch.no_grad()
def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    alpha: Tensor,
    cu_seqlens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Causal entmax attention and its gradients, written out (no autograd).

    Scores, thresholds and sums in float32 (float64 for float64 inputs); only p, w and ds are rounded to the inputs'
    dtype, before their products.

    Args:
        q, grad: (1, H, Tq, D), k, v: (1, G, T, D), one dtype; the last query sees all keys. alpha: (H,). cu_seqlens
            (Tq = T), alibi_slopes: as in kernels.entmax_attention.

    Returns: out, dq, dk, dv in the inputs' dtype and, wider, dalpha (H,), tau (1, H, Tq) as in u = max(z - tau, 0),
    z = (alpha - 1) * score, and z_max, the largest |z| of visible scores (a scalar).
    """
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    q, k, v, grad = (x.detach().to(wide) for x in (q, k, v, grad))
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    alpha = alpha.detach().to(wide)[:, None, None]
    beta, scale = 1 / (alpha - 1), q.shape[-1] ** -0.5

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    z, hidden = _scaled_scores(q, k, alpha, scale, cu_seqlens, alibi_slopes)
    top = z.amax(-1, keepdim=True)  # finite: a query sees itself
    tau = _threshold(z - top, alpha)
    u = (z - top - tau).clamp(min=0)
    w = torch.where(u > 0, u, 1) ** (beta - 1) * (u > 0)
    p = w * u
    p = p / p.sum(-1, keepdim=True)
    out = rounded(p) @ v

    w_sum = w.sum(-1, keepdim=True)
    delta = (grad * ((rounded(w) @ v) / w_sum)).sum(-1, keepdim=True)
    dp = grad @ v.transpose(-1, -2) - delta
    ds = rounded(w * dp)
    dalpha = (beta**2 * dp * p * (1 - torch.where(u > 0, u, 1).log())).sum((0, 2, 3))

    def shared(x: Tensor) -> Tensor:  # sums over the query heads of a key/value head
        return x.unflatten(1, (-1, repeat)).sum(2).to(dtype)

    return dict(
        out=out.to(dtype),
        dq=(ds @ k * scale).to(dtype),
        dk=shared(ds.transpose(-1, -2) @ q * scale),
        dv=shared(rounded(p).transpose(-1, -2) @ grad),
        dalpha=dalpha,
        tau=(top + tau)[..., 0],
        z_max=z.masked_fill(hidden, 0).abs().max(),
    )


def _scaled_scores(
    q: Tensor, k: Tensor, alpha: Tensor, scale: float, cu_seqlens: Tensor | None, alibi_slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(alpha - 1) times the scores, (1, H, Tq, T), -inf where keys are hidden, and bool where they are.

    q, k: of as many heads. alpha: (H, 1, 1).
    """
    position = torch.arange(k.shape[2], device=q.device)
    distance = position[-q.shape[2] :, None] - position
    hidden = distance < 0
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, position, right=True)
        hidden = hidden | (document[:, None] != document)
    scores = q @ k.transpose(-1, -2) * scale
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance
    return ((alpha - 1) * scores).masked_fill(hidden, -torch.inf), hidden
