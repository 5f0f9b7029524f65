import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eval.common.scoring
from eval.common.scoring import Context, Runtime, pack_rows, score, shifted
from model.config import ModelConfig
from model.transformer import Transformer
from tests.eval.conftest import UniformModel


def runtime(row_tokens: int) -> Runtime:
    return Runtime(torch.device("cpu"), None, row_tokens)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_rows_hold_every_context_once_in_order_within_the_bound(lengths: list[int], row_tokens: int) -> None:
    rows = pack_rows(lengths, row_tokens)
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= row_tokens


def test_packed_scores_are_those_of_each_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48)
    model = Transformer(config).eval()
    generator = np.random.default_rng(0)
    contexts = [shifted(generator.integers(0, 50, n + 1), 0, n) for n in (1, 17, 30, 5)]
    packed = score(model, contexts, runtime(64), "packed")
    monkeypatch.setattr(eval.common.scoring, "LOGITS_AT_ONCE", 3 * 50)  # several chunks to a row
    alone = score(model, contexts, runtime(1), "alone")
    for one, other, context in zip(packed, alone, contexts, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, atol=1e-5)
        logits = model.logits(model(torch.from_numpy(context.tokens)[None]))[0]
        wanted = torch.nn.functional.cross_entropy(logits, torch.from_numpy(context.targets), reduction="none")
        np.testing.assert_allclose(one.loss, wanted.detach().numpy(), atol=1e-5)
        np.testing.assert_array_equal(one.hit, (logits.argmax(-1).numpy() == context.targets))


def test_every_forward_pass_is_told() -> None:
    told: list[int] = []
    counted = Runtime(torch.device("cpu"), None, 64, done=lambda: told.append(1))
    contexts = [shifted(np.arange(41), 0, 40) for _ in range(3)]
    score(UniformModel(50), contexts, counted)
    assert len(told) == len(pack_rows([40] * 3, 64)) == 3


def test_only_targets_are_scored_and_contexts_without_any_give_nothing() -> None:
    some = Context(np.arange(4), np.array([-100, 3, -100, 0]))
    none = Context(np.arange(3), np.full(3, -100))
    first, empty, last = score(UniformModel(8), [some, none, some], runtime(100), "test")
    assert len(first.loss) == len(last.loss) == 2 and len(empty.loss) == 0
    np.testing.assert_allclose(first.loss, np.log(8), rtol=1e-6)
    np.testing.assert_array_equal(first.hit, [False, True])  # equal logits: the first token wins


def test_logits_never_exceed_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Recording(UniformModel):
        def logits(self, hidden: Tensor) -> Tensor:
            sizes.append(len(hidden) * self.vocab_size)
            return super().logits(hidden)

    monkeypatch.setattr(eval.common.scoring, "LOGITS_AT_ONCE", 100)
    scores = score(Recording(10), [shifted(np.zeros(96, np.int64), 0, 95)], runtime(1000), "test")
    assert len(scores[0].loss) == 95 and max(sizes) == 100 and sum(sizes) == 950


def test_a_window_needs_a_successor_of_its_last_token() -> None:
    context = shifted(np.arange(5, dtype=np.uint16), 1, 4)
    assert context.tokens.tolist() == [1, 2, 3] and context.targets.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="needs a successor"):
        shifted(np.arange(5), 0, 5)


def test_a_diverged_model_is_an_error() -> None:
    class Diverged(UniformModel):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) * float("nan")

    with pytest.raises(ValueError, match="diverged"):
        score(Diverged(4), [shifted(np.zeros(3, np.int64), 0, 2)], runtime(10), "test")
