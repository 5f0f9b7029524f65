"""Row-wise entmax for use outside attention: Triton kernels, one registered operator, the public function.

A row's scores are shifted by its maximum, so every threshold lies in [-1, 0). Rows that fit one block stay in registers
(SINGLE), longer ones are read again, a block of columns at a time, on every pass.
"""

import torch
import triton
from torch import Tensor

from kernels.alpha_entmax.reference import entmax_reference
from kernels.alpha_entmax.rowwise_passes import (
    MAX_STEPS,
    START_STEPS,
    TOLERANCE,
    entmax_rows_backward,
    entmax_rows_forward,
)
from kernels.alpha_entmax.threshold import power_of
from kernels.common.arguments import check_alpha, check_integer, check_tensor
from kernels.common.backends import choose_backend, operator_name
from kernels.common.derivatives import once, refuse_transforms
from kernels.common.launching import bfloat16_as_float32

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_BLOCK, MAX_BLOCK = 16, 8192  # columns of a program; 8192 scores and their powers fit the registers of 16 warps
TILE_ELEMENTS = 1024  # of several short rows that share a program


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


@torch.library.custom_op(operator_name("entmax_rows"), mutates_args=())
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


@torch.library.custom_op(operator_name("entmax_rows_backward"), mutates_args=())
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


torch.library.register_autograd(operator_name("entmax_rows"), _autograd_backward, setup_context=_setup_context)


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
    check_alpha(alpha, dtype, "torch.softmax")
    if not isinstance(alpha, Tensor):
        return torch.full((1,), float(alpha), dtype=dtype, device=x.device)
    expected = _shape_of_sums(x, dim)
    aligned = (1,) * (x.dim() - alpha.dim()) + tuple(alpha.shape)
    if len(aligned) > x.dim() or any(size not in (1, full) for size, full in zip(aligned, expected, strict=True)):
        raise ValueError(f"alpha must be a number or broadcast to {expected}, got shape {tuple(alpha.shape)}")
    return alpha.to(x.device, dtype)
