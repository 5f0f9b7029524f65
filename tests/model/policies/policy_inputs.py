"""Queries, keys and views for tests of single policies, and what a policy selects of them."""

from dataclasses import replace

import torch
from torch import Tensor

from model.policies.policy import SequenceView, SparsePolicy

SLOPES = torch.tensor([1.0, 0.3, 0.0, 0.0])


def view_of(n_queries: int, n_keys: int, slopes: Tensor | None = None, **options) -> SequenceView:
    facts = SequenceView(0, 2, n_queries == 1, n_keys - n_queries, 0, 8**-0.5, None, slopes, {})
    return replace(facts, **options)


def draw(n_queries: int, n_keys: int, seed: int = 0, size: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(4, n_queries, 8, generator=generator)
    k, v = torch.randn(2, 2, n_keys, 8, generator=generator)
    return q, size * k, v


def weights_of(q: Tensor, k: Tensor, view: SequenceView) -> Tensor:
    """Dense attention weights (H, Tq, Tk), float64."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2) * view.scale
    distance = torch.arange(n_queries)[:, None] + view.query_start - torch.arange(n_keys)
    if view.alibi_slopes is not None:
        scores -= view.alibi_slopes[:, None, None] * distance
    return scores.masked_fill(distance < 0, -torch.inf).softmax(-1)


def mask_of(policy: SparsePolicy, q: Tensor, k: Tensor, view: SequenceView) -> Tensor:
    """Bool (H, Tq, Tk), what is selected and visible."""
    rows = slice(0, q.shape[1])
    return policy.select(q, k, view).mask(rows, k.shape[1]) & view.visible(rows, k.shape[1], q.device)
