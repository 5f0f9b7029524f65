"""The store: what was written is read, and every kind of damage is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.store import TokenStore, token_dtype, write_shard
from data.tokenizer import load_tokenizer
from data.verified import stamp_path


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "corpus")


def test_documents_decode_to_the_texts(prepared: Path, texts: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
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


def change_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["splits", "tokenizer_fingerprint", "vocab_size"])
@pytest.mark.parametrize("value", [None, [], 1.5])
def test_a_manifest_without_what_it_must_have_is_named(corpus: Path, key: str, value: object) -> None:
    change_json(corpus / "manifest.json", lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=f"manifest.json has .* as '{key}', expected"):
        TokenStore(corpus / "train")
    change_json(corpus / "manifest.json", lambda content: content.pop(key))
    with pytest.raises(ValueError, match=f"manifest.json lacks '{key}'"):
        TokenStore(corpus / "train")


@pytest.mark.parametrize("value", [[], {"shards": [1]}, {"documents": "3"}])
def test_a_manifest_with_a_damaged_split_is_named(corpus: Path, value: object) -> None:
    def damage(content: dict[str, object]) -> None:
        splits = content["splits"]
        assert isinstance(splits, dict)
        splits["train"] = {**splits["train"], **value} if isinstance(value, dict) else value

    change_json(corpus / "manifest.json", damage)
    with pytest.raises(ValueError, match="manifest.json, (splits|train),"):
        TokenStore(corpus / "train")


@pytest.mark.parametrize("key", ["documents", "tokens", "bytes", "dtype", "tokenizer_fingerprint", "files"])
def test_a_shard_record_without_what_it_must_have_is_named(corpus: Path, key: str) -> None:
    path = corpus / "train" / "000000.json"
    change_json(path, lambda content: content.update({key: None}))
    with pytest.raises(ValueError, match=f"000000.json has null as '{key}', expected"):
        TokenStore(corpus / "train")
    change_json(path, lambda content: content.pop(key))
    with pytest.raises(ValueError, match=f"000000.json lacks '{key}'"):
        TokenStore(corpus / "train")


def test_a_shard_record_of_other_files_or_numbers_is_named(corpus: Path) -> None:
    path = corpus / "train" / "000000.json"
    before = path.read_text()
    change_json(path, lambda content: content.update(dtype="float64"))
    with pytest.raises(ValueError, match="000000.json has dtype 'float64', expected 'uint16' or 'uint32'"):
        TokenStore(corpus / "train")
    path.write_text(before)
    change_json(path, lambda content: content.update(files={}))
    with pytest.raises(ValueError, match="000000.json, files, lacks '000000.bin'"):
        TokenStore(corpus / "train")


def test_an_index_of_another_shape_is_named(corpus: Path) -> None:
    path = corpus / "train" / "000000.idx.npy"
    size = path.stat().st_size
    np.save(path, np.zeros((1, (size - 128) // 8), np.int64))
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"000000.idx.npy has int64 \(1, .*expected int64 \(2, "):
        TokenStore(corpus / "train").document(0)
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=r"000000.idx.npy is no index of a shard"):
        TokenStore(corpus / "train").document(0)


@pytest.fixture
def settled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus as it was an hour ago, and a cache of its own."""
    monkeypatch.setenv("LONGSPLASH_CACHE", str(tmp_path / "cache"))
    for path in (corpus / "train").iterdir():
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    return corpus


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the shard files that are read from now on."""
    found: list[str] = []
    verify = TokenStore._verify_checksum

    def note(self: TokenStore, name: str, expected: str) -> None:
        found.append(name)
        verify(self, name, expected)

    monkeypatch.setattr(TokenStore, "_verify_checksum", note)
    return found


def test_only_files_that_changed_since_they_were_verified_are_read_again(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_files(monkeypatch)
    TokenStore(settled / "train", verify="checksum")
    assert len(read) == 2 * len(list((settled / "train").glob("*.bin")))
    read.clear()
    TokenStore(settled / "train", verify="checksum")
    assert read == []
    path = settled / "train" / "000001.bin"
    times = path.stat()
    flip_a_bit(path)
    with pytest.raises(ValueError, match="000001.bin has sha256"):
        TokenStore(settled / "train", verify="checksum")
    assert read == ["000001.bin"]
    flip_a_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.copy2(path, path.with_suffix(".other"))
    os.replace(path.with_suffix(".other"), path)  # another inode, everything else the same
    read.clear()
    TokenStore(settled / "train", verify="checksum")
    assert read == ["000001.bin"]


def test_a_damaged_file_is_read_at_every_start(settled: Path) -> None:
    path = settled / "train" / "000001.bin"
    flip_a_bit(path)
    os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="000001.bin has sha256"):
            TokenStore(settled / "train", verify="checksum")


def test_a_file_that_has_just_changed_is_read_again(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(settled / "train" / "000000.bin", (4e9, 4e9))  # always less than two seconds ago
    read = read_files(monkeypatch)
    for _ in range(2):
        TokenStore(settled / "train", verify="checksum")
    assert read[-1] == "000000.bin" and read.count("000000.bin") == 2


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"000000.bin": 3}', b"\xff"])
def test_a_damaged_stamp_only_costs_time(settled: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    TokenStore(settled / "train", verify="checksum")
    path = stamp_path(settled / "train")
    before = path.read_bytes()
    path.write_bytes(content)
    TokenStore(settled / "train", verify="checksum")
    assert path.read_bytes() == before


def test_where_no_stamp_can_be_kept_it_is_said(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPLASH_CACHE", str(tmp_path / "file"))
    TokenStore(settled / "train", verify="checksum")
    assert f"{settled / 'train'} will be verified again at the next start" in capsys.readouterr().out
