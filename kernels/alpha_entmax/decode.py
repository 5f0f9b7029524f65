"""Decoding: one query per row and head against a cache of keys, split over the keys so that one row fills a GPU.

Forward only. The scores of a row are few enough to keep (4 bytes a key and head), so that the threshold is found
without reading keys again; values are read in tiles with weight only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.alpha_entmax.threshold import MAX_STEPS, TOLERANCE, is_far, newton_step, norm_and_slope, support_power
from kernels.alpha_entmax.tuning import DECODING, decode_launch
from kernels.common.launching import bfloat16_as_float32, ceil_div, on_device, padded_head_dim, strides, unit_stride
from kernels.common.tiles import add_position_bias, head_offset, load_rows, nan_maximum
from kernels.common.tuning import program_count
from kernels.common.visibility import TILE

SOLVER_BLOCK = 8192  # scores that the solver takes at a time
LENGTHS = ["n_keys", "n_tiles", "span", "window"]


@triton.jit
def visible_range(p_kv_lens, i_batch, n_keys, window, KEY_LENGTHS: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [first, length) that the query of a batch row sees; it stands at the last of them."""
    length = n_keys
    if KEY_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(p_kv_lens + i_batch), 0), n_keys)  # nobody has looked at it
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    return first, length


@triton.jit
def group_heads(i_bg, heads, repeat, ROWS: tl.constexpr):
    """A program's batch row and key head; query heads, which of these ROWS there are, and their place in (B, H)."""
    groups = heads // repeat
    i_batch, i_group = i_bg // groups, i_bg % groups
    member = tl.arange(0, ROWS)
    head = i_group * repeat + member
    return i_batch, i_group, head, member < repeat, (i_batch * heads + head).to(tl.int64)


@triton.jit
def part_of(i_part, span, first, length, TILE: tl.constexpr):
    """Tiles [lo, hi) of a part of `span` tiles that hold visible keys."""
    lo = tl.maximum(i_part * span, first // TILE)
    return lo, tl.minimum((i_part + 1) * span, (length + TILE - 1) // TILE)


@triton.jit(do_not_specialize=LENGTHS)
def decode_scores(
    p_q, p_k, p_alpha, p_slopes, p_kv_lens, p_z, p_best,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt,
    scale, heads, repeat, n_keys, n_tiles, span, window,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BIAS: tl.constexpr, KEY_LENGTHS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """z of `span` tiles of keys for all query heads of a key head, and the largest of each tile.

    p_z: float32 (B, H, Tk), -inf where invisible. p_best: float32 (B, H, tiles). Tiles that the row does not see are
    not written. Grid: (B * G, parts).
    """
    i_part = tl.program_id(1)
    i_batch, i_group, head, inside, o_bh = group_heads(tl.program_id(0), heads, repeat, ROWS)
    dim = tl.arange(0, BD)
    o_q = i_batch.to(tl.int64) * stride_qb + head[:, None] * stride_qh
    q = tl.load(p_q + o_q + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0)  # [ROWS, BD]
    z_scale = (tl.load(p_alpha + head, mask=inside, other=2.0) - 1) * scale
    slope = tl.zeros([ROWS], tl.float32)
    if BIAS:
        slope = tl.load(p_slopes + head, mask=inside, other=0.0) / scale
    first, length = visible_range(p_kv_lens, i_batch, n_keys, window, KEY_LENGTHS, WINDOW)
    p_keys = p_k + head_offset(i_batch, i_group, stride_kb, stride_kh)
    lo, hi = part_of(i_part, span, first, length, TILE)
    for tile in tl.range(lo, hi, num_stages=STAGES):
        k = load_rows(p_keys, tile * TILE, stride_kt, n_keys, TILE, D, BD, True)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, TILE]
        key = tile * TILE + tl.arange(0, TILE)
        if BIAS:
            x = add_position_bias(x, length - 1, key[None, :], tile * TILE, slope[:, None])
        visible = (key >= first) & (key < length)
        z = tl.where(visible[None, :], x * z_scale[:, None], float("-inf"))
        tl.store(p_z + o_bh[:, None] * n_keys + key[None, :], z, mask=inside[:, None] & (key < n_keys)[None, :])
        tl.store(p_best + o_bh * n_tiles + tile, tl.reduce(z, 1, nan_maximum), mask=inside)


@triton.jit
def sum_powers_of(p, start, stop, tau, beta, BLOCK: tl.constexpr, POWER: tl.constexpr):
    """sum u ** beta and sum u ** (beta - 1) of the float32 numbers p[start:stop]."""
    power_sum, slope_sum = 0.0, 0.0
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        u = tl.maximum(tl.load(p + index, mask=index < stop, other=float("-inf")) - tau, 0.0)
        w = support_power(u, beta, POWER)
        power_sum += tl.sum(w * u, 0)
        slope_sum += tl.sum(w, 0)
    return power_sum, slope_sum


@triton.jit(do_not_specialize=LENGTHS)
def decode_threshold(
    p_z, p_best, p_alpha, p_kv_lens, p_tau, tolerance, heads, n_keys, n_tiles, window,
    TILE: tl.constexpr, BLOCK: tl.constexpr, MAX_STEPS: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, WINDOW: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """tau (float32 (B, H)) by Newton's method from below: three steps over the tiles' maxima, a subset of the row's
    scores, then over all. +inf for rows that see no score, NaN for rows with a NaN or +inf score. Grid: (B * H,)."""
    i_bh = tl.program_id(0)
    i_batch, i_head = i_bh // heads, i_bh % heads
    alpha = tl.load(p_alpha + i_head)
    beta = 1 / (alpha - 1)
    first, length = visible_range(p_kv_lens, i_batch, n_keys, window, KEY_LENGTHS, WINDOW)
    lo, hi = first // TILE, (length + TILE - 1) // TILE
    p_best += i_bh.to(tl.int64) * n_tiles
    p_z += i_bh.to(tl.int64) * n_keys
    top = float("-inf")
    broken = 0
    for start in range(lo, hi, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        best = tl.load(p_best + tile, mask=tile < hi, other=float("-inf"))
        top = tl.maximum(top, tl.max(best, 0))
        broken = tl.maximum(broken, tl.max(((best != best) | (best == float("inf"))).to(tl.int32), 0))
    tau = top - 1
    if (broken == 0) & (top > float("-inf")):
        for _ in range(3):
            power_sum, slope_sum = sum_powers_of(p_best, lo, hi, tau, beta, BLOCK, POWER)
            norm, slope = norm_and_slope(power_sum, slope_sum, alpha, POWER)
            tau += tl.maximum(newton_step(norm, slope), 0.0)
        step, slope = 1.0, 1.0
        passes = 0
        while is_far(step, slope, alpha, tolerance) & (passes < MAX_STEPS):
            power_sum, slope_sum = sum_powers_of(p_z, lo * TILE, tl.minimum(hi * TILE, n_keys), tau, beta, BLOCK, POWER)
            norm, slope = norm_and_slope(power_sum, slope_sum, alpha, POWER)
            step = tl.maximum(newton_step(norm, slope), 0.0)
            tau += step
            passes += 1
    tau = tl.where(top > float("-inf"), tau, float("inf"))
    tl.store(p_tau + i_bh, tl.where(broken > 0, float("nan"), tau))


@triton.jit(do_not_specialize=LENGTHS)
def decode_values(
    p_v, p_z, p_best, p_tau, p_alpha, p_kv_lens, p_sums, p_totals,
    stride_vb, stride_vh, stride_vt,
    heads, repeat, n_keys, n_tiles, span, window,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    KEY_LENGTHS: tl.constexpr, WINDOW: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum p v and sum p of `span` tiles of keys. A tile in which no head of the group has weight is not read.

    p_sums: float32 (parts, B, H, D). p_totals: float32 (parts, B, H). Grid: (B * G, parts).
    """
    i_part = tl.program_id(1)
    i_batch, i_group, head, inside, o_bh = group_heads(tl.program_id(0), heads, repeat, ROWS)
    beta = 1 / (tl.load(p_alpha + head, mask=inside, other=2.0) - 1)
    tau = tl.load(p_tau + o_bh, mask=inside, other=float("inf"))
    first, length = visible_range(p_kv_lens, i_batch, n_keys, window, KEY_LENGTHS, WINDOW)
    p_values = p_v + head_offset(i_batch, i_group, stride_vb, stride_vh)
    out = tl.zeros([ROWS, BD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    lo, hi = part_of(i_part, span, first, length, TILE)
    for tile in range(lo, hi):
        best = tl.load(p_best + o_bh * n_tiles + tile, mask=inside, other=float("-inf"))
        if tl.max((best > tau).to(tl.int32), 0) > 0:
            key = tile * TILE + tl.arange(0, TILE)
            known = inside[:, None] & (key < n_keys)[None, :]
            z = tl.load(p_z + o_bh[:, None] * n_keys + key[None, :], mask=known, other=float("-inf"))
            u = tl.maximum(z - tau[:, None], 0.0)
            p = support_power(u, beta[:, None], POWER) * u
            v = load_rows(p_values, tile * TILE, stride_vt, n_keys, TILE, D, BD, True)
            out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
            total += tl.sum(p, 1)
    out = tl.where((tau != tau)[:, None], float("nan"), out)
    n_batch_heads = tl.num_programs(0) * repeat
    row = i_part.to(tl.int64) * n_batch_heads + o_bh
    dim = tl.arange(0, BD)
    tl.store(p_sums + row[:, None] * D + dim[None, :], out, mask=inside[:, None] & (dim < D)[None, :])
    tl.store(p_totals + row, total, mask=inside)


@bfloat16_as_float32(n_outputs=1)
def entmax_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    scale: float,
    power: str,
    kv_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attention of one query per row, (B, H, 1, D), without gradients.

    Arguments as in `kernels.entmax_attention`; alpha float32 (H,), power from `threshold.power_of`. Three launches,
    an argument a line.

    Memory: 4 bytes a key, batch row and query head for the scores.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, _, head_dim = q.shape
    groups, n_keys = k.shape[1:3]
    if q.numel() == 0 or n_keys == 0:
        return torch.zeros_like(q)
    repeat, n_tiles = heads // groups, ceil_div(n_keys, TILE)
    padded = padded_head_dim(head_dim)
    launches = {name: decode_launch(name, padded, q.dtype, q.device) for name in DECODING}
    n_programs = program_count(launches["scores"], q.device, n_tiles * batch * groups)
    span = ceil_div(n_tiles, max(1, n_programs // (batch * groups)))
    parts = ceil_div(n_tiles, span)
    z = q.new_empty((batch, heads, n_keys), dtype=torch.float32)
    best = q.new_empty((batch, heads, n_tiles), dtype=torch.float32)
    tau, totals = (q.new_empty((*lead, batch, heads), dtype=torch.float32) for lead in ((), (parts,)))
    sums = q.new_empty((parts, batch, heads, head_dim), dtype=torch.float32)
    alpha = alpha.contiguous()
    seen = dict(
        p_kv_lens=kv_lens, window=window or 0, KEY_LENGTHS=kv_lens is not None, WINDOW=window is not None, TILE=TILE
    )
    same = dict(p_z=z, p_best=best, p_alpha=alpha, heads=heads, n_keys=n_keys, n_tiles=n_tiles, **seen)
    tiles = dict(
        repeat=repeat, span=span, D=head_dim, BD=padded, ROWS=max(16, triton.next_power_of_2(repeat)),
        PRECISION="ieee",  # of float32: reading keys and values takes longer than plain float32 units
    )  # fmt: skip
    with on_device(q):
        decode_scores[(batch * groups, parts)](
            p_q=q,
            p_k=k,
            p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            stride_qb=q.stride(0),
            stride_qh=q.stride(1),
            scale=scale,
            BIAS=alibi_slopes is not None,
            STAGES=launches["scores"].stages,
            **strides("k", k),
            **launches["scores"].options,
            **same,
            **tiles,
        )
        decode_threshold[(batch * heads,)](
            p_tau=tau,
            tolerance=TOLERANCE["float32"],
            BLOCK=SOLVER_BLOCK,
            MAX_STEPS=MAX_STEPS,
            POWER=power,
            **launches["solve"].options,
            **same,
        )
        decode_values[(batch * groups, parts)](
            p_v=v,
            p_tau=tau,
            p_sums=sums,
            p_totals=totals,
            POWER=power,
            **strides("v", v),
            **launches["values"].options,
            **same,
            **tiles,
        )
    total = totals.sum(0)
    out = sums.sum(0) / torch.where(total > 0, total, 1)[..., None]  # rows that see nothing: 0
    return out[:, :, None].to(q.dtype)
