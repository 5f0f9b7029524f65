"""Alpha-entmax attention in PyTorch, a block of query rows at a time: the CPU path, with its own backward.

Per (batch, head, query) the forward pass keeps three numbers: row maximum, threshold and normaliser. Memory beyond
inputs and outputs is one block of scores (`BLOCK_ELEMENTS`) and a few temporaries of its size; time is that of the
visible keys, rounded up to blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.common.autocast import outside_autocast
from kernels.common.backends import operator_name
from kernels.common.derivatives import once
from kernels.common.stats import count_live_tiles
from kernels.common.visibility import TILE, VisibleKeys, visible_keys

# scores held at once: on CPU 1 MiB of float32, whose temporaries stay in cache; else 128 MiB, for few launches
BLOCK_ELEMENTS = {"cpu": 2**18}
DEVICE_BLOCK_ELEMENTS = 2**25
CAUSAL_BLOCKS = 8  # blocks of rows per widest row at least: one block would compute all scores above the diagonal
MAX_NEWTON_STEPS = 60  # a bound only: Gaussian rows of 2048 scores took 2 to 8 for alpha 1.01 to 2


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Blocks:
    """Walks over (batch x key/value head) groups and blocks of query rows; computes shifted scores z of one block.

    P: groups of a chunk, R: query heads per key/value head, M: rows of the block, N: keys of the block.
    """

    def __init__(
        self, q: Tensor, k: Tensor, alpha: Tensor, visible: VisibleKeys, scale: float, alibi_slopes: Tensor | None
    ):
        self.dtype = _accumulation_dtype(q.dtype)
        self.batch, self.heads, self.n_queries, self.head_dim = q.shape
        self.kv_heads = k.shape[1]
        self.repeat = self.heads // self.kv_heads
        self.visible, self.scale = visible, scale
        self.q, self.k = self.split_heads(q), k.flatten(0, 1)
        self.alpha = self.per_group(alpha)
        self.slopes = None if alibi_slopes is None else self.per_group(alibi_slopes)
        widest = max((hi - lo for lo, hi, _ in visible.blocks(TILE)), default=1)
        budget = BLOCK_ELEMENTS.get(q.device.type, DEVICE_BLOCK_ELEMENTS)
        rows = min(budget // max(1, self.repeat * widest), -(-widest // CAUSAL_BLOCKS), self.n_queries)
        self.rows = -(-max(rows, 1) // TILE) * TILE
        self.groups = max(1, budget // max(1, self.repeat * min(self.rows, self.n_queries) * widest))
        self.blocks = visible.blocks(self.rows)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, T, ...) -> (B * G, R, T, ...): query heads beside the key/value head they share."""
        return x.unflatten(1, (self.kv_heads, self.repeat)).flatten(0, 1)

    def per_group(self, x: Tensor) -> Tensor:
        """(H,) -> (B * G, R, 1, 1) in the computing dtype."""
        return x.to(self.dtype).view(self.kv_heads, self.repeat, 1, 1).repeat(self.batch, 1, 1, 1)

    def __iter__(self) -> Iterator[tuple[slice, slice, slice, bool]]:
        """Yields (groups, rows, keys, full): three slices and whether every row sees every key of the block."""
        for start in range(0, self.batch * self.kv_heads, self.groups):
            groups = slice(start, min(start + self.groups, self.batch * self.kv_heads))
            for index, (lo, hi, full) in enumerate(self.blocks):
                rows = slice(index * self.rows, min((index + 1) * self.rows, self.n_queries))
                if hi > lo:
                    yield groups, rows, slice(lo, hi), full

    def tile(self, x: Tensor, groups: slice, rows: slice) -> Tensor:
        """Rows of a per-head tensor (B * G, R, T, D) as (P, R * M, D) in the computing dtype."""
        return x[groups, :, rows].flatten(1, 2).to(self.dtype)

    def scores(self, q: Tensor, k: Tensor, groups: slice, rows: slice, keys: slice, full: bool) -> Tensor:
        """z = (alpha - 1) * (scale * q . k + bias), (P, R, M, N), -inf where invisible.

        q: (P, R * M, D), k: (P, N, D).
        """
        z = (q @ k.transpose(1, 2)).view(q.shape[0], self.repeat, -1, k.shape[1])
        z *= (self.alpha[groups] - 1) * self.scale
        if self.slopes is not None:
            key = torch.arange(keys.start, keys.stop, device=z.device, dtype=self.dtype)
            distance = self.visible.position[:, rows, None].to(self.dtype) - key
            z.addcmul_(self.slopes[groups] * (1 - self.alpha[groups]), self._of_groups(distance, groups))
        if not full:
            mask = self.visible.mask(rows.start, rows.stop, keys.start, keys.stop)
            z.masked_fill_(~self._of_groups(mask, groups), -torch.inf)
        return z

    def _of_groups(self, x: Tensor, groups: slice) -> Tensor:
        """(B or 1, M, N) -> (P or 1, 1, M, N)."""
        if x.shape[0] > 1:
            x = x[torch.arange(groups.start, groups.stop, device=x.device) // self.kv_heads]
        return x[:, None]


def _support_powers(z: Tensor, tau: Tensor, beta: Tensor, plain: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """u = max(z - tau, 0) and w = u ** (beta - 1) with w = 0 outside the support.

    plain: alpha is 1.5 throughout, where w = u and no power is needed.
    """
    u = torch.sub(z, tau, out=out).clamp_(min=0)
    if plain:
        return u, u
    # exp2(x log2 u) is faster than pow, but only away from log2(0), whose slow path costs ten times the rest;
    # sign(u) then gives exact zeros
    w = u.clamp(min=torch.finfo(u.dtype).tiny).log2_().mul_(beta - 1).exp2_()
    return u, w.mul_(u.sign())


def _solve(z: Tensor, alpha: Tensor, plain: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Threshold of each row of z (row maximum 0) by norm-form Newton from -1, which never passes the root.

    With S = sum u ** beta and S1 = sum u ** (beta - 1), the step on N = S ** (1 / beta) is
    (N - 1) N ** (beta - 1) / S1 = S ** (2 - alpha) * expm1((alpha - 1) log S) / S1; it is exact for a uniform row.
    Returns tau, S, u, w.
    """
    beta = 1 / (alpha - 1)
    tau = torch.full_like(z[..., :1], -1)
    tolerance = torch.finfo(z.dtype).eps
    buffer = torch.empty_like(z)
    for _ in range(MAX_NEWTON_STEPS):
        u, w = _support_powers(z, tau, beta, plain, buffer)
        norm, slope = torch.linalg.vecdot(w, u)[..., None], w.sum(-1, keepdim=True)
        log_norm = norm.log()
        step = ((2 - alpha) * log_norm).exp_() * torch.expm1((alpha - 1) * log_norm) / slope
        if not bool((step > tolerance).any()):
            break
        tau += step.nan_to_num_(nan=0.0, posinf=0.0).clamp_(min=0)
    return tau, norm, u, w


def _is_plain(alpha: Tensor) -> bool:
    return bool((alpha == 1.5).all())


def _visible(
    q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None, kv_lens: Tensor | None, window: int | None
) -> VisibleKeys:
    return visible_keys(
        q.shape[2],
        k.shape[2],
        causal=causal,
        cu_seqlens=cu_seqlens,
        kv_lens=kv_lens,
        window=window,
        device=q.device,
    )


@torch.library.custom_op(operator_name("entmax_blockwise"), mutates_args=())
@outside_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns out (B, H, Tq, D); rows (3, B, H, Tq): maximum of z, threshold minus maximum, normaliser; support (B,
    H, Tq) and live tiles (B, H), both empty unless with_stats."""
    if q.numel() == 0 or k.numel() == 0:
        return _nothing(q, with_stats)
    visible = _visible(q, k, causal, cu_seqlens, kv_lens, window)
    blocks = _Blocks(q, k, alpha, visible, scale, alibi_slopes)
    v = v.flatten(0, 1)
    out = torch.zeros_like(blocks.q, memory_format=torch.contiguous_format)
    rows_shape = blocks.q.shape[:3]
    saved = torch.zeros(3, *rows_shape, dtype=blocks.dtype, device=q.device)
    support = torch.zeros(rows_shape if with_stats else (0, 1, 1), dtype=torch.int32, device=q.device)
    live = torch.zeros(rows_shape[:2] if with_stats else (0, 1), dtype=torch.int64, device=q.device)
    plain = _is_plain(alpha)
    for groups, rows, keys, full in blocks:
        k_block, v_block = (x[groups, keys].to(blocks.dtype) for x in (blocks.k, v))
        z = blocks.scores(blocks.tile(blocks.q, groups, rows), k_block, groups, rows, keys, full)
        top = z.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)  # rows that see nothing: u and the output become 0
        tau, norm, u, w = _solve(z.sub_(top), blocks.alpha[groups], plain)
        p = torch.mul(w, u, out=z).div_(norm.where(norm > 0, 1))
        out[groups, :, rows] = (p.flatten(1, 2) @ v_block).view(*p.shape[:3], -1).to(out.dtype)
        saved[:, groups, :, rows] = torch.stack([top, tau, norm]).squeeze(-1)
        if with_stats:
            positive = u > 0
            support[groups, :, rows] = positive.sum(-1, dtype=torch.int32)
            live[groups] += count_live_tiles(positive, keys.start)
    support, live = support.view(-1, *q.shape[1:3]), live.view(-1, q.shape[1])
    return out.view(q.shape), saved.view(3, *q.shape[:3]), support, live


def _nothing(q: Tensor, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What _forward returns where no query sees a key: zeros."""
    batch, heads, n_queries = q.shape[:3]
    saved = q.new_zeros((3, batch, heads, n_queries), dtype=_accumulation_dtype(q.dtype))
    stats = batch if with_stats else 0
    support = q.new_zeros((stats, heads, n_queries), dtype=torch.int32)
    return q.new_zeros(q.shape), saved, support, q.new_zeros((stats, heads), dtype=torch.int64)


@_forward.register_fake
def _(q, k, v, alpha, scale, causal, cu_seqlens, kv_lens, alibi_slopes, window, with_stats):
    return _nothing(q, with_stats)


@torch.library.custom_op(operator_name("entmax_blockwise_backward"), mutates_args=())
@outside_autocast
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    saved: Tensor,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    with_dalpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v and dalpha (H,) in alpha's (0 unless with_dalpha). With dP = grad . v and
    delta = sum w dP / sum w:

    ds = w (dP - delta),    dalpha = beta ** 2 * sum (dP - delta) p (1 - log u)    (s held fixed)
    """
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), torch.zeros_like(alpha)
    visible = _visible(q, k, causal, cu_seqlens, kv_lens, window)
    blocks = _Blocks(q, k, alpha, visible, scale, alibi_slopes)
    grad, saved = blocks.split_heads(grad), saved.unflatten(2, (blocks.kv_heads, blocks.repeat)).flatten(1, 2)
    v = v.flatten(0, 1)
    dq = torch.zeros_like(blocks.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=blocks.dtype, device=q.device) for x in (blocks.k, v))
    dalpha = torch.zeros_like(blocks.alpha)
    plain = _is_plain(alpha)
    for groups, rows, keys, full in blocks:
        q_tile, grad_tile = blocks.tile(blocks.q, groups, rows), blocks.tile(grad, groups, rows)
        k_block, v_block = (x[groups, keys].to(blocks.dtype) for x in (blocks.k, v))
        z = blocks.scores(q_tile, k_block, groups, rows, keys, full)
        top, tau, norm = saved[:, groups, :, rows, None]
        beta = 1 / (blocks.alpha[groups] - 1)
        u, w = _support_powers(z.sub_(top), tau, beta, plain, None)
        p = torch.mul(w, u, out=z).div_(norm.where(norm > 0, 1))
        dv[groups, keys] += p.flatten(1, 2).transpose(1, 2) @ grad_tile
        dp = (grad_tile @ v_block.transpose(1, 2)).view_as(z)
        w_sum = w.sum(-1, keepdim=True)
        dp -= torch.linalg.vecdot(w, dp)[..., None] / w_sum.where(w_sum > 0, 1)
        if with_dalpha:
            entropy_like = torch.where(u > 0, u, 1).log_().neg_().add_(1).mul_(p)
            # sum w dp is 0 but for rounding in delta, which the terms of a row would add up
            rest = torch.linalg.vecdot(w, dp) / w_sum.where(w_sum > 0, 1)[..., 0]
            terms = torch.linalg.vecdot(entropy_like, dp) - rest * entropy_like.sum(-1)
            dalpha[groups] += (beta * beta) * terms.sum(-1)[..., None, None]
        ds = dp.mul_(w).flatten(1, 2)
        dq[groups, :, rows] = (ds @ k_block).mul_(scale).view(*z.shape[:3], -1).to(dq.dtype)
        dk[groups, keys] += (ds.transpose(1, 2) @ q_tile).mul_(scale)
    dalpha = dalpha.view(blocks.batch, blocks.heads).sum(0).to(alpha.dtype)
    return dq.view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(k.shape).to(k.dtype), dalpha


@_backward.register_fake
def _(grad, q, k, v, alpha, saved, scale, causal, cu_seqlens, kv_lens, alibi_slopes, window, with_dalpha):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(alpha)


def _setup_context(ctx, inputs, output):
    q, k, v, alpha, scale, causal, cu_seqlens, kv_lens, alibi_slopes, window, _ = inputs
    _, saved, support, live = output
    ctx.save_for_backward(q, k, v, alpha, saved, cu_seqlens, kv_lens, alibi_slopes)
    ctx.scale, ctx.causal, ctx.window = scale, causal, window
    ctx.mark_non_differentiable(saved, support, live)


def _autograd_backward(ctx, grad, *_):
    q, k, v, alpha, saved, cu_seqlens, kv_lens, alibi_slopes = ctx.saved_tensors
    with torch.no_grad():
        gradients = _backward(
            grad,
            q,
            k,
            v,
            alpha,
            saved,
            ctx.scale,
            ctx.causal,
            cu_seqlens,
            kv_lens,
            alibi_slopes,
            ctx.window,
            ctx.needs_input_grad[3],
        )
    return *once(gradients, grad, q, k, v, alpha), *(None,) * 7


torch.library.register_autograd(operator_name("entmax_blockwise"), _autograd_backward, setup_context=_setup_context)

entmax_attention_blockwise = _forward
