"""The tokenizer: lossless on any UTF-8 string, chunked encoding, training and its errors."""

from __future__ import annotations

import random
import re
import string
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.interface import CHUNK_CHARACTERS, split_into_chunks
from data.tokenizers.training import sample_lines, train_tokenizer

PYTHON = "def f(x):\n\tif x:\n        return x + 12345\n\n\nclass A:\n    def g(self):\n        return 'größer'\n"
AWKWARD = [
    "\u2581",
    " \u2581 \u2581\u2581",
    "<s></s><unk>",
    "<0x0A><0xE2>",
    "\0",
    "\r\n\r",
    "\u0301a\u0301",
    "\ufeff",
    "\t \t",
]
AWKWARD += [
    "\u2047 \u2585",
    "\U0010ffff",
    "\x01\x1f\x7f\x85\u2028",
    "\ufffd",
    "    x",
    "  ",
    "\n\n\n",
    "123456",
    "ﬁ ½ Å",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train(path)
    return load_tokenizer(path)


def train(path: Path, vocab_size: int = 420, texts: list[str] | None = None) -> None:
    texts = texts or [PYTHON * 20, "größer\u2581kleiner " * 50]
    train_tokenizer(texts, vocab_size, path, sample_bytes=2**20, scan_bytes=2**30, split_by_unicode_script=False)


@settings(max_examples=400)
@given(text=st.one_of(st.text(), st.text("\u2581 \n\tab<s>/0xE2\0\r", max_size=40)))
@example(text="".join(AWKWARD))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_texts(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(f"x{text}y {text}")) == f"x{text}y {text}"


def test_space_and_its_mark_differ_and_the_mark_costs_three_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a b") != tokenizer.encode("a\u2581b")
    assert len(tokenizer.encode("\u2581")) == 3


def test_whitespace_runs_are_pieces_and_digits_are_split(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" " * 8)) == 1
    assert len(tokenizer.encode("12345")) == 5


def test_decode_ignores_control_tokens_and_refuses_unknown_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("x y"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "x y"
    with pytest.raises(ValueError, match=r"token id 420 is outside \[0, 420\)"):
        tokenizer.decode([tokenizer.vocab_size])


@given(text=st.text("ab\n", max_size=60), limit=st.integers(1, 20))
def test_chunks_join_to_the_text(text: str, limit: int) -> None:
    chunks = list(split_into_chunks(text, limit))
    assert "".join(chunks) == text and all(0 < len(chunk) <= limit for chunk in chunks)
    assert all(chunk.endswith("\n") or len(chunk) == limit for chunk in chunks[:-1])


@pytest.mark.parametrize("line", [PYTHON, "x = 1; ", "\u2581"])
def test_long_texts_are_lossless_and_take_linear_time(tokenizer: Tokenizer, line: str) -> None:
    def seconds(characters: int) -> float:
        text = (line * (characters // len(line) + 1))[:characters]
        start = time.thread_time()  # of this thread only, so that a busy machine changes nothing
        ids = tokenizer.encode(text)
        elapsed = time.thread_time() - start
        assert tokenizer.decode(ids) == text
        return elapsed

    seconds(1000)
    small = min(seconds(4 * CHUNK_CHARACTERS) for _ in range(3))
    assert seconds(24 * CHUNK_CHARACTERS) < 6 * small * 3  # a quadratic encoder takes 36 times as long


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_batches_and_training_are_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.encode_batch(["a b", ""]) == [tokenizer.encode("a b"), []]
    train(tmp_path / "again.model")
    assert load_tokenizer(tmp_path / "again.model").fingerprint == tokenizer.fingerprint


def test_sample_is_bounded_and_independent_of_the_order() -> None:
    texts = [f"text {i} " * 300 for i in range(50)]
    sample = sample_lines(texts, sample_bytes=20_000, scan_bytes=2**30)
    assert sample == sample_lines(texts[::-1], sample_bytes=20_000, scan_bytes=2**30)
    assert 10_000 < sum(map(len, sample)) <= 20_000
    assert len(sample_lines(texts, sample_bytes=2**20, scan_bytes=5000)) < len(sample)


def test_a_text_without_spaces_still_gives_a_lossless_tokenizer(tmp_path: Path) -> None:
    train(tmp_path / "t.model", 360, ["abcabc" * 100])
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(" \u2581")) == " \u2581"
    assert len(tokenizer.encode("Z ~")) == 3  # ASCII is never spelt in bytes


def foreign_model(folder: Path, **options: object) -> Path:
    """What SentencePiece trains with its defaults, but for `options`."""
    lines = ["def f(x): return 1", "hello world wide", "Some more text here"] * 50
    settings: dict[str, object] = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "foreign"), **settings | options
    )
    return folder / "foreign.model"


IDENTITY = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, r"'def f\(x\):\\n    return  1\\n' comes back as ' def f\(x\): return 1'"),
        (IDENTITY | {"add_dummy_prefix": True}, r"comes back as ' def f"),
        (IDENTITY | {"add_dummy_prefix": True, "treat_whitespace_as_suffix": True}, r"comes back as '.*return  1\\n '"),
        (IDENTITY | {"remove_extra_whitespaces": True}, r"comes back as 'def f\(x\):\\n return 1"),
        (IDENTITY | {"normalization_rule_name": "nmt_nfkc"}, r"comes back as 'def f\(x\):     return  1 '"),
        (IDENTITY | {"normalization_rule_name": "nfkc"}, "\ufb01.* comes back as 'é Å fi"),
        (IDENTITY | {"normalization_rule_tsv": "0436\t0416"}, "'xжy' comes back as 'xЖy'"),
    ],
)
def test_a_tokenizer_that_changes_text_is_refused_with_the_text(
    tmp_path: Path, options: dict[str, object], shown: str
) -> None:
    if "normalization_rule_tsv" in options:
        rule = tmp_path / "rule.tsv"
        rule.write_text(f"{options['normalization_rule_tsv']}\n")
        options = {**options, "normalization_rule_tsv": str(rule)}
    with pytest.raises(ValueError, match=f"changes text: .*{shown}.*; use one that data.prepare trains"):
        load_tokenizer(foreign_model(tmp_path, **options))


@pytest.mark.parametrize(("before", "behind"), [(" ", ""), ("", "\n")], ids=["spaces", "newlines"])
def test_a_tokenizer_that_changes_text_at_seams_alone_is_refused(
    before: str, behind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that adds a space before what it encodes, or drops line ends behind it."""

    def changed(text: str, limit: int) -> list[str]:
        first, *rest = split_into_chunks(text, limit) if text else [""]
        return [first.removesuffix(behind) if rest and behind else first, *(before + chunk for chunk in rest)]

    monkeypatch.setattr("data.tokenizers.sentencepiece_tokenizer.split_into_chunks", changed)
    with pytest.raises(ValueError, match=r"changes text: .* \(from character \d+\) comes back as"):
        load_tokenizer(tokenizer.path)


def test_a_foreign_tokenizer_that_keeps_text_is_taken(tmp_path: Path) -> None:
    load_tokenizer(foreign_model(tmp_path, **IDENTITY))


def test_a_document_that_comes_back_changed_is_shown_at_its_first_difference(tokenizer: Tokenizer) -> None:
    text = "x" * 100 + "abc" + "y" * 100
    tokenizer.check_round_trip(text, tokenizer.encode(text), "")
    with pytest.raises(ValueError, match=r"'x{19}abcy{28}' \(from character 81\) comes back as 'x{19}acy"):
        tokenizer.check_round_trip(text, tokenizer.encode(text.replace("b", "")), "use another")


@pytest.mark.parametrize("alphabet", ["ACGT", string.ascii_letters + string.digits + "+/"])
def test_a_corpus_without_spaces_gives_a_lossless_tokenizer(tmp_path: Path, alphabet: str) -> None:
    texts = ["".join(random.Random(seed).choices(alphabet, k=4000)) for seed in range(20)]
    train(tmp_path / "t.model", 500, texts)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(" A  C ")) == " A  C "


@pytest.mark.parametrize(
    ("size", "expected"),
    [(100_000, "gives at most (\\d+) pieces"), (300, "expected at least (\\d+)"), (-5, "expected at least (260)")],
)
def test_a_vocabulary_that_does_not_fit_is_told_with_one_that_does(tmp_path: Path, size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^tokenizer.vocab_size (is )?{size}.*{expected}") as caught:
        train(tmp_path / "t.model", size)
    assert "INTERNAL" not in str(caught.value)
    found = re.search(expected, str(caught.value))
    assert found
    if size > 0:
        train(tmp_path / "t.model", int(found[1]))


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 100000 is too large"):
        train(tmp_path / "t.model", 100_000)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], 400, tmp_path / "t", sample_bytes=1, scan_bytes=1, split_by_unicode_script=True)
    with pytest.raises(FileNotFoundError, match="t.model does not exist"):
        load_tokenizer(tmp_path / "t.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
