import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.store import TokenStore
from data.tokenizer import load_tokenizer
from eval.common.scoring import Runtime
from eval.held_out.config import EvalConfig
from eval.held_out.perplexity import (
    TextBytes,
    Window,
    bytes_of_tokens,
    length_windows,
    measurable_multiples,
    measure_perplexity,
    plan_perplexity,
    position_edges,
    training_windows,
)
from tests.eval.conftest import ByteCodec, ListStore, PositionModel, UniformModel

RUNTIME = Runtime(torch.device("cpu"), None, 64)
CONFIG = EvalConfig(lengths=[1, 2, 4], max_documents=3, headline_tokens=0)


def predicted(windows: list[Window]) -> list[tuple[int, int]]:
    return [(w.document, place) for w in windows for place in range(w.start + 1, w.stop + 1)]


@given(st.lists(st.integers(2, 200), min_size=1, max_size=8), st.integers(1, 70))
def test_training_windows_predict_every_token_but_the_first_once(lengths: list[int], base: int) -> None:
    windows = training_windows(np.array(lengths), base)
    assert predicted(windows) == [(d, place) for d, n in enumerate(lengths) for place in range(1, n)]
    assert all(w.stop - w.start <= base for w in windows)


@given(st.integers(1, 40), st.sampled_from([[1, 2, 4, 8], [1, 3, 6], [2]]))
def test_every_length_scores_the_same_tokens(base: int, multiples: list[int]) -> None:
    columns = [length_windows([3, 7], m, multiples[-1], base) for m in multiples]
    for multiple, windows in zip(multiples, columns, strict=True):
        assert predicted(windows) == predicted(columns[0])
        assert {w.stop - w.start for w in windows} == {multiple * base}


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token() -> None:
    texts = ["a" * 90, "é" * 60, "\u2581x" * 30, "short"]
    store = ListStore(texts)
    plan = plan_perplexity(store, 16, CONFIG)
    model = UniformModel(512)
    result = measure_perplexity(model, store, plan, bytes_of_tokens(ByteCodec()), RUNTIME, "uniform")
    tokens, size = sum(len(t.encode()) + 1 for t in texts), sum(len(t.encode()) for t in texts)
    headline = result.headline
    assert (sum(headline.tokens), sum(headline.bytes)) == (tokens, size)
    bits = sum(headline.loss) / math.log(2) / sum(headline.bytes)
    assert bits == pytest.approx(9 * tokens / size, rel=1e-6)
    for sums in result.by_length.values():
        assert sums.tokens == [64] * 3
        np.testing.assert_allclose(sums.loss, 64 * math.log(512), rtol=1e-6)
    assert model.read == tokens + 3 * 3 * 64


def test_columns_differ_only_by_the_context_a_token_sees() -> None:
    store = ListStore(["a" * 100, "a" * 80, "a" * 70])
    plan = plan_perplexity(store, 16, CONFIG)
    result = measure_perplexity(PositionModel(258), store, plan, bytes_of_tokens(ByteCodec()), RUNTIME, "known")
    for multiple, sums in result.by_length.items():
        size = 16 * multiple
        wanted = 64 // size * sum(math.log(2 + t) for t in range(size))
        np.testing.assert_allclose(sums.loss, wanted, rtol=1e-6)
    assert plan.edges == [0, 16, 32, 64] and result.position_tokens == [16, 16, 32]
    wanted_bins = [sum(math.log(2 + t) for t in range(a, b)) for a, b in zip(plan.edges, plan.edges[1:], strict=False)]
    for bins in result.position_loss:
        np.testing.assert_allclose(bins, wanted_bins, rtol=1e-6)


def test_a_sample_of_windows_keeps_the_bound_and_the_bytes_of_what_it_scores() -> None:
    store = ListStore(["ab" * 200, "é" * 200, "c" * 77])
    config = replace(CONFIG, headline_tokens=100)
    plan = plan_perplexity(store, 16, config)
    assert plan.windows_total == len(training_windows(store.lengths, 16)) and plan.tokens_total == 401 + 401 + 78
    assert 84 < sum(w.stop - w.start for w in plan.windows) <= 100
    assert plan == plan_perplexity(store, 16, config)
    assert plan.windows != plan_perplexity(store, 16, replace(config, seed=1)).windows
    result = measure_perplexity(UniformModel(258), store, plan, bytes_of_tokens(ByteCodec()), RUNTIME, "sample")
    assert sum(result.headline.tokens) == sum(w.stop - w.start for w in plan.windows)


def test_token_bytes_of_a_real_tokenizer_add_up_to_every_document(corpus) -> None:
    store, tokenizer = TokenStore(corpus / "heldout"), load_tokenizer(corpus / "tokenizer.model")
    table = bytes_of_tokens(tokenizer)
    assert table[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    for index in range(store.num_documents):
        assert table[store.document(index)].sum() == store.num_bytes[index]
    for text in ("\ufffd", "日本 \u2581", "\x00\t\n"):
        assert table[tokenizer.encode(text)].sum() == len(text.encode())


def test_shards_of_another_tokenizer_show_in_the_bytes() -> None:
    store = ListStore(["a" * 100, "a" * 80])
    plan = plan_perplexity(store, 16, CONFIG)
    with pytest.raises(ValueError, match="200 bytes by its tokens and 100 by the prepared split"):
        measure_perplexity(UniformModel(258), store, plan, 2 * bytes_of_tokens(ByteCodec()), RUNTIME, "wrong")


def test_a_lossy_tokenizers_bytes_are_those_of_the_texts() -> None:
    """Documents have as many bytes as their texts had; parts of them share those, and add up."""
    store = ListStore(["a" * 100, "a" * 80, "é" * 45])
    store.num_bytes = np.array([77, 160, 91])
    table = bytes_of_tokens(ByteCodec())
    plan = plan_perplexity(store, 16, CONFIG)
    result = measure_perplexity(UniformModel(258), store, plan, table, RUNTIME, "lossy", lossy=True)
    assert result.headline.bytes == [77, 160, 91]
    wanted = {0: 77 * 64 // 100, 1: 160 * 64 // 80, 2: 91 * 64 // 90}
    for sums in result.by_length.values():
        assert dict(zip(sums.documents, sums.bytes, strict=True)) == wanted
    assert TextBytes(store, 0 * table, True).between(0, 0, 51) == 77 // 2  # of 102 tokens, all unknown


def test_lengths_beyond_the_documents_are_dropped_with_a_note() -> None:
    kept, notes = measurable_multiples(np.array([33, 33, 40, 65, 2]), 16, EvalConfig(lengths=[1, 2, 4]))
    assert kept == [1, 2]
    assert len(notes) == 1 and "4x (64 tokens) is not measured" in notes[0] and "longest has 65 tokens" in notes[0]


def test_documents_one_token_too_short_for_the_last_target_do_not_count() -> None:
    assert measurable_multiples(np.array([17, 17]), 16, EvalConfig(lengths=[1, 2]))[0] == [1]
    with pytest.raises(ValueError, match="0 documents of more than 16 tokens .* the longest document has 16"):
        measurable_multiples(np.array([16, 16]), 16, EvalConfig(lengths=[1, 2]))


@pytest.mark.parametrize("longest", [4096, 64, 8, 100, 31, 1])
def test_position_bins_cover_the_context_without_gaps(longest: int) -> None:
    edges = position_edges(longest)
    assert edges[0] == 0 and edges[-1] == longest
    assert all(a < b for a, b in zip(edges, edges[1:], strict=False))
