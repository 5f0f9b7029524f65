"""Several needles: what stands in the text, what is asked, what is scored."""

import pytest
import torch
from torch import Tensor

from eval.common.scoring import Runtime
from eval.held_out.config import EvalConfig
from eval.held_out.multi_needle import (
    KINDS,
    MultiNeedleSample,
    build_multi_samples,
    measure_multi_needles,
    samples_per_length,
)
from tests.eval.conftest import ByteCodec, ListStore, UniformModel

CONFIG = EvalConfig(needle_samples=2, needle_depths=3, needle_digits=5, needle_count=3, needle_tokens=8000)
STORE = ListStore(["x = 1\n" * 200, "y = 2\n" * 300])
RUNTIME = Runtime(torch.device("cpu"), None, 2000)


@pytest.fixture(scope="module")
def samples() -> list[MultiNeedleSample]:
    built, notes = build_multi_samples(STORE, ByteCodec(), 500, [1, 2], CONFIG)
    assert notes == []
    return built


def test_every_kind_and_length_has_its_samples(samples: list[MultiNeedleSample]) -> None:
    found = [(sample.kind, sample.multiple) for sample in samples]
    assert [samples_per_length(length, CONFIG) for length in (100, 500, 1000, 9000)] == [6, 4, 2, 1]
    for kind in KINDS:
        assert found.count((kind, 1)) == 4 and found.count((kind, 2)) == 2
    assert len({tuple(sample.context.tokens.tolist()) for sample in samples}) == len(samples)


def test_needles_stand_in_the_text_and_what_is_asked_is_scored(samples: list[MultiNeedleSample]) -> None:
    for sample in samples:
        tokens, targets = sample.context.tokens, sample.context.targets
        assert len(tokens) == len(targets) == sample.multiple * 500 and tokens[0] == ByteCodec.bos_id
        scored = targets >= 0
        assert (tokens[1:][scored[:-1]] == targets[:-1][scored[:-1]]).all() and scored[-1]
        prompt, asked = ByteCodec().decode([*tokens.tolist(), int(targets[-1])]).split("\nassert ", 1)
        places = [prompt.index(f"\n{name} = {value}\n") for name, value in sample.needles]
        assert len(places) == 3 and places == sorted(places)
        answers = bytes(targets[scored].tolist()).decode()
        names, values = zip(*sample.needles, strict=True)
        if sample.kind == "multi_value":
            assert len(set(names)) == 1 and asked == f"{names[0]} in ({', '.join(values)}"
            assert answers == "".join(values)
            continue
        questions = [line.split(" == ") for line in asked.split("\nassert ")]
        assert len(set(names)) == 3 and len(questions) == (1 if sample.kind == "multi_key" else 3)
        assert all(dict(sample.needles)[name] == value for name, value in questions)
        assert answers == "".join(value for _, value in questions)


def test_the_seed_decides(samples: list[MultiNeedleSample]) -> None:
    again, _ = build_multi_samples(STORE, ByteCodec(), 500, [2], CONFIG)
    wanted = [sample for sample in samples if sample.multiple == 2]
    assert [s.context.tokens.tolist() for s in again] == [s.context.tokens.tolist() for s in wanted]
    queries = [sample for sample in samples if sample.kind == "multi_query"]
    orders = {tuple(bytes(s.context.targets[s.context.targets >= 0].tolist())[::5]) for s in queries}
    assert len(orders) == len(queries)


class ReadsAhead(UniformModel):
    """Says the token that stands behind, which for the last one of a context it does not know."""

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        assert cu_seqlens is not None
        following = tokens[0].roll(-1)
        following[cu_seqlens[1:].long() - 1] = 0
        return following[None, :, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()


def test_hits_are_counted_by_sample(samples: list[MultiNeedleSample]) -> None:
    cells = {(cell.kind, cell.multiple): cell for cell in measure_multi_needles(ReadsAhead(258), samples, RUNTIME, "x")}
    assert cells.keys() == {(kind, multiple) for kind in KINDS for multiple in (1, 2)}
    for (kind, multiple), cell in cells.items():
        count, size = {1: 4, 2: 2}[multiple], 5 if kind == "multi_key" else 15
        assert cell.tokens == [size] * count and cell.hits == [size - 1] * count
    for cell in measure_multi_needles(UniformModel(258), samples, RUNTIME, "x"):
        assert cell.hits == [0] * len(cell.tokens)  # its first choice is token 0


def test_contexts_that_are_too_short_are_noted() -> None:
    built, notes = build_multi_samples(STORE, ByteCodec(), 120, [1, 8], CONFIG)
    assert {sample.multiple for sample in built} == {8}
    assert notes == [f"No {kind} needles at 1x: 120 tokens cannot hold 3." for kind in KINDS]
