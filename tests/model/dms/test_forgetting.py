"""Memory that eviction frees, beside the cache that hides what is evicted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import DMSConfig
from model.inference.forgetting import ForgettingCache
from model.inference.incremental import extend, make_cache, prefill
from model.transformer import Transformer
from tests.model.test_transformer import make, tiny

DECODED = 40


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def evicting_model(window: int, positions: Any, offset: float = 0.0) -> Transformer:
    sizes = DMSConfig(window=window, scale=1.0, offset=offset)
    return make(tiny("dms", positions, n_heads=6, n_kv_heads=3, d_model=48, attention={"dms": sizes})).double()


def draw(count: int) -> Tensor:
    return torch.randint(0, 97, (1, count), generator=torch.Generator().manual_seed(1))


def hidden_keys(model: Transformer, text: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Hidden states of the prompt's last token and of later ones, and the decisions (L, G, T)."""
    cache = make_cache(model, 1, text.shape[1])
    found = [prefill(model, text[:, :prompt].tolist(), cache, 30)]
    found += [extend(model, text[:, i : i + 1], cache)[0] for i in range(prompt, text.shape[1])]
    return torch.cat(found), torch.stack([layer.extra[0, 0].mT != 0 for layer in cache.layers(1, None)])  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["nape", "rope"])
@pytest.mark.parametrize("window", [0, 1, 9, 60, 200])
@pytest.mark.parametrize("prompt", [1, 2, 61])
def test_forgotten_keys_are_the_hidden_ones(prompt: int, window: int, positions: Any) -> None:
    """And each head holds the last window + 1 tokens, and those before that nobody has evicted."""
    model, text = evicting_model(window, positions), draw(prompt + DECODED)
    expected, decisions = hidden_keys(model, text, prompt)
    cache = ForgettingCache(model)
    found = [cache.prefill(text[0, :prompt].tolist(), 30)]
    found += [cache.extend(text[:, i : i + 1])[0] for i in range(prompt, prompt + DECODED)]
    # float64 sums in another order; rotary tables and temperatures are float32 in both
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-10, rtol=1e-10)
    n = prompt + DECODED
    evicted = torch.nn.functional.pad(decisions[..., 1:], (0, 1))
    held = (~evicted | (n - 1 - torch.arange(n) <= window)).sum(-1)
    assert torch.equal(cache.held, held) and cache.length == n
    if window < 60:
        assert (held < n).all() and len(set(held.flatten().tolist())) > 2  # ragged


@torch.no_grad()
def test_memory_falls_to_what_is_held() -> None:
    """All but the window's 101 tokens are gone of 2,000, and there is room for 256 more; decoding takes no more."""
    model, text = evicting_model(100, "rope", offset=1e3), draw(2300)
    cache = ForgettingCache(model)
    cache.prefill(text[0, :2000].tolist(), 1000)
    token = 2 * 2 * 3 * 8 * 8  # bytes: keys and values, layers, KV heads, channels, float64
    assert (cache.held == 101).all() and cache.nbytes == token * (101 + 256)
    places = [part.keys.data_ptr() for layer in cache._layers for part in layer.parts]
    for i in range(2000, 2300):
        cache.extend(text[:, i : i + 1])
    assert (cache.held == 101).all() and cache.nbytes == token * (101 + 256)
    assert places == [part.keys.data_ptr() for layer in cache._layers for part in layer.parts]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="this model's kind is 'softmax': only dms decides what to forget"):
        ForgettingCache(make(tiny("softmax")))
    cache = ForgettingCache(evicting_model(4, "nape"))
    with pytest.raises(ValueError, match="prefill it with the prompt first"):
        cache.extend(draw(1))
    cache.prefill([5, 6], 9)
    with pytest.raises(ValueError, match="holds a text of 2 tokens"):
        cache.prefill([5], 9)
