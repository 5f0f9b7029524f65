"""What the analyses of trained runs share: documents of a corpus, and a model under another configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UsageError
from data.store import TokenStore
from model.config import ModelConfig
from model.transformer import Transformer


def long_documents(split: Path, tokens: int, most: int, first: int = 0, step: int = 1) -> Tensor:
    """int64 (documents, tokens): the starts of documents that have so many tokens.

    Args:
        split: a prepared corpus's train or heldout folder.
        first, step: of the documents that are looked at, in the order of the split.

    Raises:
        UsageError: no document is that long.
    """
    store = TokenStore(split)
    lengths = np.asarray(store.lengths)
    found = [int(i) for i in range(first, len(lengths), step) if lengths[i] >= tokens][:most]
    if not found:
        raise UsageError(f"{split} has no document of {tokens:,} tokens: pass a smaller --tokens")
    return torch.stack([torch.from_numpy(store.document(i)[:tokens].astype(np.int64)) for i in found])


@contextmanager
def configured(model: Transformer, config: ModelConfig) -> Iterator[None]:
    """Inside, model and layers compute by another configuration of the same weights."""
    before = model.config
    owners = [model, *(block.attention for block in model.layers())]
    for owner in owners:
        owner.config = config
    try:
        yield
    finally:
        for owner in owners:
            owner.config = before
