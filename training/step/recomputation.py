"""Activation checkpointing: blocks are computed again in backward, but for what is expensive and small."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.kept_operators import ATTENTION, THRESHOLDS
from model.transformer import Block
from training.step.activations import ActivationCheckpointing

Contexts = Callable[[], tuple[Any, Any]]
COMPILED_CHECKPOINTS = logging.getLogger("torch._higher_order_ops.wrap")


def checkpoint_blocks(blocks: Iterable[nn.Module], mode: ActivationCheckpointing) -> None:
    """Recompute each block's activations in backward, from its input and entmax's thresholds or, where mode is
    "selective", attention's output too. There is no randomness inside, so no RNG state is kept."""
    COMPILED_CHECKPOINTS.addFilter(_of_blocks)
    for block in blocks:
        assert isinstance(block, Block)
        if mode == "selective":
            block.forward = _checkpointed(block.forward, ATTENTION, _traced_attention)  # type: ignore[method-assign]
        elif block.attention.alpha is not None:
            block.forward = _checkpointed(block.forward, THRESHOLDS, _traced_thresholds)  # type: ignore[method-assign]
        else:
            block.forward = _checkpointed(block.forward, (), None)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor], kept: tuple[Any, ...], traced: Contexts | None) -> Any:
    """kept: operators. traced: the contexts that say so to torch.compile."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    eager = {**options, "context_fn": lambda: _contexts(kept)} if kept else options
    compiled = {**options, "context_fn": traced} if traced else options

    # a function of this file: torch.compile passes over a functools.partial of torch's own function without a word
    def checkpointed(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, **compiled)  # type: ignore[no-any-return]
        return checkpoint(forward, *args, **eager)  # type: ignore[no-any-return]

    return checkpointed


def _of_blocks(record: logging.LogRecord) -> bool:
    """Leaves out torch's warning of operations in place, of which blocks have none."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def _traced_thresholds() -> Any:
    return create_selective_checkpoint_contexts(list(THRESHOLDS))


def _traced_attention() -> Any:
    return create_selective_checkpoint_contexts(list(ATTENTION))


# part of the key of compiled graphs on disk, which torch keeps none of without it
_traced_thresholds.cache_hash = str([operator.name() for operator in THRESHOLDS])  # type: ignore[attr-defined]
_traced_attention.cache_hash = str([operator.name() for operator in ATTENTION])  # type: ignore[attr-defined]


class _Operators(TorchDispatchMode):
    """Sees every operator of an eager block. (torch's own contexts refuse what ZeRO 3 does in a block the second time:
    findings/torch_selective_checkpoint_refuses_other_operators.sh.)"""

    supports_higher_order_operators = True

    def __init__(self, kept: tuple[Any, ...], results: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept, self.results = kept, results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or torch.compile leaves FlexAttention as it is, with all scores


class _Keep(_Operators):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.kept:  # detached: autograd ties what it returns to the graph, which holds this
            self.results[function].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Reuse(_Operators):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.results[function]:
            return self.results[function].popleft()
        return function(*args, **(kwargs or {}))


def _contexts(kept: tuple[Any, ...]) -> tuple[_Keep, _Reuse]:
    """Of a block's forward and of its recomputation."""
    results: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept, results), _Reuse(kept, results)
