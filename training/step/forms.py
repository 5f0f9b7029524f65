"""The forms of a micro-batch, for which compiled blocks are compiled one by one."""

from collections.abc import Iterator
from typing import Any

import torch

Batch = dict[str, Any]  # as the loader's, on this rank's device


def forms(batch: Batch, sequence_length: int) -> Iterator[Batch]:
    """The tokens and labels of a micro-batch as rows of whole sequences, and twice as two packed documents: whatever a
    compiled block has to know of documents, their lengths among it, has changed then, and is no constant any more.

    batch: tokens and labels, whose elements are whole sequences. sequence_length: in tokens.
    """
    tokens, labels = batch["tokens"], batch["labels"]
    rows = {"tokens": tokens.view(-1, sequence_length), "labels": labels.view(-1, sequence_length)}
    yield {**rows, "cu_seqlens": None, "max_seqlen": sequence_length}
    n_tokens = tokens.numel()
    for first in (n_tokens // 2, n_tokens // 3):
        bounds = torch.tensor([0, first, n_tokens], dtype=torch.int32, device=tokens.device)
        packed = {"tokens": tokens.view(1, -1), "labels": labels.view(1, -1)}
        yield {**packed, "cu_seqlens": bounds, "max_seqlen": n_tokens - first}
