"""Row-wise entmax for use outside attention: Triton kernels, one registered operator, the public function.

A row's scores are shifted by its maximum, so every threshold lies in [-1, 0). Rows that fit one block stay in registers
(SINGLE), longer ones are read again, a block of columns at a time, on every pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.alpha_entmax.operator import power_of
from kernels.alpha_entmax.reference import entmax_reference
from kernels.alpha_entmax.threshold import (
    log2,
    newton_step,
    norm_and_slope,
    raise_threshold,
    support_distance,
    support_power,
)
from kernels.common.arguments import check_distance, check_integer, check_number, check_tensor, readable
from kernels.common.backends import choose_backend
from kernels.common.derivatives import once, refuse_transforms
from kernels.common.launching import bfloat16_as_float32

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_BLOCK, MAX_BLOCK = 16, 8192  # columns of a program; 8192 scores and their powers fit the registers of 16 warps
TILE_ELEMENTS = 1024  # of several short rows that share a program
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


def _launch(x: Tensor) -> dict[str, int | bool]:
    """Arguments that both kernels share. Lengths compile anew by their power of two up to MAX_BLOCK only."""
    n_columns = x.shape[1]
    block = min(max(triton.next_power_of_2(n_columns), MIN_BLOCK), MAX_BLOCK)
    rows = max(1, TILE_ELEMENTS // block)
    return dict(
        n_rows=x.shape[0],
        n_columns=n_columns,
        ROWS=rows,
        BLOCK=block,
        SINGLE=n_columns <= block,
        ALIGNED=n_columns % 16 == 0,
        num_warps=max(4, block // 512),
    )


@torch.library.custom_op("longsplash::entmax_rows", mutates_args=())
@bfloat16_as_float32(n_outputs=1)
def entmax_rows(x: Tensor, alpha: Tensor, power: str) -> tuple[Tensor, Tensor]:
    """Entmax of the rows of a matrix.

    Args:
        x: (n_rows, n_columns), float32, bfloat16 or float16.
        alpha: float32 (1,) or (n_rows,).
        power: from `power_of`.

    Returns: p, like x; float32 (3, n_rows), each row's maximum and the two terms of its threshold of (alpha - 1) * (x -
    maximum), the first NaN for rows with NaN or +inf.
    """
    x, alpha = x.contiguous(), alpha.contiguous()
    out, rows = torch.empty_like(x), x.new_empty((3, x.shape[0]), dtype=torch.float32)
    if x.numel() == 0:
        return out, rows.zero_()
    shared = _launch(x)
    with torch.cuda.device_of(x):
        entmax_rows_forward[(triton.cdiv(x.shape[0], int(shared["ROWS"])),)](
            p_x=x,
            p_alpha=alpha,
            p_out=out,
            p_rows=rows,
            alpha_step=int(len(alpha) > 1),
            tolerance=TOLERANCE,
            START_STEPS=START_STEPS,
            MAX_STEPS=MAX_STEPS,
            POWER=power,
            **shared,
        )
    return out, rows


@entmax_rows.register_fake
def _(x, alpha, power):
    return x.new_empty(x.shape), x.new_empty((3, x.shape[0]), dtype=torch.float32)


@torch.library.custom_op("longsplash::entmax_rows_backward", mutates_args=())
@bfloat16_as_float32(n_outputs=1)
def _backward(
    grad: Tensor, x: Tensor, alpha: Tensor, rows: Tensor, power: str, with_dalpha: bool
) -> tuple[Tensor, Tensor]:
    """dx like x; dalpha float32 like alpha, 0 unless with_dalpha. With w = u ** (beta - 1) and delta = sum w g / sum w:

    dx = w (g - delta),    dalpha = beta ** 2 * sum (g - delta) p (1 - log u)    (x held fixed)
    """
    grad, x, alpha = grad.contiguous(), x.contiguous(), alpha.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(alpha)
    dalpha = rows.new_empty(x.shape[0] if with_dalpha else 0)
    shared = _launch(x)
    with torch.cuda.device_of(x):
        entmax_rows_backward[(triton.cdiv(x.shape[0], int(shared["ROWS"])),)](
            p_grad=grad,
            p_x=x,
            p_alpha=alpha,
            p_rows=rows,
            p_dx=dx,
            p_dalpha=dalpha,
            alpha_step=int(len(alpha) > 1),
            DALPHA=with_dalpha,
            POWER=power,
            **shared,
        )
    if not with_dalpha:
        return dx, torch.zeros_like(alpha)
    return dx, dalpha.sum(0, keepdim=True) if len(alpha) == 1 < len(dalpha) else dalpha


@_backward.register_fake
def _(grad, x, alpha, rows, power, with_dalpha):
    return x.new_empty(x.shape), alpha.new_empty(alpha.shape)


def _setup_context(ctx, inputs, output):
    x, alpha, power = inputs
    ctx.save_for_backward(x, alpha, output[1])
    ctx.power = power
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx, grad, _):
    x, alpha, rows = ctx.saved_tensors
    with torch.no_grad():
        gradients = _backward(grad, x, alpha, rows, ctx.power, ctx.needs_input_grad[1])
    return *once(gradients, grad, x, alpha), None


torch.library.register_autograd("longsplash::entmax_rows", _autograd_backward, setup_context=_setup_context)


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, backend: str = "auto") -> Tensor:
    """Alpha-entmax along one dimension (arXiv:1905.05702): exact zeros, slices sum to 1; softmax as alpha -> 1,
    sparsemax at alpha = 2.

    Args:
        x: scores, float64, float32, bfloat16 or float16, any shape and strides. -inf entries get exactly 0; a slice
            that is -inf throughout gives 0 throughout; NaN or +inf makes its slice NaN.
        alpha: in (1, 2], from 1.0001 on (in float64 from 1 + 1e-12): a number or a tensor that broadcasts against x
            with size 1 at `dim` (arXiv:1909.00015). May require grad.
        dim: the dimension that sums to 1.
        backend: "triton" (CUDA, or CPU tensors under TRITON_INTERPRET=1; not float64; Newton's method from a subset's
            threshold, where arXiv:2604.15180 starts from a histogram), "torch" (the reference, bisection) or "auto":
            triton on CUDA where it can, else torch. Both compute 16-bit x in float32.

    Returns: probabilities, shape and dtype of x; differentiable in x and alpha, by backend "triton" once: it
    raises RuntimeError where its gradient is differentiated, and NotImplementedError under torch.func's transforms.

    Raises: TypeError or ValueError naming the argument, its value and what was expected. A tensor alpha's values are
    checked on CPU only (on CUDA this would synchronise).
    """
    check_tensor("x", x)
    check_integer("dim", dim)
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {DTYPES}, got {x.dtype}")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise ValueError(f"dim must be one of the {x.dim()} of x {tuple(x.shape)}, got {dim}")
    if x.dim() == 0:
        return entmax(x[None], alpha, 0, backend)[0]
    unsupported = f"takes float32, bfloat16 and float16, got {x.dtype}" if x.dtype == torch.float64 else None
    backend = choose_backend(backend, BACKENDS, x, unsupported)
    given, alpha = alpha, _checked_alpha(alpha, x, dim)
    power = power_of(given)
    if backend == "torch":
        return _entmax_torch(x, alpha, dim)
    refuse_transforms("entmax by backend 'triton'", "take backend='torch'", x, alpha)
    moved = x.movedim(dim, -1)
    if alpha.numel() != 1:
        alpha = alpha.expand(_shape_of_sums(x, dim)).movedim(dim, -1)
    out, _ = entmax_rows(moved[None].flatten(0, -2), alpha.flatten(), power)
    return out.view(moved.shape).movedim(-1, dim)


def _shape_of_sums(x: Tensor, dim: int) -> tuple[int, ...]:
    """x's shape with size 1 at dim."""
    shape = list(x.shape)
    shape[dim] = 1
    return tuple(shape)


def _entmax_torch(x: Tensor, alpha: Tensor, dim: int) -> Tensor:
    """The reference, with what it leaves open: 16 bits, NaN."""
    bounded = (x < torch.inf).all(dim, keepdim=True)  # False for NaN
    p = entmax_reference(x.to(alpha.dtype), alpha, dim).to(x.dtype)
    spoiled = x * torch.where(bounded, 1.0, torch.nan).to(x.dtype)  # gives NaN slices a NaN gradient, others none
    return torch.where(bounded, p, spoiled)


def _checked_alpha(alpha: float | Tensor, x: Tensor, dim: int) -> Tensor:
    """alpha in float32 (float64 for float64 x) on x's device: (1,), or a tensor's own shape."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        if not 1 < alpha <= 2:
            raise ValueError(f"alpha must lie in (1, 2], got {alpha}; for softmax use torch.softmax")
        check_distance(alpha, dtype)
        return torch.full((1,), float(alpha), dtype=dtype, device=x.device)
    expected = _shape_of_sums(x, dim)
    aligned = (1,) * (x.dim() - alpha.dim()) + tuple(alpha.shape)
    if len(aligned) > x.dim() or any(size not in (1, full) for size, full in zip(aligned, expected, strict=True)):
        raise ValueError(f"alpha must be a number or broadcast to {expected}, got shape {tuple(alpha.shape)}")
    if not alpha.is_floating_point():
        raise ValueError(f"alpha must be floating point, got {alpha.dtype}")
    if readable(alpha):
        outside = alpha.detach()[~((alpha > 1) & (alpha <= 2))]
        if outside.numel():
            raise ValueError(f"alpha must lie in (1, 2], got {outside.tolist()}; bound it, e.g. by a sigmoid")
        if alpha.numel():
            check_distance(float(alpha.detach().min()), dtype)
    return alpha.to(x.device, dtype)
