import pytest
import torch
from torch import Tensor

from data.store import TokenStore
from data.tokenizer import load_tokenizer
from eval.common.scoring import Runtime
from eval.held_out.config import EvalConfig
from eval.held_out.needle import (
    LINE_SEARCH,
    NeedleSample,
    build_samples,
    context_of,
    depths,
    measure_needles,
    samples_per_cell,
)
from tests.eval.conftest import BASE_LENGTH, ByteCodec, ListStore, UniformModel

CONFIG = EvalConfig(needle_samples=2, needle_depths=3, needle_digits=5)


@pytest.fixture(scope="module")
def samples(corpus) -> list[NeedleSample]:
    store, tokenizer = TokenStore(corpus / "heldout"), load_tokenizer(corpus / "tokenizer.model")
    built, notes = build_samples(store, tokenizer, BASE_LENGTH, [1, 4], CONFIG)
    assert notes == []
    return built


def test_the_grid_is_complete_with_controls(samples: list[NeedleSample]) -> None:
    cells = [(sample.multiple, sample.depth) for sample in samples]
    for depth in (0.0, 0.5, 1.0):
        assert cells.count((1, depth)) == cells.count((4, depth)) == 2
    assert cells.count((1, None)) == 6 and len(cells) == 18


def test_the_needle_stands_at_its_depth_and_is_asked_at_the_end(corpus, samples: list[NeedleSample]) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    for sample in samples:
        assert len(sample.tokens) == sample.multiple * BASE_LENGTH and sample.tokens[0] == tokenizer.bos_id
        value = tokenizer.decode(sample.value)
        assert len(value) == 5 and value.isdigit()
        text = tokenizer.decode([*sample.tokens.tolist(), sample.value[-1]])
        prompt, answer = text.rsplit("\nassert ", 1)
        name = answer.split(" == ")[0]
        assert answer == f"{name} == {value}" and name.startswith("ACCESS_CODE_")
        line = f"\n{name} = {value}\n"
        if sample.depth is None:
            assert name not in prompt
            continue
        assert prompt.count(line) == 1
        needle = tokenizer.encode(f"\n{name} = ") + sample.value + tokenizer.encode("\n")
        start = sample.needle_start
        assert sample.tokens[start : start + len(needle)].tolist() == needle
        question = len(tokenizer.encode(f"\nassert {name} == "))
        places = len(sample.tokens) - 1 - len(needle) - question - (len(sample.value) - 1)
        assert 0 <= sample.depth * places - (start - 1) <= LINE_SEARCH + 0.5
        # A line of the text ends before the needle, unless none ends nearby.
        before = tokenizer.decode(sample.tokens[max(1, start - LINE_SEARCH) : start].tolist())
        assert before.endswith("\n") or "\n" not in before


def test_only_the_value_is_scored_and_each_target_follows_its_token(samples: list[NeedleSample]) -> None:
    for sample in samples:
        context = context_of(sample)
        n = len(sample.value)
        assert (context.targets >= 0).sum() == n and context.targets[-n:].tolist() == sample.value
        assert context.tokens[-n + 1 :].tolist() == sample.value[:-1]


def test_the_control_is_the_same_question_of_the_same_text(samples: list[NeedleSample]) -> None:
    pairs = [(a, b) for a, b in zip(samples, samples[1:], strict=False) if b.depth is None]
    assert len(pairs) == 6
    for sample, control in pairs:
        assert control.value == sample.value and len(control.tokens) == len(sample.tokens)
        start, question = sample.needle_start, 20
        assert control.tokens[:start].tolist() == sample.tokens[:start].tolist()
        assert control.tokens[-question:].tolist() == sample.tokens[-question:].tolist()


def test_samples_depend_on_the_seed_alone_and_differ_from_each_other(corpus, samples: list[NeedleSample]) -> None:
    store, tokenizer = TokenStore(corpus / "heldout"), load_tokenizer(corpus / "tokenizer.model")
    again, _ = build_samples(store, tokenizer, BASE_LENGTH, [4], CONFIG)
    wanted = [sample for sample in samples if sample.multiple == 4]
    assert [s.tokens.tolist() for s in again if s.depth is not None] == [s.tokens.tolist() for s in wanted]
    assert len({tuple(s.tokens.tolist()) for s in samples}) == len(samples)
    assert len({tuple(s.value) for s in samples}) == 12


class CopyingModel(UniformModel):
    """Finds the value by looking it up in its own context; knows nothing else and then says the token 0."""

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        assert cu_seqlens is not None
        answers = []
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            text = bytes(token if token < 256 else 0 for token in tokens[0, start:stop].tolist())
            prompt, _, question = text.rpartition(b"assert ")
            name, _, typed = question.partition(b" == ")
            _, found, rest = prompt.partition(name + b" = ")
            answer = torch.zeros(stop - start)
            if found:
                known = rest.split(b"\n")[0]
                answer[-len(typed) - 1 :] = torch.tensor(list(known[: len(typed) + 1]))
            answers.append(answer)
        return torch.cat(answers)[None, :, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()


def test_a_model_that_reads_the_needle_is_right_and_the_control_shows_chance() -> None:
    store = ListStore(["x = 1\n" * 200, "y = 2\n" * 300])
    built, _ = build_samples(store, ByteCodec(), 200, [1, 2], CONFIG)
    cells = measure_needles(CopyingModel(258), built, Runtime(torch.device("cpu"), None, 1000), "copy")
    assert {(c.multiple, c.depth) for c in cells} == {(m, d) for m in (1, 2) for d in (0.0, 0.5, 1.0)} | {(1, None)}
    for cell in cells:
        count = 6 if cell.depth is None else 2
        assert cell.tokens == [5] * count and cell.hits == [0 if cell.depth is None else 5] * count


def test_lengths_beyond_the_text_are_noted_and_short_contexts_refused() -> None:
    store = ListStore(["x = 1\n" * 50])
    built, notes = build_samples(store, ByteCodec(), 200, [1, 2], CONFIG)
    assert {sample.multiple for sample in built} == {1}
    assert notes == ["No needles at 2x (400 tokens): held-out text has 300 tokens."]
    with pytest.raises(
        ValueError,
        match="64 tokens cannot hold a needle of .* set a larger --base_length or fewer --needle_digits",
    ):
        build_samples(store, ByteCodec(), 64, [1], CONFIG)


def test_long_lengths_get_fewer_samples_but_at_least_one() -> None:
    config = EvalConfig(needle_samples=4, needle_depths=5, needle_tokens=10000)
    assert [samples_per_cell(length, config) for length in (128, 500, 1000, 1001, 9000)] == [4, 4, 2, 1, 1]


def test_depths_are_evenly_spread() -> None:
    assert depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0] and depths(4) == [0.0, 0.3333, 0.6667, 1.0]
