"""Another attention in the place of the layers' own for a while, or an observer of what they attend with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from model.attention import AttentionOverride
from model.transformer import Transformer


@contextmanager
def override_attention(model: Transformer, overrides: Sequence[AttentionOverride]) -> Iterator[None]:
    """Inside, layer i's attention is overrides[i]'s; one that returns None observes, and the layer attends itself.

    Raises: ValueError where the model's attention is overridden already.
    """
    layers = [block.attention for block in model.layers()]
    if any(layer.override is not None for layer in layers):
        raise ValueError("the model is under a policy already: leave that one's with block first")
    for layer, override in zip(layers, overrides, strict=True):
        layer.override = override
    try:
        yield
    finally:
        for layer in layers:
            layer.override = None
