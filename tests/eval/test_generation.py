"""Generation against plain loops over the full forward pass."""

import numpy as np
import pytest
import torch
from torch import Tensor

import model.inference.decoding as model_decoding
from eval.generation import (
    Generated,
    GenerationOptions,
    batches_by_length,
    draw_tokens,
    generate,
    stream,
)
from model.config import AttentionConfig, ModelConfig
from model.kv_cache import KVCache
from model.transformer import Transformer


def build(kind: str = "asentmax", **options) -> Transformer:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.5)
    attention = AttentionConfig(kind=kind)  # type: ignore[arg-type]
    return Transformer(ModelConfig(**{**sizes, **options}, attention=attention)).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(n):
        sequence.append(int(model.logits(model(torch.tensor([sequence]))[0, -1]).argmax()))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("kind", ["softmax", "ssmax", "entmax", "asentmax"])
def test_greedy_equals_full_passes_in_batches_of_any_size(kind: str) -> None:
    model = build(kind)
    texts = prompts(3, 40, 1, 17, 17, 60)
    expected = [Generated(greedy(model, prompt, 6), "length") for prompt in texts]
    assert any(len(set(one.tokens)) > 2 for one in expected)
    for options in (dict(), dict(batch_tokens=50), dict(chunk_tokens=7)):
        assert generate(model, texts, max_new_tokens=6, **options) == expected


def test_prompts_whose_last_token_is_decoded_are_continued_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    texts = prompts(3, 40, 2, 17, 60)
    expected = generate(model, texts, max_new_tokens=4)
    fed: list[tuple[int, ...]] = []
    real = model_decoding.extend

    def caught(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
        fed.append(tuple(tokens.flatten().tolist()))
        return real(model, tokens, cache)

    monkeypatch.setattr(model_decoding, "extend", caught)
    for options in (dict(), dict(batch_tokens=1), dict(chunk_tokens=7)):
        fed.clear()
        assert generate(model, texts, max_new_tokens=4, decode_last_prompt_token=True, **options) == expected
        assert fed[0] == tuple(text[-1] for text in sorted(texts, key=len)[::-1])[: len(fed[0])]
    with pytest.raises(ValueError, match="prompt 1 has one token: decode_last_prompt_token needs one before it"):
        generate(model, [[1, 2], [1]], max_new_tokens=1, decode_last_prompt_token=True)


def test_64_prompts_at_once_equal_one_by_one() -> None:
    model = build()
    texts = prompts(*(1 + 7 * i % 64 for i in range(64)))
    alone = [generate(model, [text], max_new_tokens=3)[0] for text in texts]
    assert generate(model, texts, max_new_tokens=3) == alone


def test_draws_depend_on_seed_and_prompt_not_on_the_batch() -> None:
    model = build()
    texts = prompts(*(1 + 7 * i % 64 for i in range(16)))
    drawn = generate(model, texts, max_new_tokens=5, temperature=0.9)
    assert drawn == generate(model, texts, max_new_tokens=5, temperature=0.9, batch_tokens=1)
    assert drawn != generate(model, texts, max_new_tokens=5, temperature=0.9, seed=1)
    same = generate(model, texts[:1] * 8, max_new_tokens=5, temperature=5.0)
    assert len({tuple(one.tokens) for one in same}) > 4


def test_why_a_text_ends() -> None:
    model = build()
    texts = prompts(3, 40, 1, 17)
    plain = [greedy(model, prompt, 8) for prompt in texts]
    eos = plain[1][2]
    stop = (plain[3][4:6], plain[0][1:2])
    found = generate(model, texts, max_new_tokens=8, eos=eos, stop=stop)
    for text, one in zip(plain, found, strict=True):
        ends = [(i, i, "eos") for i, token in enumerate(text) if token == eos]
        for s in stop:
            starts = range(8 - len(s) + 1)
            ends += [(i + len(s) - 1, i, "stop") for i in starts if text[i : i + len(s)] == s]
        _, length, why = min(ends, default=(8, 8, "length"))
        assert one == Generated(text[:length], why)
    assert {one.ended for one in found} >= {"eos", "stop"}


def test_pieces_of_the_stream_make_the_texts() -> None:
    """Tokens that may become a stop sequence wait until they did not."""
    model = build()
    texts = prompts(5, 9)
    plain = [greedy(model, prompt, 6) for prompt in texts]
    missed = [plain[0][2], plain[0][3], (plain[0][4] + 1) % 97]
    pieces = list(stream(model, texts, GenerationOptions(6, stop=(missed,))))
    assert [sum((p.tokens for p in pieces if p.index == i), []) for i in range(2)] == plain
    assert len(set(plain[0])) == 6
    assert [len(p.tokens) for p in pieces if p.index == 0] == [1, 1, 0, 0, 3, 1]
    assert [p.ended for p in pieces if p.index == 0] == [None] * 5 + ["length"]
    first = next(iter(stream(model, texts, GenerationOptions(10**4))))  # nothing beyond the first token is computed
    assert first.tokens == plain[first.index][:1]


def sample(logits: list[float], **options) -> np.ndarray:
    """Shares of each token over an even grid of the uniform number."""
    n = 20000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    rows = torch.tensor(logits).expand(n, -1)
    drawn: Tensor = draw_tokens(rows, uniform, GenerationOptions(1, **options))
    return torch.bincount(drawn, minlength=len(logits)).numpy() / n


def test_draws_follow_the_distribution() -> None:
    logits = [0.0, 2.0, -1.0, 1.0]
    p = torch.tensor(logits).softmax(-1).numpy()  # 0.087, 0.644, 0.032, 0.237
    np.testing.assert_allclose(sample(logits, temperature=1.0), p, atol=1e-4)
    hot = (torch.tensor(logits) / 3).softmax(-1).numpy()
    np.testing.assert_allclose(sample(logits, temperature=3.0), hot, atol=1e-4)
    two = np.array([0, p[1], 0, p[3]]) / (p[1] + p[3])
    np.testing.assert_allclose(sample(logits, temperature=1.0, top_k=2), two, atol=1e-4)
    np.testing.assert_allclose(sample(logits, temperature=1.0, top_p=0.7), two, atol=1e-4)
    np.testing.assert_allclose(sample(logits, temperature=1.0, top_p=0.5), [0, 1, 0, 0])
    np.testing.assert_allclose(sample(logits, temperature=1.0, top_k=2, top_p=0.7), [0, 1, 0, 0])
    np.testing.assert_allclose(sample(logits, temperature=1.0, top_k=9), p, atol=1e-4)


def test_batches_are_sorted_and_bounded() -> None:
    assert batches_by_length([3, 9, 1, 9, 30], 1, 20) == [[4], [1, 3], [0, 2]]
    assert batches_by_length([], 1, 20) == []


def test_ids_beyond_the_tokenizer_are_never_chosen() -> None:
    model = build()
    texts = prompts(4, 4, 4)
    for temperature in (0.0, 5.0):
        found = generate(model, texts, max_new_tokens=30, vocab_size=7, temperature=temperature)
        assert max(max(one.tokens) for one in found) < 7


def test_errors_name_the_numbers() -> None:
    model = build()
    with pytest.raises(ValueError, match="prompt 1 has 9 tokens, max_prompt_tokens is 8"):
        generate(model, prompts(8, 9), max_new_tokens=1, max_prompt_tokens=8)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, [[]], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"prompt 0 has token ids outside \[0, 97\)"):
        generate(model, [[3, 97]], max_new_tokens=1)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits that are not finite"):
        generate(model, [[3]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0: expected at least 1"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_p=0.0), r"top_p is 0.0: expected a probability in \(0, 1\]"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(stop=[[1], []]), r"stop is \[\[1\], \[\]\]"),
        (dict(chunk_tokens=0), "chunk_tokens is 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**{"max_new_tokens": 1, **options})


def test_memory_is_for_the_tokens_that_come_not_for_those_allowed() -> None:
    model = build()
    found = generate(model, prompts(20), max_new_tokens=10**12, stop_when=lambda tokens: len(tokens) == 12)
    assert found[0].tokens == greedy(model, prompts(20)[0], 12)
