"""Triton kernels of the row-wise op."""

import triton
import triton.language as tl

from kernels.alpha_entmax.threshold import (
    log2,
    newton_step,
    norm_and_slope,
    raise_threshold,
    support_distance,
    support_power,
)

START_STEPS = 4  # of Newton's method on the best score of each column slot, before whole rows are looked at


TOLERANCE = 5e-7  # of the norm, whose rounding is a few 1e-7


MAX_STEPS = 40  # (norm - 1) * slope falls at least fourfold a step as the norm is convex: 1e6 scores take at most 31


@triton.jit
def load_block(p, row, start, n_rows, n_columns, other, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] float32 of a contiguous (n_rows, n_columns) matrix from column `start`."""
    column = start + tl.arange(0, BLOCK)
    mask = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    return tl.load(p + row.to(tl.int64)[:, None] * n_columns + column[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def store_block(p, value, row, start, n_rows, n_columns, BLOCK: tl.constexpr):
    """Stores [ROWS, BLOCK] into a contiguous (n_rows, n_columns) matrix from column `start`."""
    column = start + tl.arange(0, BLOCK)
    mask = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    pointers = p + row.to(tl.int64)[:, None] * n_columns + column[None, :]
    tl.store(pointers, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_alpha(p_alpha, alpha_step, row, n_rows):
    """alpha and beta, [ROWS]; alpha_step is 0 where all rows share one."""
    alpha = tl.load(p_alpha + row.to(tl.int64) * alpha_step, mask=row < n_rows, other=1.5)
    return alpha, 1 / (alpha - 1)


@triton.jit
def row_distance(x, top, tau, tau_low, alpha):
    """u, [ROWS, BLOCK], for the threshold tau + tau_low: z - tau is exact for scores near it, so many small u beside a
    large one come out to their own precision, not tau's."""
    return support_distance((x - top[:, None]) * (alpha - 1)[:, None] - tau[:, None], 1.0, tau_low[:, None])


@triton.jit
def best_of_slots(x, p_x, row, n_rows, n_columns, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    """[ROWS, BLOCK]: best score of each column slot over all blocks, NaN where any is. x: the first block."""
    for start in range(BLOCK, BLOCK if SINGLE else n_columns, BLOCK):
        block = load_block(p_x, row, start, n_rows, n_columns, float("-inf"), BLOCK)
        x = tl.maximum(x, block, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def sum_powers(
    x, p_x, row, n_rows, n_columns, top, tau, tau_low, alpha, beta,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """sum u ** beta and sum u ** (beta - 1) of whole rows, [ROWS] each. x: the first block."""
    power_sum = tl.zeros(x.shape, tl.float32)
    slope_sum = tl.zeros(x.shape, tl.float32)
    for start in range(0, BLOCK if SINGLE else n_columns, BLOCK):
        if not SINGLE:
            x = load_block(p_x, row, start, n_rows, n_columns, float("-inf"), BLOCK)
        u = row_distance(x, top, tau, tau_low, alpha)
        w = support_power(u, beta[:, None], POWER)
        power_sum += w * u
        slope_sum += w
    return tl.sum(power_sum, 1), tl.sum(slope_sum, 1)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "alpha_step"])
def entmax_rows_forward(
    p_x, p_alpha, p_out, p_rows, n_rows, n_columns, alpha_step, tolerance,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
    START_STEPS: tl.constexpr, MAX_STEPS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows: best scores -> lower bound of the threshold -> Newton's method on whole rows -> p."""
    if ALIGNED:
        n_columns = n_columns // 16 * 16  # the same number, visibly divisible: loads and stores of 16 bytes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alpha, beta = load_alpha(p_alpha, alpha_step, row, n_rows)  # [ROWS]
    x = load_block(p_x, row, 0, n_rows, n_columns, float("-inf"), BLOCK)  # [ROWS, BLOCK]
    best = best_of_slots(x, p_x, row, n_rows, n_columns, BLOCK, SINGLE)
    nan = tl.min((best < float("inf")).to(tl.int32), 1) == 0  # NaN or +inf in the row
    top = tl.max(best, 1)
    top = tl.where(nan | (top == float("-inf")), 0.0, top)

    # A threshold of +inf leaves no support: such rows never step
    tau = tl.where(nan, float("inf"), -1.0)
    z = (best - top[:, None]) * (alpha - 1)[:, None]
    tau = raise_threshold(z, tau, alpha, beta[:, None], START_STEPS, POWER)
    tau_low = tl.zeros([ROWS], tl.float32)
    total, steps, going = tau, 0, True  # in this order: Triton 3.6 fails on a tensor carried after the loop's condition
    while going:
        total, slope_sum = sum_powers(
            x, p_x, row, n_rows, n_columns, top, tau, tau_low, alpha, beta, BLOCK, SINGLE, POWER
        )  # fmt: skip
        norm, slope = norm_and_slope(total, slope_sum, alpha, POWER)
        step = tl.where(tl.abs(norm - 1) > tolerance, newton_step(norm, slope), 0.0)
        going = (tl.max((step != 0).to(tl.int32), 0) > 0) & (steps < MAX_STEPS)
        moves = going & (step != 0)  # else total stays the one of this threshold
        raised = tau + (tau_low + step)
        tau_low = tl.where(moves, (tau_low + step) - (raised - tau), tau_low)
        tau = tl.where(moves, raised, tau)
        steps += 1

    total = tl.where(nan, float("nan"), tl.where(total > 0, total, 1.0))
    for start in range(0, BLOCK if SINGLE else n_columns, BLOCK):
        if not SINGLE:
            x = load_block(p_x, row, start, n_rows, n_columns, float("-inf"), BLOCK)
        u = row_distance(x, top, tau, tau_low, alpha)
        p = support_power(u, beta[:, None], POWER) * u / total[:, None]
        store_block(p_out, p, row, start, n_rows, n_columns, BLOCK)
    p_rows += row
    tl.store(p_rows, top, mask=row < n_rows)
    tl.store(p_rows + n_rows, tl.where(nan, float("nan"), tau), mask=row < n_rows)
    tl.store(p_rows + 2 * n_rows, tau_low, mask=row < n_rows)


@triton.jit
def log_term(u):
    """u (1 - log u) - 1, exact where u is near 1."""
    return (u - 1) - u * tl.log(tl.where(u > 0, u, 1.0))


@triton.jit(do_not_specialize=["n_rows", "n_columns", "alpha_step"])
def entmax_rows_backward(
    p_grad, p_x, p_alpha, p_rows, p_dx, p_dalpha, n_rows, n_columns, alpha_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, DALPHA: tl.constexpr,
    POWER: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows: delta = sum w g / sum w -> dx = w (g - delta) and the row's share of dalpha."""
    if ALIGNED:
        n_columns = n_columns // 16 * 16  # the same number, visibly divisible: loads and stores of 16 bytes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alpha, beta = load_alpha(p_alpha, alpha_step, row, n_rows)  # [ROWS]
    p_rows += row
    top = tl.load(p_rows, mask=row < n_rows, other=0.0)
    tau = tl.load(p_rows + n_rows, mask=row < n_rows, other=0.0)
    tau_low = tl.load(p_rows + 2 * n_rows, mask=row < n_rows, other=0.0)
    x = load_block(p_x, row, 0, n_rows, n_columns, float("-inf"), BLOCK)  # [ROWS, BLOCK]
    g = load_block(p_grad, row, 0, n_rows, n_columns, 0.0, BLOCK)

    power_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    slope_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, BLOCK if SINGLE else n_columns, BLOCK):
        if not SINGLE:
            x = load_block(p_x, row, start, n_rows, n_columns, float("-inf"), BLOCK)
            g = load_block(p_grad, row, start, n_rows, n_columns, 0.0, BLOCK)
        u = row_distance(x, top, tau, tau_low, alpha)
        w = support_power(u, beta[:, None], POWER)
        power_sum += w * u
        slope_sum += w
        weighted += w * g
    total, slope_total = tl.sum(power_sum, 1), tl.sum(slope_sum, 1)
    total, slope_total = tl.where(total > 0, total, 1.0), tl.where(slope_total > 0, slope_total, 1.0)
    delta = tl.sum(weighted, 1) / slope_total
    delta = tl.where(tau == tau, delta, float("nan"))

    dalpha = tl.zeros([ROWS, BLOCK], tl.float32)
    mean_term = log_term(total / slope_total)
    w_scale = tl.exp2((alpha - 2) * log2(total))  # w = p ** (2 - alpha), and p is u ** beta / total
    for start in range(0, BLOCK if SINGLE else n_columns, BLOCK):
        if not SINGLE:
            x = load_block(p_x, row, start, n_rows, n_columns, float("-inf"), BLOCK)
            g = load_block(p_grad, row, start, n_rows, n_columns, 0.0, BLOCK)
        u = row_distance(x, top, tau, tau_low, alpha)
        w = support_power(u, beta[:, None], POWER)
        dx = w * (g - delta[:, None])
        store_block(p_dx, dx * w_scale[:, None], row, start, n_rows, n_columns, BLOCK)
        if DALPHA:
            # less the mean, as sum dx = 0: where u hardly varies (near alpha = 1, ties) the terms would cancel
            dalpha += dx * (log_term(u) - mean_term[:, None])
    if DALPHA:
        value = beta * beta * tl.sum(dalpha, 1) / total
        tl.store(p_dalpha + row, value, mask=row < n_rows)
