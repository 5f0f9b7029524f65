"""Readers: the documents of each kind, continuing in the middle, and errors that name the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.corpora import Corpus, Document, Hub, JsonLines, Parquet, SourceTree, StandardLibrary, TextFiles

TEXTS = ["one\r\ntwo", "größer\u2581", "", "\tthree\0", "five", "six", "seven"]


def texts_of(corpus: Corpus, skip: int = 0) -> list[str | None]:
    return [document.text for document in corpus.documents(skip)]


def make_corpus(kind: str, folder: Path) -> Corpus:
    rows = [{"id": i, "content": text} for i, text in enumerate(TEXTS)]
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_bytes(text.encode())
        return TextFiles([str(folder)])
    if kind == "jsonl":
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "a.jsonl").write_text("".join(lines[:3]) + "\n")
        with gzip.open(folder / "b.jsonl.gz", "wt") as file:
            file.writelines(lines[3:])
        return JsonLines([str(folder / "*.jsonl*")], text_field="content")
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=2)
    if kind == "parquet":
        return Parquet([str(folder / "a.parquet"), str(folder / "b.parquet")], text_field="content")
    files = [str(folder / f"{name}.parquet") for name in "ab"]
    return Hub("parquet", data_files=files, text_field="content", streaming=kind == "hub streaming")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "hub streaming", "hub download"])
def test_every_kind_gives_the_texts_and_continues_anywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus = make_corpus(kind, folder)
    assert texts_of(corpus) == TEXTS
    for skip in range(len(TEXTS) + 1):
        assert texts_of(corpus, skip) == TEXTS[skip:]


def test_the_identity_follows_names_and_sizes(tmp_path: Path) -> None:
    corpus = make_corpus("txt", tmp_path)
    before = corpus.identity()
    assert corpus.identity() == before
    (tmp_path / "0.txt").write_text("longer than it was")
    assert corpus.identity() != before


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    sizes = {
        "a.py": 3,
        "pkg/x.py": 5,
        "pkg/y.py": 7,
        "pkg/deep/z.py": 11,
        "pkg/tests/t.py": 4,
        "pkg/n.txt": 2,
        "big.py": 99,
    }
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(Path(name).stem[0] * size)
    return root


def test_a_source_tree_is_filtered_and_grouped(tree: Path) -> None:
    corpus = SourceTree([str(tree)], include=["*.py"], exclude=["tests"], max_file_bytes=50)
    assert list(corpus.documents(0)) == [
        Document("aaa", "project/a"),
        Document("z" * 11, "project/pkg"),
        Document("x" * 5, "project/pkg"),
        Document("y" * 7, "project/pkg"),
    ]
    assert corpus.groups() == {"project/a", "project/pkg"}


def test_the_files_of_a_directory_can_be_joined(tree: Path) -> None:
    corpus = SourceTree([str(tree)], include=["*.py"], exclude=["tests"], max_file_bytes=50, join_directories=True)
    expected = [("aaa", "project/a"), ("z" * 11, "project/pkg"), ("xxxxxyyyyyyy", "project/pkg")]
    assert [tuple(document) for document in corpus.documents(0)] == expected
    assert [tuple(document) for document in corpus.documents(2)] == expected[2:]


def test_an_installed_package_is_a_source_tree() -> None:
    documents = list(SourceTree(packages=["jsonargparse"], include=["*.py"]).documents(0))
    assert len(documents) > 10 and {d.group.split("/")[0] for d in documents} == {"jsonargparse"}


def test_the_standard_library_is_read_without_its_tests() -> None:
    corpus = StandardLibrary()
    assert {"asyncio", "email", "tarfile", "argparse"} <= corpus.groups()
    assert not {"test", "site-packages", "idlelib"} & corpus.groups()
    documents = list(corpus.documents(0))
    assert sum(len(d.text or "") for d in documents) > 5e6 and len(documents) > 400


def test_files_that_are_not_utf_8_are_named_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"gr\xf6\xdfer")
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 \(.* at byte 2\); set undecodable: skip"):
        texts_of(TextFiles([str(tmp_path)]))
    assert texts_of(TextFiles([str(tmp_path)], undecodable="skip")) == ["fine", None]
    (tmp_path / "c.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match="c.jsonl:1: text has a lone surrogate"):
        texts_of(JsonLines([str(tmp_path / "c.jsonl")]))
    assert texts_of(JsonLines([str(tmp_path / "c.jsonl")], undecodable="skip")) == [None]


def test_bad_corpora_are_named(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(ValueError, match="paths are empty"):
        TextFiles([])
    with pytest.raises(FileNotFoundError, match="no file matches corpus path"):
        texts_of(TextFiles([str(tmp_path / "nothing")]))
    with pytest.raises(ValueError, match="neither paths nor packages"):
        SourceTree()
    with pytest.raises(FileNotFoundError, match="source folder .*nothing does not exist"):
        SourceTree([str(tmp_path / "nothing")])
    with pytest.raises(FileNotFoundError, match="no installed package 'no_such_package'"):
        SourceTree(packages=["no_such_package"])
    with pytest.raises(FileNotFoundError, match="no file below"):
        texts_of(SourceTree([str(tree)], include=["*.rs"]))
    with pytest.raises(ValueError, match="two source folders are named 'project'"):
        SourceTree([str(tree), str(tree)])


def test_missing_fields_and_broken_records_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x"}\n{"title": "y"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2 has no field 'text' \(it has: title\); set text_field"):
        texts_of(JsonLines([str(lines)]))
    lines.write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: field 'text' is int, expected text"):
        texts_of(JsonLines([str(lines)]))
    lines.write_text('{"text": "x"\n')
    with pytest.raises(ValueError, match="a.jsonl:1 is not JSON"):
        texts_of(JsonLines([str(lines)]))
    make_corpus("parquet", tmp_path)
    for corpus in (Parquet([str(tmp_path / "a.parquet")]), Hub("parquet", data_files=[str(tmp_path / "a.parquet")])):
        with pytest.raises(ValueError, match=r"has no field 'text' \(it has: id, content\); set text_field"):
            texts_of(corpus)
