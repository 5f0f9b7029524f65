"""Memory that eviction frees, beside the same policies that hide keys."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from model.inference.evicting import evicting
from model.inference.incremental import extend, make_cache, prefill
from model.policies.eviction import Budgets, EvictingPolicy
from model.policies.h2o import H2O
from model.policies.policy import use_policy
from model.policies.quest import Quest
from model.policies.snapkv import AdaSnapKV, PyramidKV, SnapKV
from tests.model.test_transformer import make, tiny, tokens

CLOSE = dict(atol=1e-4, rtol=1e-4)
PROMPT, DECODED = 100, 28
TOGETHER = Budgets()
POLICIES = [
    SnapKV(20, 6, budgets=TOGETHER), PyramidKV(20, 6), AdaSnapKV(20, 6), H2O(9, 8), H2O(9, 8, Budgets(beta=4)),
    SnapKV(10**6, budgets=TOGETHER), H2O(10**6, 3), H2O(70, 40), AdaSnapKV(30, 40, 3, "mean", Budgets(4, 0.3)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def hidden_keys(model: Any, policy: EvictingPolicy | None, chunk: int, prompt: int = PROMPT) -> tuple[Tensor, Any]:
    """Hidden states of the prompt's last token and all later ones, under a policy that keeps what it hides."""
    cache = make_cache(model, 1, 128)
    with use_policy(model, policy) if policy else nullcontext() as record:
        found = [prefill(model, tokens()[:, :prompt].tolist(), cache, chunk)]
        found += [extend(model, tokens()[:, i : i + 1], cache)[0] for i in range(prompt, PROMPT + DECODED)]
    return torch.cat(found), record


def freed_keys(model: Any, policy: EvictingPolicy, chunk: int, prompt: int = PROMPT) -> tuple[Tensor, Any]:
    with evicting(model, policy) as cache:
        found = [cache.prefill(tokens()[0, :prompt].tolist(), chunk)]
        found += [cache.extend(tokens()[:, i : i + 1])[0] for i in range(prompt, PROMPT + DECODED)]
    return torch.cat(found), cache


@pytest.mark.parametrize("positions", ["nape", "rope"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_freed_keys_are_the_hidden_ones(policy: EvictingPolicy, positions: Any) -> None:
    model = make(tiny("softmax", positions, n_heads=6, n_kv_heads=3, d_model=48, n_layers=3))
    expected, record = hidden_keys(model, policy, 40)
    found, cache = freed_keys(model, policy, 40)
    torch.testing.assert_close(found, expected, **CLOSE)
    dense = record.density("decode").min() == 1
    assert dense == ("1000000" in repr(policy))
    assert (cache.held < PROMPT + DECODED).any() == (not dense) and cache.length == PROMPT + DECODED


@pytest.mark.parametrize("policy", [
    SnapKV(5, 2, budgets=TOGETHER), H2O(3, 1), AdaSnapKV(4, 2), H2O(20, 3, Budgets(beta=3)),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("prompt", [1, 2, 33])
def test_prompts_of_any_length(policy: EvictingPolicy, prompt: int) -> None:
    model = make(tiny("ssmax", "nope"))
    expected, _ = hidden_keys(model, policy, 1000, prompt)
    found, _ = freed_keys(model, policy, 1000, prompt)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_layers_and_heads_hold_their_budgets() -> None:
    model = make(tiny("softmax", "rope", n_heads=6, n_kv_heads=3, d_model=48, n_layers=3))
    held: Callable[[EvictingPolicy], Tensor] = lambda policy: freed_keys(model, policy, 100)[1].held  # noqa: E731
    assert (held(SnapKV(20, 6, budgets=TOGETHER)) == 20 + DECODED).all()
    by_layer = held(PyramidKV(20, 6))
    assert (by_layer == by_layer[:, :1]).all() and by_layer[0, 0] > by_layer[1, 0] > by_layer[2, 0]
    assert by_layer.sum() == 9 * (20 + DECODED)
    by_head = held(AdaSnapKV(20, 6))
    assert len(set(by_head.flatten().tolist())) > 2 and (by_head.sum(1) - 3 * (20 + DECODED)).abs().max() <= 3
    assert (held(H2O(9, 8)) == 9 + 8 + 1).all()


@pytest.mark.parametrize("policy", [PyramidKV(400, 8), AdaSnapKV(400, 8), H2O(200, 200)], ids=repr)
def test_memory_falls_to_what_is_held(policy: EvictingPolicy) -> None:
    """A fifth of 2,000 tokens, and room for 256 more."""
    model = make(tiny("softmax", "rope", n_heads=6, n_kv_heads=3, d_model=48, n_layers=3))
    prompt = torch.randint(0, 97, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    with evicting(model, policy) as cache:
        cache.prefill(prompt, 1000)
        cache.extend(torch.tensor([[5]]))
        token = 2 * 3 * 3 * 8 * 4  # bytes: keys and values, layers, KV heads, channels, float32
        remembered = 3 * 3 * 401 * 4 if policy.weighs else 0
        assert abs(cache.nbytes - token * (400 + 256) - remembered) <= token * 3
        assert cache.held.sum() <= 9 * 402


def test_what_frees_nothing_or_makes_no_sense_is_refused() -> None:
    softmax, text = make(tiny("softmax", "nape")), tokens()
    refused = [
        (softmax, SnapKV(9), "snapkv: budgets.grouped is False"),
        (softmax, H2O(9, 9, Budgets(even=0.5)), "h2o: budgets.even is 0.5"),
        (softmax, Quest(4), "quest evicts no keys: expected SnapKV"),
        (make(tiny("asentmax", "nape")), H2O(9, 9), "this model's kind is 'asentmax'"),
        (make(tiny("softmax", "nape", window=9)), H2O(9, 9), "window is 9: h2o chooses from the whole text"),
    ]
    for model, policy, said in refused:
        with pytest.raises(ValueError, match=said), evicting(model, policy):
            pass
    with evicting(softmax, H2O(9, 9)) as cache:
        for tried, said in (
            (lambda: cache.extend(text[:, :1]), "prefill it with the prompt first"),
            (lambda: cache.prefill([], 9), "none empty"),
            (lambda: softmax(text), "evicts from the cache of one text"),
        ):
            with pytest.raises(ValueError, match=said):
                tried()
        cache.prefill(text[0, :50].tolist(), 50)
        other = make_cache(softmax, 1, 60)
        for tried, said in (
            (lambda: cache.prefill([5], 9), "holds a text of 50 tokens"),
            (lambda: cache.extend(text[:, :2]), r"shape \(1, 2\): expected \(1, 1\)"),
            (lambda: prefill(softmax, [[5, 6]], other, 9), "2 keys came from another cache"),
        ):
            with pytest.raises(ValueError, match=said):
                tried()
    with torch.no_grad():
        softmax(text)
    with pytest.raises(ValueError, match="the with block of `evicting` has ended"):
        cache.extend(text[:, 50:51])


def test_keys_are_chosen_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would turn float32 scores into bfloat16: use_policy chooses so too."""
    on: dict[str, list[bool]] = {"snapkv": [], "h2o": []}
    for kind in (SnapKV, H2O):

        def watched(self: Any, *given: Any, evict: Any = kind.evict) -> Any:
            on[self.name].append(torch.is_autocast_enabled("cpu"))
            return evict(self, *given)

        monkeypatch.setattr(kind, "evict", watched)
    policies: list[EvictingPolicy] = [SnapKV(20, 8, budgets=TOGETHER), H2O(10, 10)]
    with torch.autocast("cpu", torch.bfloat16):
        for policy in policies:
            freed_keys(make(tiny("softmax", "rope")), policy, 1000)
    assert len(on["snapkv"]) == 2 and len(on["h2o"]) == 2 * (1 + DECODED)  # layers; H2O at each token
    assert not any(on["snapkv"] + on["h2o"])


def test_a_prompt_that_failed_leaves_nothing_behind() -> None:
    model = make(tiny("softmax", "nape"))
    expected, _ = freed_keys(model, H2O(10, 10), 1000)
    with evicting(model, H2O(10, 10)) as cache:
        with pytest.raises(IndexError):
            cache.prefill([*tokens()[0, :60].tolist(), 500], 30)
        found = [cache.prefill(tokens()[0, :PROMPT].tolist(), 1000)]
        found += [cache.extend(tokens()[:, i : i + 1])[0] for i in range(PROMPT, PROMPT + DECODED)]
    torch.testing.assert_close(torch.cat(found), expected)


def test_h2o_stays_in_its_memory() -> None:
    with evicting(make(tiny("softmax", "nape")), H2O(10, 10)) as cache:
        cache.prefill(tokens()[0, :60].tolist(), 1000)
        places = []
        for i in range(60, 100):
            cache.extend(tokens()[:, i : i + 1])
            places.append([part.keys.data_ptr() for layer in cache._layers for part in layer.parts])
    assert all(place == places[0] for place in places) and len(places[0]) == 2
