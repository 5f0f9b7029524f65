"""Tiny random models of transformers, and eager attention with entmax in softmax's place."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels import entmax

WINDOW, TOKENS = 5, 12
SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    max_position_embeddings=64,
)  # fmt: skip
DECODER = dict(SIZES, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=None)
LAYERS = ["full_attention", "sliding_attention"]
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**DECODER)),
    "mistral": (MistralForCausalLM, MistralConfig(**DECODER, sliding_window=WINDOW)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **DECODER, sliding_window=WINDOW, layer_types=LAYERS, attn_logit_softcapping=None, query_pre_attn_scalar=8
        ),
    ),
}
ENCODER = BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)


def build(name: str, kind: str = "entmax", **changes: Any) -> PreTrainedModel:
    cls, config = (BertModel, ENCODER) if name == "bert" else DECODERS[name]
    return seeded(cls, type(config)(**{**config.to_dict(), **changes}), kind)


def seeded(cls: Any, config: Any, kind: str = "entmax") -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = kind
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)  # scores wide enough for weights of zero
    return model.eval()


@contextlib.contextmanager
def softmax_is_entmax(monkeypatch: pytest.MonkeyPatch, alpha: float = 1.5) -> Iterator[None]:
    def replaced(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        weights = entmax(x if dtype is None else x.to(dtype), alpha=alpha, dim=dim, backend="torch")
        assert bool((weights == 0).any())
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", replaced)
        yield


def draw(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(2, 50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, **inputs: Any) -> Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of one weighted sum of the real tokens' outputs."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (out * weight).sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert x.keys() == y.keys() and len(x) > 5
    for name in x:
        if name.endswith("key.bias"):
            continue  # zero but for rounding: it adds one number to all scores of a query
        torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-3 * float(y[name].abs().max()) + 1e-6, msg=name)


def padding(side: str) -> Tensor:
    """Rows of 12 and 8 real tokens; "between": pads in the middle as well."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "right": slice(8, 12), "between": slice(3, 7)}[side]] = 0
    return mask


ALL = [*DECODERS, "bert"]
