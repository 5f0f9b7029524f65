"""Which kernels of torch decoding lets scaled_dot_product_attention take."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from model.inference.evicting import evicting
from model.inference.forgetting import ForgettingCache
from model.inference.incremental import extend, make_cache, prefill
from model.policies.snapkv import AdaSnapKV
from tests.model.test_transformer import make, tiny, tokens

PROMPT = 60


class Calls(TorchFunctionMode):
    """Whether cuDNN's kernel was allowed in each call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["nape", "rope"])
@pytest.mark.parametrize("kind", ["softmax", "nsa", "dsa", "dms", "hierarchical", "evicting", "forgetting"])
def test_decoding_never_lets_cudnn_plan_for_each_number_of_keys(kind: str, positions: Any) -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()  # what torch begins with, else this shows nothing
    model = make(tiny({"evicting": "softmax", "forgetting": "dms"}.get(kind, kind), positions))  # type: ignore[arg-type]
    prompt, token = tokens()[:, :PROMPT].tolist(), tokens()[:, PROMPT : PROMPT + 1]
    with Calls() as calls:
        if kind == "evicting":
            with evicting(model, AdaSnapKV(20, 6)) as kept:
                kept.prefill(prompt[0], PROMPT)
                calls.allowed.clear()
                kept.extend(token)
        elif kind == "forgetting":
            held = ForgettingCache(model)
            held.prefill(prompt[0], PROMPT)
            calls.allowed.clear()
            held.extend(token)
        else:
            cache = make_cache(model, 1, PROMPT + 1)
            prefill(model, prompt, cache, PROMPT)
            calls.allowed.clear()
            extend(model, token, cache)
    plain_products = (kind, positions) == ("evicting", "nape")
    assert plain_products or len(calls.allowed) >= model.config.n_layers
    assert not any(calls.allowed)
