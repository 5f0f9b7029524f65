"""The store: what was written is read, and every kind of damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.store import TokenStore, token_dtype, write_shard
from data.tokenizer import Tokenizer


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "corpus")


def test_documents_decode_to_the_texts(prepared: Path, texts: Path) -> None:
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    found: list[str] = []
    for split in ("train", "heldout"):
        store = TokenStore(prepared / split, verify="checksum")
        assert store.lengths.dtype == store.num_bytes.dtype == np.int64
        assert store.lengths.sum() == store.num_tokens and len(store.lengths) == store.num_documents
        assert store.fingerprint_of_tokenizer == tokenizer.fingerprint
        for number in range(store.num_documents):
            document = store.document(number)
            assert document.dtype == np.uint16 and isinstance(document, np.memmap)
            assert (document[0], document[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert len(document) == store.lengths[number]
            text = tokenizer.decode(document.tolist())
            assert len(text.encode()) == store.num_bytes[number]
            found.append(text)
    assert sorted(found) == sorted(path.read_text() for path in texts.iterdir())


def test_a_store_sent_to_another_process_reads_the_same(prepared: Path) -> None:
    store = TokenStore(prepared / "train")
    store.document(0)
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 10_000
    assert np.array_equal(copy.document(3), store.document(3))


def test_document_numbers_are_checked(prepared: Path) -> None:
    store = TokenStore(prepared / "heldout")
    with pytest.raises(IndexError, match=r"document 10000 is outside \[0, "):
        store.document(10_000)


def test_ids_take_two_bytes_where_they_fit(tmp_path: Path) -> None:
    assert token_dtype(65535) == np.uint16 and token_dtype(65536) == np.uint32
    counts = write_shard(tmp_path, "x", [np.array([70_000, 1], np.uint32)], [9], "f")
    assert counts == {"documents": 1, "tokens": 2, "bytes": 9}
    assert (tmp_path / "x.bin").stat().st_size == 8


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["000000.bin", "000000.idx.npy", "000000.json"])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, "{name} does not exist; prepare the corpus again"),
        (lambda path: path.write_bytes(b""), ValueError, "{name} (has 0 bytes, expected|is not valid JSON)"),
        (truncate, ValueError, "{name} (has .* bytes, expected|is not valid JSON)"),
    ],
)
def test_missing_empty_and_truncated_files_are_named(
    corpus: Path, name: str, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    path = corpus / "train" / name
    if name.endswith("json") and damage is truncate:
        path.write_bytes(path.read_bytes()[:-3])
    else:
        damage(path)
    with pytest.raises(error, match=message.format(name=name)):
        TokenStore(corpus / "train")


@pytest.mark.parametrize("name", ["000001.bin", "000001.idx.npy"])
def test_a_flipped_bit_is_found_by_the_checksum(corpus: Path, name: str) -> None:
    flip_a_bit(corpus / "train" / name)
    TokenStore(corpus / "train", verify="size")
    with pytest.raises(ValueError, match=f"{name} has sha256 .* expected .*damaged"):
        TokenStore(corpus / "train", verify="checksum")


def test_another_tokenizer_is_refused(corpus: Path) -> None:
    flip_a_bit(corpus / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model has fingerprint .* but the shards were written with"):
        TokenStore(corpus / "train")


def test_a_shard_of_another_corpus_is_refused(corpus: Path) -> None:
    path = corpus / "train" / "000000.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="000000 was written with tokenizer 000000000000"):
        TokenStore(corpus / "train")
    path.write_text(json.dumps(meta | {"documents": 1}))
    with pytest.raises(ValueError, match="documents, its manifest says"):
        TokenStore(corpus / "train")


def test_an_unfinished_corpus_an_unknown_split_and_option_are_named(corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match="test is no split"):
        TokenStore(corpus / "test")
    with pytest.raises(ValueError, match="verify is 'sum', expected 'size' or 'checksum'"):
        TokenStore(corpus / "train", verify="sum")  # type: ignore[arg-type]
    (corpus / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json does not exist; prepare the corpus again: python -m"):
        TokenStore(corpus / "train")
