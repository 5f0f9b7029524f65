"""Shared cases: every backend is tested on the same ones."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import kernels.alpha_entmax.backward_launches
import kernels.alpha_entmax.results
from kernels.common.backends import INTERPRETED
from tests.kernels import interpreter

if INTERPRETED:
    interpreter.prepare()


@pytest.fixture(autouse=True)
def lists_of_keys_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short inputs take what long ones do."""
    monkeypatch.setattr(kernels.alpha_entmax.results, "SHORTEST_KEY_LIST", 0)
    monkeypatch.setattr(kernels.alpha_entmax.backward_launches, "LEAST_STEPS", 1)


SLOPES = [1.0, 0.5, 0.0, 0.1]
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Case:
    """Keyword arguments of entmax_attention with the sizes they belong to; lengths are odd on purpose."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    n_queries: int = 111
    n_keys: int = 111

    def tensors(self, dtype: torch.dtype, seed: int = 0, head_dim: int = 16) -> tuple[torch.Tensor, ...]:
        """q, k, v (requiring grad) and a weight for the output."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, tokens, head_dim, dtype=torch.float64, generator=generator).to(dtype)

        q, k, v = draw(HEADS, self.n_queries), draw(KV_HEADS, self.n_keys), draw(KV_HEADS, self.n_keys)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), draw(HEADS, self.n_queries)


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


DOCUMENTS = _int32(0, 5, 5, 60, 61, 111)
CASES = [
    Case("causal", batch=2),
    Case("full", dict(causal=False)),
    Case("one token", n_queries=1, n_keys=1),
    Case("decode", n_queries=1, n_keys=63),
    Case("chunked prefill", n_queries=40),
    Case("more queries than keys", n_queries=70, n_keys=33),
    Case("window", dict(window=7)),
    Case("window longer than the text", dict(window=500), n_keys=90, n_queries=30),
    Case("alibi", dict(alibi_slopes=torch.tensor(SLOPES)), batch=2),
    Case("alibi full", dict(alibi_slopes=torch.tensor(SLOPES), causal=False), n_queries=63),
    Case("documents", dict(cu_seqlens=DOCUMENTS)),
    Case("documents full", dict(cu_seqlens=DOCUMENTS, causal=False)),
    Case("documents alibi window", dict(cu_seqlens=DOCUMENTS, alibi_slopes=torch.tensor(SLOPES), window=20)),
    Case("key lengths", dict(kv_lens=_int32(33, 0, 111)), batch=3, n_queries=40),
    Case(
        "key lengths full alibi", dict(kv_lens=_int32(90, 1, 111), causal=False, alibi_slopes=torch.tensor(SLOPES)), 3
    ),
    Case("scale", dict(scale=1.7)),
]
ALPHAS: list[Any] = [1.05, 1.5, 2.0, [1.05, 1.3, 1.5, 1.9]]
