"""Prototype: lists of keys (64 queries x 1 key) and of queries (1 query x 64 keys) instead of tiles. No bias."""
import torch, triton, triton.language as tl
from kernels.threshold import raise_threshold, norm_and_slope, newton_step, curved_step, step_limit, support_distance, support_power, support_power_and_log, lane_sums
from kernels.tiles import tile_range, load_rows, store_rows, head_offset, query_task, head_scales, bit_or, BLOCK_FIELDS, Intervals, write_intervals
from kernels.entmax_scan import nan_maximum
from kernels.launching import ceil_div, strides
L = ["n_queries", "n_keys", "n_tasks", "n_blocks", "n_key_blocks", "n_kwords", "n_qwords", "capacity", "stride_rows", "stride_last"]

@triton.jit
def pack_columns(hit, R: tl.constexpr):
    """bool [R, 8, 4, 2] -> int32 [R, 4]: bit 2 i + j of lane l: column 8 i + 2 l + j"""
    i = tl.arange(0, 8)[None, :, None, None]
    j = tl.arange(0, 2)[None, None, None, :]
    x = hit.to(tl.int32) << (2 * i + j)
    return tl.reduce(tl.reduce(x, 3, bit_or), 1, bit_or)

@triton.jit
def scan_block(q, p_k, stride_k, block, slot, best, thr, marks, p_words, inv_z, first, end, n_keys,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, MASKED: tl.constexpr, MARK: tl.constexpr, WORDS: tl.constexpr):
    TILES: tl.constexpr = ROWS // 64
    key = block * 64 + tl.arange(0, 64)
    k = load_rows(p_k, block * 64, stride_k, n_keys, 64, D, BD, MASKED)
    x = tl.dot(q, tl.trans(k))
    if MASKED:
        x = tl.where((key >= first[:, None]) & (key < end[:, None]), x, float("-inf"))
    folded = tl.reduce(tl.reshape(x, (ROWS, FOLD, 64 // FOLD)), 1, nan_maximum)
    best = tl.maximum(best, folded, propagate_nan=tl.PropagateNan.ALL)
    lanes = tl.max(tl.max(tl.reshape(folded, (ROWS, 64 // FOLD // 8, 4, 2)), 3), 1)  # [ROWS, 4]
    if MARK:
        marks |= (lanes > thr).to(tl.int32) << slot
        if WORDS:
            hit = tl.reshape(x, (ROWS, 8, 4, 2)) > thr[:, None, :, None]
            w = tl.reshape(pack_columns(hit, ROWS), (TILES, 4, 2, 8, 4))
            w = tl.reduce(tl.reduce(w, 2, bit_or), 2, bit_or)  # [TILES, 4 warps, 4 lanes]
            w = w << (16 * tl.arange(0, TILES))[:, None, None]
            w = tl.reduce(w, 0, bit_or)
            place = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
            tl.store(p_words + block * 16 + place, w)
    return best, tl.maximum(thr, lanes - inv_z), marks

@triton.jit
def scan_range(q, p_k, stride_k, p_words, p_rowbits, n_queries, row, lo, hi, best, tau, alpha, beta, z_scale, first, end, n_keys,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr, WORDS: tl.constexpr):
    inv_z = 1 / z_scale
    while hi > lo:
        start = tl.maximum(lo, (hi - 1) // CHUNK * CHUNK)
        thr = tau * inv_z
        thr = (thr - tl.abs(thr) * 3e-7)[:, None] + tl.zeros([1, 4], tl.float32)
        marks = tl.zeros([ROWS, 4], tl.int32)
        for n in tl.range(0, hi - start, num_stages=STAGES):
            block = hi - 1 - n
            best, thr, marks = scan_block(q, p_k, stride_k, block, block % 32, best, thr, marks, p_words, inv_z, first, end, n_keys, D, BD, ROWS, FOLD, MASKED, True, WORDS)
        word = tl.reduce(marks, 1, bit_or)
        p = p_rowbits + ((hi - 1) // 32).to(tl.int64) * n_queries + row
        inside = row < n_queries
        tl.store(p, tl.load(p, mask=inside, other=0) | word, mask=inside)
        tau = raise_threshold(best * z_scale, tau, alpha, beta, 1, POWER)
        hi = start
    return best, tau

@triton.jit(do_not_specialize=L)
def scan(p_q, p_k, p_alpha, p_rows, p_blocks, p_words, p_counter, p_tau, p_bits, p_rowbits,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_key_blocks, n_kwords, n_qwords, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, CHUNK: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr, WORDS: tl.constexpr):
    TILES: tl.constexpr = ROWS // 64
    p_words += tl.program_id(0) * n_key_blocks * 16
    n_row_blocks = (n_blocks + TILES - 1) // TILES
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_block = task // n_row_blocks, n_row_blocks - 1 - task % n_row_blocks
        i_batch, i_head = i_bh // heads, i_bh % heads
        row = i_block * ROWS + tl.arange(0, ROWS)
        inside = row < n_queries
        first = tl.load(p_rows + row, mask=inside, other=0)
        end = tl.load(p_rows + stride_rows + row, mask=inside, other=0)
        sees = first < end
        block_lo, block_hi, full_lo, full_hi = tile_range(first, end, sees, 64)
        alpha = tl.load(p_alpha + i_head)
        beta = 1 / (alpha - 1)
        z_scale = (alpha - 1) * scale
        p_keys = p_k + i_batch.to(tl.int64) * stride_kb + (i_head // repeat).to(tl.int64) * stride_kh
        q = load_rows(p_q + i_batch.to(tl.int64) * stride_qb + i_head.to(tl.int64) * stride_qh, i_block * ROWS, stride_qt, n_queries, ROWS, D, BD, True)
        best = tl.full([ROWS, 64 // FOLD], float("-inf"), tl.float32)
        tau = tl.where(sees, float("-inf"), float("inf"))
        p_rb = p_rowbits + i_bh.to(tl.int64) * n_qwords * n_queries
        # a first look at the newest and the oldest keys: bounds only
        thr = tl.full([ROWS, 4], float("inf"), tl.float32)
        m0 = tl.zeros([ROWS, 4], tl.int32)
        if full_hi > full_lo:
            best, thr, m0 = scan_block(q, p_keys, stride_kt, full_lo, 0, best, thr, m0, p_words, 1 / z_scale, first, end, n_keys, D, BD, ROWS, FOLD, False, False, False)
            tau = raise_threshold(best * z_scale, tau, alpha, beta, 1, POWER)
        best, tau = scan_range(q, p_keys, stride_kt, p_words, p_rb, n_queries, row, full_hi, block_hi, best, tau, alpha, beta, z_scale, first, end, n_keys, D, BD, ROWS, FOLD, CHUNK, True, POWER, STAGES, WORDS)
        best, tau = scan_range(q, p_keys, stride_kt, p_words, p_rb, n_queries, row, full_lo, full_hi, best, tau, alpha, beta, z_scale, first, end, n_keys, D, BD, ROWS, FOLD, CHUNK, False, POWER, STAGES, WORDS)
        best, tau = scan_range(q, p_keys, stride_kt, p_words, p_rb, n_queries, row, block_lo, full_lo, best, tau, alpha, beta, z_scale, first, end, n_keys, D, BD, ROWS, FOLD, CHUNK, True, POWER, STAGES, WORDS)
        tau = raise_threshold(best * z_scale, tau, alpha, beta, 3, POWER)
        top = tl.max(best, 1)
        tau = tl.where(sees & (top > float("-inf")), tl.maximum(tau, top * z_scale - 1), float("inf"))
        tl.store(p_tau + i_bh.to(tl.int64) * n_queries + row, tau, mask=inside)
        if WORDS:
            tl.debug_barrier()
            for i_tile in range(0, TILES):
                tile = i_block * TILES + i_tile
                p_out = p_bits + (i_bh.to(tl.int64) * n_blocks + tile) * n_kwords
                for start in range(block_lo * 64, block_hi * 64, 2048):
                    key = start + tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
                    ok = key < block_hi * 64
                    p = p_words + key // 64 * 16 + key % 8 // 2
                    w = tl.load(p, mask=ok, other=0) | tl.load(p + 4, mask=ok, other=0) | tl.load(p + 8, mask=ok, other=0) | tl.load(p + 12, mask=ok, other=0)
                    on = (w >> (16 * i_tile + key % 64 // 8 * 2 + key % 2)) & 1
                    word = tl.sum(on << (tl.arange(0, 32)[None, :]), 1)
                    o = start // 32 + tl.arange(0, 64)
                    tl.store(p_out + o, word, mask=o < tl.where(tile < n_blocks, tl.minimum(block_hi * 2, n_kwords), 0))
            tl.debug_barrier()
        task = tl.atomic_add(p_counter, 1)

@triton.jit
def append_keys(p_bits, p_list, count, lo, hi, CHUNK: tl.constexpr):
    """Appends the marked keys of [lo, hi), in order."""
    for start in range(lo, hi, CHUNK):
        key = start + tl.arange(0, CHUNK)
        word = tl.load(p_bits + key // 32, mask=key < hi, other=0)
        on = (word >> (key % 32)) & 1
        before = tl.cumsum(on, 0) - on
        tl.store(p_list + count + before, key, mask=on != 0)
        count += tl.sum(on, 0)
    return count

@triton.jit
def list_keys(p_bits, p_list, tile_lo, tile_hi, inner_lo, inner_hi, CHUNK: tl.constexpr):
    n_inner = append_keys(p_bits, p_list, inner_lo * 0, inner_lo * 64, inner_hi * 64, CHUNK)
    n = append_keys(p_bits, p_list, n_inner, tile_lo * 64, inner_lo * 64, CHUNK)
    n = append_keys(p_bits, p_list, n, inner_hi * 64, tile_hi * 64, CHUNK)
    tl.debug_barrier()
    return n_inner, n

@triton.jit
def gather(p, index, stride, ok, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    dim = tl.arange(0, BD)
    pointers = p + index.to(tl.int64)[:, None] * stride + dim[None, :]
    if MASKED:
        return tl.load(pointers, mask=ok[:, None] & (dim < D)[None, :], other=0.0)
    elif D != BD:
        return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)

@triton.jit
def store_marks(p_marks, hit, n, BM: tl.constexpr):
    """hit: bool [64, 64]; 16 words a step."""
    w = tl.reshape(pack_columns(tl.reshape(hit, (BM, 8, 4, 2)), BM), (4, 2, 8, 4))
    w = tl.reduce(tl.reduce(w, 1, bit_or), 1, bit_or)
    place = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_marks + n * 16 + place, w)

@triton.jit
def keep_keys(p_list, p_marks, n_inner, count, CHUNK: tl.constexpr):
    tl.debug_barrier()
    kept, kept_inner = n_inner * 0, n_inner * 0
    for start in range(0, count, CHUNK):
        n = start + tl.arange(0, CHUNK)
        ok = n < count
        key = tl.load(p_list + n, mask=ok, other=0)
        p = p_marks + n // 64 * 16 + n % 8 // 2
        w = tl.load(p, mask=ok, other=0) | tl.load(p + 4, mask=ok, other=0) | tl.load(p + 8, mask=ok, other=0) | tl.load(p + 12, mask=ok, other=0)
        on = (w >> (n % 64 // 8 * 2 + n % 2)) & 1
        tl.debug_barrier()
        tl.store(p_list + kept + tl.cumsum(on, 0) - on, key, mask=on != 0)
        kept += tl.sum(on, 0)
        kept_inner += tl.sum(tl.where(n < n_inner, on, 0), 0)
        tl.debug_barrier()
    return kept_inner, kept

@triton.jit
def key_scores(q, p_k, stride_k, p_list, n, count, z_scale, tau, first, end, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    i = n * BN + tl.arange(0, BN)
    ok = i < count
    if MASKED:
        key = tl.load(p_list + i, mask=ok, other=2147483647)
    else:
        key = tl.load(p_list + i)
    k = gather(p_k, tl.where(ok, key, 0) if MASKED else key, stride_k, ok, D, BD, MASKED)
    x = tl.dot(q, tl.trans(k))
    if MASKED:
        x = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), x, float("-inf"))
    return key, ok, k, x

@triton.jit
def sum_powers(q, p_k, stride_k, p_list, lo, hi, count, p_marks, power_sum, slope_sum, tau, z_scale, beta, first, end,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr, MARK: tl.constexpr):
    for n in tl.range(lo, hi, num_stages=STAGES):
        key, ok, k, x = key_scores(q, p_k, stride_k, p_list, n, count, z_scale, tau, first, end, D, BD, 64, MASKED)
        u = support_distance(x, z_scale, tau[:, None])
        w = support_power(u, beta, POWER)
        power_sum += lane_sums(w * u)
        slope_sum += lane_sums(w)
        if MARK:
            store_marks(p_marks, u > 0, n, BM)
    return power_sum, slope_sum

@triton.jit
def sum_values(q, p_k, p_v, stride_k, stride_v, p_list, lo, hi, count, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, first, end,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, POWER: tl.constexpr, GRADIENT: tl.constexpr, STAGES: tl.constexpr):
    for n in tl.range(lo, hi, num_stages=STAGES):
        key, ok, k, x = key_scores(q, p_k, stride_k, p_list, n, count, z_scale, tau, first, end, D, BD, 64, MASKED)
        v = gather(p_v, tl.where(ok, key, 0) if MASKED else key, stride_v, ok, D, BD, MASKED)
        u = support_distance(x, z_scale, tau[:, None])
        w = support_power(u, beta, POWER)
        p = w * u
        power_sum += lane_sums(p)
        slope_sum += lane_sums(w)
        out = tl.dot(p.to(v.dtype), v, out)
        if GRADIENT:
            slope_out = tl.dot(w.to(v.dtype), v, slope_out)
    return power_sum, slope_sum, out, slope_out

@triton.jit(do_not_specialize=L)
def forward(p_q, p_k, p_v, p_alpha, p_rows, p_blocks, p_flags, p_list, p_marks, p_counter, p_tau, p_bits, p_out, p_slope_out, p_last,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_last,
    scale, tolerance, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_kwords, capacity, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr, MAX_STEPS: tl.constexpr,
    POWER: tl.constexpr, GRADIENT: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr):
    """PART: 0 refine and sum, 1 refine, 2 sum."""
    i_program = tl.program_id(0)
    p_flags += i_program * capacity
    p_list += i_program * capacity
    p_marks += i_program * (capacity // 4)
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block = query_task(
            task, p_rows, p_blocks, heads, n_queries, n_blocks, 0, stride_rows, BM, FIELDS)
        tile_lo, tile_hi = tl.load(p_block), tl.load(p_block + 1)
        inner_lo, inner_hi = tl.load(p_block + 2), tl.load(p_block + 3)
        alpha, beta, z_scale, slope = head_scales(p_alpha, p_alpha, i_head, scale, False)
        o_k = head_offset(i_batch, i_head // repeat, stride_kb, stride_kh)
        o_v = head_offset(i_batch, i_head // repeat, stride_vb, stride_vh)
        o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
        q = load_rows(p_q + o_q, i_block * BM, stride_qt, n_queries, BM, D, BD, True)
        o_bh = i_bh.to(tl.int64) * n_queries
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))
        p_words = p_bits + (i_bh.to(tl.int64) * n_blocks + i_block) * n_kwords
        n_inner, count = list_keys(p_words, p_list, tile_lo, tile_hi, inner_lo, inner_hi, CHUNK)
        norm_slope = tl.full([BM], 1.0, tl.float32)
        step = tl.full([BM], 1.0, tl.float32)
        if PART != 2:
            limit = step_limit(alpha, tolerance)
            passes = 0
            while (tl.max(tl.where(norm_slope > 0, step, 0.0), 0) > limit) & (passes < MAX_STEPS):
                power_sum = tl.zeros([BM, 4], tl.float32)
                slope_sum = tl.zeros([BM, 4], tl.float32)
                power_sum, slope_sum = sum_powers(q, p_k + o_k, stride_kt, p_list, 0, n_inner // 64, count, p_marks, power_sum, slope_sum, tau, z_scale, beta, first, end, D, BD, BM, False, POWER, STAGES, True)
                power_sum, slope_sum = sum_powers(q, p_k + o_k, stride_kt, p_list, n_inner // 64, tl.cdiv(count, 64), count, p_marks, power_sum, slope_sum, tau, z_scale, beta, first, end, D, BD, BM, True, POWER, 1, True)
                norm, norm_slope = norm_and_slope(tl.sum(power_sum, 1), tl.sum(slope_sum, 1), alpha, POWER)
                step = tl.maximum(newton_step(norm, norm_slope), 0.0)
                tau += step
                passes += 1
                n_inner, count = keep_keys(p_list, p_marks, n_inner, count, CHUNK)
            for start in range(0, count, CHUNK):
                n = start + tl.arange(0, CHUNK)
                key = tl.load(p_list + n, mask=n < count, other=0)
                tl.store(p_flags + key, 1, mask=n < count)
            tl.debug_barrier()
            for start in range(tile_lo * 64, tile_hi * 64, 2048):
                key = start + tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
                ok = key < tile_hi * 64
                on = tl.load(p_flags + key, mask=ok, other=0).to(tl.int32)
                tl.store(p_flags + key, 0, mask=ok)
                o = start // 32 + tl.arange(0, 64)
                tl.store(p_words + o, tl.sum(on << (tl.arange(0, 32)[None, :]), 1), mask=(o < tile_hi * 2) & (o < n_kwords))
        if PART == 1:
            tl.store(p_tau + o_bh + row, tau, mask=inside)
            tl.store(p_last + o_bh + row, norm_slope, mask=inside)
            tl.store(p_last + stride_last + o_bh + row, step, mask=inside)
        else:
            if PART == 2:
                norm_slope = tl.load(p_last + o_bh + row, mask=inside, other=0.0)
                step = tl.load(p_last + stride_last + o_bh + row, mask=inside, other=0.0)
            out = tl.zeros([BM, BD], tl.float32)
            slope_out = tl.zeros([BM, BD], tl.float32)
            power_sum = tl.zeros([BM, 4], tl.float32)
            slope_sum = tl.zeros([BM, 4], tl.float32)
            power_sum, slope_sum, out, slope_out = sum_values(q, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list, 0, n_inner // 64, count, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, first, end, D, BD, BM, False, POWER, GRADIENT, STAGES)
            power_sum, slope_sum, out, slope_out = sum_values(q, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list, n_inner // 64, tl.cdiv(count, 64), count, power_sum, slope_sum, out, slope_out, tau, z_scale, beta, first, end, D, BD, BM, True, POWER, GRADIENT, 1)
            total, slope_total = tl.sum(power_sum, 1), tl.sum(slope_sum, 1)
            norm, last_slope = norm_and_slope(total, slope_total, alpha, POWER)
            step = curved_step(norm, last_slope, norm_slope, step, alpha)
            tau += step
            tl.store(p_tau + o_bh + row, tau, mask=inside)
            if GRADIENT:
                out -= (beta * step)[:, None] * slope_out
                total -= beta * step * slope_total
                slope_out = slope_out / tl.where(slope_total > 0, slope_total, 1.0)[:, None]
                store_rows(p_slope_out + head_offset(i_batch, i_head, stride_sb, stride_sh), slope_out, i_block * BM, stride_st, n_queries, BM, D, BD)
            out = out / tl.where(total > 0, total, 1.0)[:, None]
            store_rows(p_out + head_offset(i_batch, i_head, stride_ob, stride_oh), out, i_block * BM, stride_ot, n_queries, BM, D, BD)
        tl.debug_barrier()
        task = tl.atomic_add(p_counter, 1)

@triton.jit
def dq_steps(q, do, p_k, p_v, stride_k, stride_v, p_list, lo, hi, count, dq, entropy_sum, entropy_dp, slope_sum, slope_dp, tau, delta, z_scale, beta, first, end,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, POWER: tl.constexpr, DALPHA: tl.constexpr, STAGES: tl.constexpr):
    for n in tl.range(lo, hi, num_stages=STAGES):
        key, ok, k, x = key_scores(q, p_k, stride_k, p_list, n, count, z_scale, tau, first, end, D, BD, 64, MASKED)
        v = gather(p_v, tl.where(ok, key, 0) if MASKED else key, stride_v, ok, D, BD, MASKED)
        dp = tl.dot(do, tl.trans(v)) - delta[:, None]
        u = support_distance(x, z_scale, tau[:, None])
        if DALPHA:
            w, log_u = support_power_and_log(u, beta, POWER)
            entropy = w * u * (1 - 0.6931471805599453 * log_u)
        else:
            w = support_power(u, beta, POWER)
        ds = w * dp
        if DALPHA:
            entropy_sum += lane_sums(entropy)
            entropy_dp += lane_sums(entropy * dp)
            slope_sum += lane_sums(w)
            slope_dp += lane_sums(ds)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq, entropy_sum, entropy_dp, slope_sum, slope_dp

@triton.jit(do_not_specialize=L)
def backward_queries(p_q, p_k, p_v, p_do, p_slope_out, p_tau, p_alpha, p_rows, p_blocks, p_bits, p_list, p_counter, p_dq, p_delta, p_dalpha,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_sb, stride_sh, stride_st, stride_db, stride_dh, stride_dt,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_kwords, capacity, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr, POWER: tl.constexpr, DALPHA: tl.constexpr, STAGES: tl.constexpr):
    p_list += tl.program_id(0) * capacity
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bh, i_batch, i_head, i_block, row, inside, position, first, end, p_block = query_task(
            task, p_rows, p_blocks, heads, n_queries, n_blocks, 0, stride_rows, BM, FIELDS)
        o_bh = i_bh.to(tl.int64) * n_queries
        p_words = p_bits + (i_bh.to(tl.int64) * n_blocks + i_block) * n_kwords
        n_inner, count = list_keys(p_words, p_list, tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2), tl.load(p_block + 3), CHUNK)
        alpha, beta, z_scale, slope = head_scales(p_alpha, p_alpha, i_head, scale, False)
        o_k = head_offset(i_batch, i_head // repeat, stride_kb, stride_kh)
        o_v = head_offset(i_batch, i_head // repeat, stride_vb, stride_vh)
        q = load_rows(p_q + head_offset(i_batch, i_head, stride_qb, stride_qh), i_block * BM, stride_qt, n_queries, BM, D, BD, True)
        do = load_rows(p_do + head_offset(i_batch, i_head, stride_ob, stride_oh), i_block * BM, stride_ot, n_queries, BM, D, BD, True)
        so = load_rows(p_slope_out + head_offset(i_batch, i_head, stride_sb, stride_sh), i_block * BM, stride_st, n_queries, BM, D, BD, True)
        delta = tl.sum(do.to(tl.float32) * so, 1)
        tl.store(p_delta + o_bh + row, delta, mask=inside)
        tau = tl.load(p_tau + o_bh + row, mask=inside, other=float("inf"))
        dq = tl.zeros([BM, BD], tl.float32)
        z4 = tl.zeros([BM, 4], tl.float32)
        dq, es, ed, ss, sd = dq_steps(q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list, 0, n_inner // 64, count, dq, z4, z4, z4, z4, tau, delta, z_scale, beta, first, end, D, BD, False, POWER, DALPHA, STAGES)
        dq, es, ed, ss, sd = dq_steps(q, do, p_k + o_k, p_v + o_v, stride_kt, stride_vt, p_list, n_inner // 64, tl.cdiv(count, 64), count, dq, es, ed, ss, sd, tau, delta, z_scale, beta, first, end, D, BD, True, POWER, DALPHA, 1)
        store_rows(p_dq + head_offset(i_batch, i_head, stride_db, stride_dh), dq * scale, i_block * BM, stride_dt, n_queries, BM, D, BD)
        if DALPHA:
            s = tl.sum(ss, 1)
            mean_dp = tl.sum(sd, 1) / tl.where(s > 0, s, 1.0)
            tl.store(p_dalpha + i_bh * n_blocks + i_block, beta * beta * tl.sum(tl.sum(ed, 1) - mean_dp * tl.sum(es, 1), 0))
        tl.debug_barrier()
        task = tl.atomic_add(p_counter, 1)

@triton.jit
def append_queries(p_rowbits, p_list, count, bit, lo, hi, CHUNK: tl.constexpr):
    for start in range(lo, hi, CHUNK):
        row = start + tl.arange(0, CHUNK)
        word = tl.load(p_rowbits + row, mask=row < hi, other=0)
        on = (word >> bit) & 1
        before = tl.cumsum(on, 0) - on
        tl.store(p_list + count + before, row, mask=on != 0)
        count += tl.sum(on, 0)
    return count

@triton.jit
def dk_steps(k, v, key, p_q, p_do, stride_q, stride_o, p_tau, p_delta, p_first, p_end, p_list, lo, hi, count, dk, dv, z_scale, beta,
    D: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr):
    for n in tl.range(lo, hi, num_stages=STAGES):
        i = n * STEP + tl.arange(0, STEP)
        ok = i < count
        if MASKED:
            row = tl.load(p_list + i, mask=ok, other=0)
            tau = tl.load(p_tau + row, mask=ok, other=float("inf"))
            delta = tl.load(p_delta + row, mask=ok, other=0.0)
            first = tl.load(p_first + row, mask=ok, other=0)
            end = tl.load(p_end + row, mask=ok, other=0)
        else:
            row = tl.load(p_list + i)
            tau = tl.load(p_tau + row)
            delta = tl.load(p_delta + row)
        q = gather(p_q, row, stride_q, ok, D, BD, MASKED)
        do = gather(p_do, row, stride_o, ok, D, BD, MASKED)
        if TRANSPOSED:
            x = tl.dot(k, tl.trans(q))
            dp = tl.dot(v, tl.trans(do)) - delta[None, :]
            if MASKED:
                x = tl.where((key[:, None] >= first[None, :]) & (key[:, None] < end[None, :]), x, float("-inf"))
            u = support_distance(x, z_scale, tau[None, :])
        else:
            x = tl.dot(q, tl.trans(k))
            dp = tl.dot(do, tl.trans(v)) - delta[:, None]
            if MASKED:
                x = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), x, float("-inf"))
            u = support_distance(x, z_scale, tau[:, None])
        w = support_power(u, beta, POWER)
        p = (w * u).to(do.dtype)
        ds = (w * dp).to(q.dtype)
        if TRANSPOSED:
            dv = tl.dot(p, do, dv)
            dk = tl.dot(ds, q, dk)
        else:
            dv = tl.dot(tl.trans(p), do, dv)
            dk = tl.dot(tl.trans(ds), q, dk)
    return dk, dv

@triton.jit(do_not_specialize=L)
def backward_keys(p_q, p_k, p_v, p_do, p_tau, p_delta, p_alpha, p_rows, p_blocks, p_rowbits, p_list, p_counter, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, stride_eb, stride_eh, stride_et,
    scale, heads, repeat, n_queries, n_keys, n_tasks, n_blocks, n_key_blocks, n_qwords, capacity, stride_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr):
    p_list += tl.program_id(0) * capacity
    task = tl.atomic_add(p_counter, 1)
    while task < n_tasks:
        i_bg, i_key_block = task // n_key_blocks, task % n_key_blocks
        groups = heads // repeat
        i_batch, i_group = i_bg // groups, i_bg % groups
        key = i_key_block * BM + tl.arange(0, BM)
        k = load_rows(p_k + head_offset(i_batch, i_group, stride_kb, stride_kh), i_key_block * BM, stride_kt, n_keys, BM, D, BD, True)
        v = load_rows(p_v + head_offset(i_batch, i_group, stride_vb, stride_vh), i_key_block * BM, stride_vt, n_keys, BM, D, BD, True)
        dk, dv = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
        for i_repeat in range(0, repeat):
            i_head = i_group * repeat + i_repeat
            i_bh = (i_batch * heads + i_head).to(tl.int64)
            p_row = p_rowbits + (i_bh * n_qwords + i_key_block // 32) * n_queries
            # causal, whole: rows from (i_key_block + 1) * 64 see the tile whole
            edge_lo = tl.minimum(i_key_block * BM, n_queries)
            inner_lo = tl.minimum(i_key_block * BM + BM, n_queries)
            n_inner = append_queries(p_row, p_list, i_key_block * 0, i_key_block % 32, inner_lo, n_queries, CHUNK)
            count = append_queries(p_row, p_list, n_inner, i_key_block % 32, edge_lo, inner_lo, CHUNK)
            tl.debug_barrier()
            alpha, beta, z_scale, slope = head_scales(p_alpha, p_alpha, i_head, scale, False)
            o_q = head_offset(i_batch, i_head, stride_qb, stride_qh)
            o_o = head_offset(i_batch, i_head, stride_ob, stride_oh)
            dk, dv = dk_steps(k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries, p_delta + i_bh * n_queries, p_rows, p_rows + stride_rows, p_list, 0, n_inner // STEP, count, dk, dv, z_scale, beta, D, BD, STEP, False, TRANSPOSED, POWER, STAGES)
            dk, dv = dk_steps(k, v, key, p_q + o_q, p_do + o_o, stride_qt, stride_ot, p_tau + i_bh * n_queries, p_delta + i_bh * n_queries, p_rows, p_rows + stride_rows, p_list, n_inner // STEP, tl.cdiv(count, STEP), count, dk, dv, z_scale, beta, D, BD, STEP, True, TRANSPOSED, POWER, 1)
            tl.debug_barrier()
        store_rows(p_dk + head_offset(i_batch, i_group, stride_db, stride_dh), dk * scale, i_key_block * BM, stride_dt, n_keys, BM, D, BD)
        store_rows(p_dv + head_offset(i_batch, i_group, stride_eb, stride_eh), dv, i_key_block * BM, stride_et, n_keys, BM, D, BD)
        task = tl.atomic_add(p_counter, 1)

CONFIG = dict(
    scan=dict(programs=3, num_warps=4, STAGES=3, maxnreg=168, FOLD=2, CHUNK=16),
    forward=dict(programs=3, num_warps=4, STAGES=3, maxnreg=168),
    refine=dict(programs=4, num_warps=4, STAGES=3, maxnreg=128),
    sum=dict(programs=3, num_warps=4, STAGES=3, maxnreg=168),
    backward_queries=dict(programs=3, num_warps=4, STAGES=2, maxnreg=168),
    backward_keys=dict(programs=2, num_warps=4, STAGES=2, STEP=64, TRANSPOSED=False),
)
def launch(kernel, name, tasks, grid_only=False, **kw):
    c = dict(CONFIG[name]); programs = c.pop("programs")
    if kw["p_q"].device.type == "cpu":
        c.pop("maxnreg", None)
    kernel[(kw.pop("n_programs"),)](n_tasks=tasks, **c, **kw)

def n_programs(name, device, tasks):
    sms = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    return min(sms * CONFIG[name]["programs"], tasks)

def fwd(q, k, v, alpha, scale, power="general", gradient=True, tolerance=None, fused=True, words=True, times=None):
    B, H, T, D = q.shape; Tk = k.shape[2]
    nb, nkb = ceil_div(T, 64), ceil_div(Tk, 64)
    nkw, nqw = ceil_div(Tk, 32), ceil_div(nkb, 32)
    dev = q.device
    out = torch.empty_like(q); so = torch.empty_like(q, dtype=torch.float32)
    tau = torch.empty(B, H, T, device=dev); last = torch.empty(2, B, H, T, device=dev)
    rows = torch.empty(2, 1, T, dtype=torch.int32, device=dev); blocks = torch.empty(1, nb, BLOCK_FIELDS, dtype=torch.int32, device=dev)
    iv = Intervals(rows, blocks)
    write_intervals(iv, Tk, True, None, None, None)
    bits = torch.zeros(B, H, nb, nkw, dtype=torch.int32, device=dev)
    rowbits = torch.zeros(B, H, nqw, T, dtype=torch.int32, device=dev)
    counters = torch.zeros(8, dtype=torch.int32, device=dev)
    shared = dict(p_q=q, p_k=k, p_alpha=alpha, p_rows=rows, p_blocks=blocks, p_tau=tau, p_bits=bits, scale=scale, heads=H, repeat=H // k.shape[1],
        n_queries=T, n_keys=Tk, n_blocks=nb, n_kwords=nkw, stride_rows=rows.stride(0), D=D, BD=D, POWER=power, **strides("q", q), **strides("k", k))
    tasks = ceil_div(nb, 2) * B * H
    np_ = n_programs("scan", dev, tasks)
    launch(scan, "scan", tasks, n_programs=np_, p_words=torch.empty(np_ * nkb * 16, dtype=torch.int32, device=dev), p_counter=counters, p_rowbits=rowbits, n_key_blocks=nkb, n_qwords=nqw, ROWS=128, WORDS=words, **shared)
    if not words:
        return tau
    tasks = nb * B * H
    cap = ceil_div(Tk, 64) * 64 + 64
    def run(name, part, counter):
        np_ = n_programs(name, dev, tasks)
        launch(forward, name, tasks, n_programs=np_, p_v=v, p_flags=torch.zeros(np_ * cap, dtype=torch.uint8, device=dev), p_list=torch.empty(np_ * cap, dtype=torch.int32, device=dev),
            p_marks=torch.empty(np_ * cap // 4, dtype=torch.int32, device=dev), p_counter=counter, p_out=out, p_slope_out=so, p_last=last, stride_last=last.stride(0), capacity=cap,
            tolerance=tolerance or (0.05 if gradient else 3e-3), BM=64, CHUNK=1024, FIELDS=BLOCK_FIELDS, MAX_STEPS=20, GRADIENT=gradient, PART=part, **strides("v", v), **strides("o", out), **strides("s", so), **shared)
    if fused:
        run("forward", 0, counters[1:])
    else:
        run("refine", 1, counters[1:]); run("sum", 2, counters[2:])
    return out, so, tau, bits, rowbits, rows, blocks

def bwd(grad, q, k, v, alpha, scale, saved, power="general", dalpha=True):
    out, so, tau, bits, rowbits, rows, blocks = saved
    B, H, T, D = q.shape; Tk = k.shape[2]; dev = q.device
    nb, nkb = ceil_div(T, 64), ceil_div(Tk, 64)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(tau); da = torch.empty(B, H, nb, device=dev)
    counters = torch.zeros(8, dtype=torch.int32, device=dev)
    shared = dict(p_q=q, p_k=k, p_v=v, p_do=grad, p_tau=tau, p_delta=delta, p_alpha=alpha, p_rows=rows, p_blocks=blocks, scale=scale, heads=H, repeat=H // k.shape[1], n_queries=T, n_keys=Tk,
        n_blocks=nb, stride_rows=rows.stride(0), D=D, BD=D, BM=64, CHUNK=1024, FIELDS=BLOCK_FIELDS, POWER=power, **strides("q", q), **strides("k", k), **strides("v", v), **strides("o", grad))
    tasks = nb * B * H; cap = nkb * 64 + 64; np_ = n_programs("backward_queries", dev, tasks)
    launch(backward_queries, "backward_queries", tasks, n_programs=np_, p_slope_out=so, p_bits=bits, p_list=torch.empty(np_ * cap, dtype=torch.int32, device=dev), p_counter=counters, p_dq=dq, p_dalpha=da, n_kwords=bits.shape[3],
        capacity=cap, DALPHA=dalpha, **strides("s", so), **strides("d", dq), **shared)
    tasks = nkb * B * k.shape[1]; cap = nb * 64 + 64; np_ = n_programs("backward_keys", dev, tasks)
    launch(backward_keys, "backward_keys", tasks, n_programs=np_, p_rowbits=rowbits, p_list=torch.empty(np_ * cap, dtype=torch.int32, device=dev), p_counter=counters[1:], p_dk=dk, p_dv=dv, n_key_blocks=nkb, n_qwords=rowbits.shape[2],
        capacity=cap, **strides("d", dk), **strides("e", dv), **shared)
    return dq, dk, dv, da.sum((0, 2))
