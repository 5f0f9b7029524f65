"""Forward and backward pass of a training step as two CUDA graphs, for models so small that the host needs longer to
launch their kernels than the GPU to run them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig

LossSum = Callable[[dict[str, Any]], Tensor]


def check_graphs(network: ModelConfig, *, device: torch.device, world_size: int, accumulation: int, mode: str) -> None:
    """Raises ValueError for what a captured step cannot do.

    Args:
        accumulation: micro-batches of an optimizer step; the graphs write every gradient anew.
        mode: model.activation_checkpointing.
    """
    told = "model.cuda_graphs is true, which needs"
    if device.type != "cuda":
        raise ValueError(f"{told} a CUDA device, but the run is on {device.type}: set it to false")
    if world_size > 1:
        raise ValueError(f"{told} a run on one device, but there are {world_size} ranks: set it to false")
    if accumulation > 1:
        raise ValueError(
            f"{told} whole steps at once, but each has {accumulation} micro-batches: "
            "set data.micro_batch_size to data.global_batch_size"
        )
    if mode != "none":
        raise ValueError(f"{told} model.activation_checkpointing none, but it is {mode!r}")
    if network.attention.is_trained_sparse:
        kind = network.attention.kind
        raise ValueError(f"{told} attention that can be captured, but attention.kind is {kind!r}: set it to false")
    if network.attention.anneal_steps:
        raise ValueError(
            f"{told} the same work every step, but attention.anneal_steps is {network.attention.anneal_steps}"
        )


class GraphedLoss:
    """Sums of losses of a micro-batch, captured at the first call and replayed after it.

    Capturing runs the model a few times on the first batch without touching gradients. Autocast is as it was then.

    Args:
        model: whose parameters get gradients.
        loss_sum: batch -> one tensor; may not wait for the device.
    """

    def __init__(self, model: nn.Module, loss_sum: LossSum) -> None:
        self._step = _Step(model, loss_sum)
        self._graphed: Any = None
        self._shape = torch.Size()

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch: tokens and labels int64 (B, T), cu_seqlens None. Returns what loss_sum does, with its gradient, valid
        until the next call's backward pass. Raises ValueError for packed documents or another shape than the first."""
        tokens, labels = batch["tokens"], batch["labels"]
        if batch["cu_seqlens"] is not None:
            raise ValueError(
                "model.cuda_graphs is true, which needs sequences of one document each (data.task), but this batch "
                "packs several: set it to false"
            )
        if self._graphed is None:
            self._shape = tokens.shape
            # capturing leaves the nodes that accumulate gradients on a stream of its own: backward synchronises with it
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            # the cache of casted weights would hold tensors of the graph's memory beyond a replay
            cast = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype=cast, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
                self._graphed = torch.cuda.make_graphed_callables(self._step, (tokens, labels), allow_unused_input=True)
        if tokens.shape != self._shape:
            raise ValueError(
                f"model.cuda_graphs captured a batch of {tuple(self._shape)} tokens, but this one has "
                f"{tuple(tokens.shape)}: set it to false"
            )
        loss_sum = self._graphed(tokens, labels)
        assert isinstance(loss_sum, Tensor)
        return loss_sum.clone()  # the graph's own output is overwritten by the next step


class _Step(nn.Module):
    """loss_sum as a function of tensors, and a module, whose parameters torch then knows to be inputs."""

    def __init__(self, model: nn.Module, loss_sum: LossSum) -> None:
        super().__init__()
        self.model, self.loss_sum = model, loss_sum

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.loss_sum(dict(tokens=tokens, labels=labels, cu_seqlens=None, max_seqlen=tokens.shape[1]))
