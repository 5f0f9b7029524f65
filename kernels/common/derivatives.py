"""What the hand-written passes do not have: second derivatives, and transforms such as vmap and forward mode. Asked for
them they refuse, where PyTorch would leave their part out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Once(torch.autograd.Function):
    """A gradient as it is; `sources`, what it depends on, only tie it to their graph."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "attention and entmax are differentiable once by this backend, but a gradient (create_graph=True) is being "
            "differentiated: take backend='reference' (entmax_attention) or backend='torch' (entmax, "
            "selected_block_attention, block_bias_attention, block_mean_scores)"
        )


def once(gradients: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """The gradients, which refuse to be differentiated. sources: what they depend on, the incoming gradient and the
    inputs; torch's once_differentiable knows the incoming one alone, and where that is a constant drops the rest."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in sources):
        return gradients
    return tuple(_Once.apply(gradient, *sources) for gradient in gradients)


def refuse_transforms(what: str, way_out: str, *tensors: Any) -> None:
    """Raises NotImplementedError under torch.func's transforms and for dual tensors of forward mode."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and forward_ad._current_level >= 0:
        duals = (forward_ad.unpack_dual(x).tangent for x in tensors if isinstance(x, Tensor))
        transformed = any(tangent is not None for tangent in duals)
    if transformed:
        raise NotImplementedError(
            f"{what} has no forward-mode derivatives, vmap or other torch.func transforms: {way_out}"
        )
