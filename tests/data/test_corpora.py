"""Readers: the documents of each kind, continuing in the middle, and errors that name the file."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common.errors import error_line
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
    assert [document[:2] for document in corpus.documents(0)] == expected
    assert [document[:2] for document in corpus.documents(2)] == expected[2:]


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
    with pytest.raises(ValueError, match=r"a.jsonl:2 has no field 'text' \(it has: title\); set corpus.text_field"):
        texts_of(JsonLines([str(lines)]))
    lines.write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: field 'text' is int \('5'\), expected text"):
        texts_of(JsonLines([str(lines)]))
    lines.write_text('{"text": "x"\n')
    with pytest.raises(ValueError, match="a.jsonl:1 is not JSON"):
        texts_of(JsonLines([str(lines)]))
    make_corpus("parquet", tmp_path)
    for corpus in (Parquet([str(tmp_path / "a.parquet")]), Hub("parquet", data_files=[str(tmp_path / "a.parquet")])):
        with pytest.raises(ValueError, match=r"has no field 'text' \(it has: id, content\); set corpus.text_field"):
            texts_of(corpus)


# What datasets' own reader makes numbers, truth values, dates or JSON of, with or without a schema.
TEXTS_LIKE_OTHERS = [
    ["007", "true", "1e5", "x"],
    ["2020-01-01T00:00:00", "2021-02-03 04:05:06"],
    ["2020-01-01", "2021-02-03"],
    ["null", "[1]", '{"a": 1}', "NaN"],
]


@pytest.mark.parametrize("texts", TEXTS_LIKE_OTHERS)
@pytest.mark.parametrize("streaming", [True, False])
def test_json_from_the_hub_gives_the_texts_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], streaming: bool
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "a list's", "more": 1}]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"other": [], "text": "columns differ"}) + "\n")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.jsonl.gz")]
    corpus = Hub("json", data_files=files, streaming=streaming)
    assert texts_of(corpus) == [*texts, "a list's", "columns differ"]
    assert texts_of(corpus, 2) == [*texts, "a list's", "columns differ"][2:]


def test_json_from_the_hub_with_a_number_for_a_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "007"}\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: field 'text' is int \('7'\), expected text"):
        texts_of(Hub("json", data_files=[str(tmp_path / "a.jsonl")]))


def test_csv_from_the_hub_gives_the_texts_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\n007,1\nNA,2\n1.50,3\n")
    assert texts_of(Hub("csv", data_files=[str(tmp_path / "a.csv")])) == ["007", "NA", "1.50"]


def compressed_zstd(content: bytes) -> bytes:
    """In two frames."""
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": compressed_zstd,
}  # fmt: skip


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("reader", ["JsonLines", "Hub"])
def test_compressed_lines_are_read_and_damaged_ones_named(tmp_path: Path, ending: str, reader: str) -> None:
    path = tmp_path / f"a.jsonl.{ending}"
    texts = [f"{number * 7919} text" for number in range(20_000)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compressed = COMPRESSORS[ending](content)
    corpus = JsonLines([str(path)]) if reader == "JsonLines" else Hub("json", data_files=[str(path)])
    path.write_bytes(compressed)
    assert texts_of(corpus) == texts
    path.write_bytes(compressed[:-20])
    with pytest.raises(ValueError, match=f"a.jsonl.{ending} is damaged or cut short .*; copy or download it again"):
        texts_of(corpus)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=f"a.jsonl.{ending} is damaged or cut short"):
        texts_of(corpus)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n{"text": "\xef\xbb\xbfy"}\n')
    assert texts_of(JsonLines([str(tmp_path)])) == ["x", "\ufeffy"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "a.jsonl:2 is not JSON .*; mend or remove the line"),
        (b'{"text": "\xff"}', "a.jsonl:2 is not UTF-8 .*; mend or remove the line"),
        (b"[1, 2]", "a.jsonl:2 is list, expected an object with the field 'text'"),
        (b'{"text": [1]}', "a.jsonl:2: field 'text' is list"),
        (b'{"text": null}', "a.jsonl:2: field 'text' is null, expected text; set corpus.missing_text: skip"),
        (b"[" * 100_000, "a.jsonl:2 is not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    for corpus in (JsonLines([str(tmp_path)]), Hub("json", data_files=[str(tmp_path / "a.jsonl")])):
        with pytest.raises(ValueError, match=message):
            texts_of(corpus)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub json", "hub parquet"])
def test_records_without_text_are_left_out_when_asked_for(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)

    def corpus(**options: str) -> Corpus:
        if kind.startswith("hub"):
            path = str(lines if kind == "hub json" else table)
            return Hub(kind.split()[1], data_files=[path], **options)  # type: ignore[arg-type]
        return (
            JsonLines([str(lines)], **options)  # type: ignore[arg-type]
            if kind == "jsonl"
            else Parquet([str(table)], **options)  # type: ignore[arg-type]
        )

    with pytest.raises(ValueError, match="(:2|row 1|record 1): field 'text' is null.*set corpus.missing_text: skip"):
        texts_of(corpus())
    assert list(corpus(missing_text="skip").documents(0)) == [
        Document("a"), Document(None, missing=True), Document("b"),
    ]  # fmt: skip
    assert texts_of(corpus(missing_text="skip"), 2) == ["b"]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x" * 100 + str(i)} for i in range(1000)]), path)
    content = path.read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:100] + bytes(200) + content[300:])
    (tmp_path / "c.parquet").write_bytes(content[:-30])
    (tmp_path / "d.parquet").write_bytes(b"")
    for name in "bcd":
        with pytest.raises(ValueError, match=f"{name}.parquet cannot be read as Parquet .*; copy or download it again"):
            texts_of(Parquet([str(tmp_path / f"{name}.parquet")]))


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("b")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("a")
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "circle").symlink_to(corpus)
    assert texts_of(TextFiles([str(corpus)])) == ["a", "b"]
    assert capsys.readouterr().out == ""
    (corpus / "again.txt").symlink_to(corpus / "a.txt")
    assert texts_of(TextFiles([str(corpus), str(corpus / "a.txt"), f"{corpus}/*.txt"])) == ["a", "b"]
    assert "4 files of the corpus are named more than once; each is read once" in capsys.readouterr().out
    assert [document.text for document in SourceTree([str(corpus)]).documents(0)] == ["a", "b"]


def test_of_a_downloaded_folder_only_its_files_are_read(tmp_path: Path) -> None:
    for name in ("a.txt", ".git/HEAD", ".cache/huggingface/download/a.txt.metadata", "deep/.hidden.txt", ".b.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(name)
    folder = str(tmp_path / "corpus")
    assert texts_of(TextFiles([folder])) == ["a.txt"]
    assert len(texts_of(TextFiles([folder], hidden=True))) == 5
    assert texts_of(TextFiles([f"{folder}/.b.txt"])) == [".b.txt"]  # named itself


def test_of_a_streamed_data_set_only_the_text_is_read(tmp_path: Path) -> None:
    for name, other in (("a", 1), ("b", "one")):
        table = pyarrow.Table.from_pylist([{"text": f"of {name}", "other": other}])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    corpus = Hub("parquet", data_files=[str(tmp_path / f"{name}.parquet") for name in "ab"])
    assert texts_of(corpus) == ["of a", "of b"] and texts_of(corpus, 1) == ["of b"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_file_that_the_system_refuses_to_read_is_not_called_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / name
    path.write_text("{}")
    for place in ("pyarrow.parquet.ParquetFile", "data.records.decompressed", "pathlib.Path.read_bytes"):
        monkeypatch.setattr(place, refused)
    readers: dict[str, type[Corpus]] = {".parquet": Parquet, ".jsonl": JsonLines, ".txt": TextFiles}
    with pytest.raises(OSError) as caught:
        texts_of(readers[path.suffix]([str(path)]))  # type: ignore[call-arg]
    assert error_line(caught.value) == f"{path}: Input/output error"
