"""Losses of a linear head that never hold the logits of all tokens at once: cross entropy, and distillation."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def resolve_loss_backend(requested: str, device: torch.device) -> str:
    """The backend that a run on `device` uses: "liger" or "chunked".

    Args:
        requested: "auto" takes liger-kernel on CUDA where it is installed, else the chunked loss of this file.

    Raises:
        ValueError: an unknown name, or "liger" where liger-kernel is not installed or the device is not a GPU.
    """
    if requested not in ("auto", "liger", "chunked"):
        raise ValueError(f"model.loss_backend is {requested!r}: expected auto, liger or chunked")
    installed = find_spec("liger_kernel") is not None
    if requested == "auto":
        return "liger" if installed and device.type == "cuda" else "chunked"
    if requested == "liger" and not installed:
        raise ValueError(
            "model.loss_backend is 'liger' but liger-kernel is not installed: pip install liger-kernel, "
            "or use --model.loss_backend chunked"
        )
    if requested == "liger" and device.type != "cuda":
        raise ValueError(
            f"model.loss_backend is 'liger', which needs a CUDA device, but the run is on {device.type}: "
            "use --model.loss_backend auto"
        )
    return requested


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str, chunk_tokens: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits = hidden @ weight.T, with z_loss * logsumexp(logits)^2 of each token (PaLM, arXiv
    2204.02311, section 5), which keeps the normaliser near 1; summed over tokens.

    Args:
        hidden: (N, C), any floating dtype.
        weight: (V, C), the head, often float32 while hidden is bfloat16.
        labels: (N,) int64 in [0, V), or IGNORE_INDEX where nothing is to be predicted.
        backend: "chunked" or "liger", from resolve_loss_backend.
        chunk_tokens: tokens whose logits exist at one time ("chunked" only).
        z_loss: coefficient.

    Returns:
        The sum of both losses of valid tokens in nats (scalar, float32; float64 for float64 input; 0 if all labels are
        ignored), which carries the gradient, and the z-loss in it (likewise, without a gradient; by Liger rounded to
        the dtype of the products). The caller chooses the denominator.
    """
    if backend == "liger":
        return _liger_sum(hidden, weight, labels, z_loss)
    total, parts = _ChunkedSum.apply(hidden, weight, labels, chunk_tokens, z_loss, None)
    return total, parts[1]


class TeacherHead(NamedTuple):
    """What a student's predictions are to come near.

    Attributes:
        hidden: (N, C of the teacher), any floating dtype, without a gradient.
        weight: (V, C of the teacher), the teacher's head.
        share: of the divergence in the loss, in [0, 1]; the rest is the cross entropy's.
        temperature: that both models' logits are divided by in the divergence, above 0.
    """

    hidden: Tensor
    weight: Tensor
    share: float
    temperature: float


def linear_distillation(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: TeacherHead, *, chunk_tokens: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a student's logits and their divergence from a teacher's (Hinton et al., arXiv 1503.02531,
    section 2), summed over tokens with a label:

        (1 - share) * cross entropy + share * T^2 * KL(softmax(teacher's / T) || softmax(student's / T)) + z-loss

    T^2 keeps the divergence's gradient of one size whatever the temperature T. Of the teacher, too, no more than
    chunk_tokens tokens have logits at one time. Liger's losses are not used: LigerFusedLinearJSDLoss rounds logits to
    the products' dtype before log-softmax, and LigerFusedLinearKLDivFunction wants the teacher's probabilities of all
    tokens at once; neither has a z-loss.

    Args:
        Others as of linear_cross_entropy.

    Returns:
        The sum (scalar, as linear_cross_entropy's), which carries the gradient of hidden and weight, and its parts
        without a gradient, (3,): cross entropy, z-loss, and KL in nats, without share or T^2.
    """
    total, parts = _ChunkedSum.apply(hidden, weight, labels, chunk_tokens, z_loss, teacher)
    return total, parts


def _liger_sum(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weight = softcap = None
    label_smoothing = 0.0
    # The weight goes in uncast: its gradient is accumulated and returned in float32 only then.
    loss, z_sum, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.to(_compute_dtype(hidden)), weight, labels, bias, class_weight, IGNORE_INDEX, z_loss,
        label_smoothing, "sum", softcap, z_loss > 0, torch.float32,
    )  # fmt: skip
    return loss, loss.new_zeros(()) if z_sum is None else z_sum.detach().to(loss.dtype)


class _ChunkedSum(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, as Liger does (arXiv 2410.10989, section 3.2).

    Recomputing the logits in backward would cost a fourth matrix product of the head's size and save nothing: the loss
    is the first node of the backward pass, so both forms hold the weight's gradient at the moment of highest memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        z_loss: float,
        teacher: TeacherHead | None,
    ) -> tuple[Tensor, Tensor]:
        compute = _compute_dtype(hidden)
        wide = torch.promote_types(compute, torch.float32)
        if not hidden.is_cuda:
            compute = wide  # CPU matrix products cannot widen their result, and bfloat16 ones are slow
        if teacher is not None:
            teacher = teacher._replace(weight=teacher.weight.to(compute))
        with torch.autocast(hidden.device.type, enabled=False):
            parts, grad_hidden, grad_weight = _chunked_sum(
                hidden, weight.to(compute), labels, chunk_tokens, wide, z_loss, teacher, ctx.needs_input_grad[:2]
            )
        ctx.gradients = (grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        total = parts.sum()
        if teacher is not None:
            soft = teacher.share * teacher.temperature**2
            total = (1 - teacher.share) * parts[0] + parts[1] + soft * parts[2]
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss of a linear head frees its gradients in backward: it cannot run backward twice"
            )
        grad_hidden, grad_weight = (g if g is None else g.mul_(grad_output.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight, None, None, None, None


def _chunked_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    wide: torch.dtype,
    z_loss: float,
    teacher: TeacherHead | None,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums of cross entropy, z-loss and divergence (3,), and gradients of all together (None where not needed), as
    linear_distillation weighs them. Sums are in `wide`, products in weight.dtype, the teacher's weight has it too."""
    valid = labels != IGNORE_INDEX  # (N,)
    targets = labels.masked_fill(~valid, 0).unsqueeze(1)  # (N, 1)
    hard = 1.0 if teacher is None else 1 - teacher.share
    sums = torch.zeros(3, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if needs_grad[1] else None
    for rows in torch.arange(hidden.shape[0]).split(chunk_tokens):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1)
        h, target, keep = hidden[chunk].to(weight.dtype), targets[chunk], valid[chunk]  # (n, C), (n, 1), (n,)
        logits = _matmul(h, weight.t(), wide)  # (n, V)
        of_target = logits.gather(1, target)  # (n, 1)
        excess = None
        if teacher is not None:
            divergence, excess = _divergence(  # (n,), (n, V)
                logits, _matmul(teacher.hidden[chunk].to(weight.dtype), teacher.weight.t(), wide), teacher.temperature
            )
            sums[2] += (divergence * keep).sum()
        log_p = torch.log_softmax(logits, dim=1)  # (n, V)
        del logits
        log_p_target = log_p.gather(1, target)
        sums[0] -= (log_p_target.squeeze(1) * keep).sum()
        log_z = of_target - log_p_target  # logsumexp (n, 1)
        if z_loss:
            sums[1] += z_loss * (log_z.squeeze(1).square() * keep).sum()
        if not any(needs_grad):
            continue
        p = log_p.exp_()
        if z_loss:
            p *= hard + 2 * z_loss * log_z
        elif hard != 1:
            p *= hard
        p.scatter_add_(1, target, p.new_full(target.shape, -hard))  # p (hard + 2 z log Z) - hard onehot
        if teacher is not None and excess is not None:  # T^2 KL has the gradient T (p_T - q_T)
            p.add_(excess, alpha=teacher.share * teacher.temperature)
            del excess
        residual = p.to(h.dtype)
        del log_p, p
        keep = keep.unsqueeze(1).to(h.dtype)  # ignored rows are zeroed in (n, C) instead of (n, V) tensors
        if grad_hidden is not None:
            grad_hidden[chunk] = (residual @ weight) * keep
        if grad_weight is not None:
            _add_matmul(grad_weight, residual.t(), h * keep)
        del residual  # or it would be there beside the next chunk's logits
    return sums, grad_hidden, grad_weight


def _divergence(logits: Tensor, of_teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each token (n,), p and q the student's and the teacher's probabilities at a temperature, and p - q.
    logits: (n, V). of_teacher: (n, V), whose values are lost."""
    log_q = torch.log_softmax(of_teacher if temperature == 1 else of_teacher.div_(temperature), dim=1)
    del of_teacher
    log_p = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)
    q = log_q.exp()
    divergence = log_q.sub_(log_p).mul_(q).sum(dim=1)
    return divergence, log_p.exp_().sub_(q)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's where it is on."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which may be wider than that of a and b (CUDA only)."""
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype, without a temporary of total's size."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
