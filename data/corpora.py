"""Corpus readers: each yields the documents of one kind of corpus, in a fixed order, one at a time.

A reader is chosen in YAML by `class_path` (see configs/data/prepare_*.yaml). To add one, subclass Corpus.
"""

from __future__ import annotations

import abc
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

Undecodable = Literal["error", "skip"]


class Document(NamedTuple):
    """text: None for a record that is left out (not UTF-8). group: package it belongs to, "" where there are none."""

    text: str | None
    group: str = ""


class Corpus(abc.ABC):
    """A sequence of documents that is the same every time it is read."""

    @abc.abstractmethod
    def documents(self, skip: int) -> Iterator[Document]:
        """Documents from number `skip` on; skipped ones are not decoded where the format allows it."""

    def groups(self) -> set[str]:
        """Names by which whole groups can be held out; empty when the corpus has no groups."""
        return set()

    def identity(self) -> str:
        """Changes when the corpus does, as far as can be told without reading it; "" when nothing can be told."""
        return ""


def _find_files(paths: list[str]) -> list[Path]:
    """Files named by paths, folders (all files below) or glob patterns, sorted within each entry."""
    found: list[Path] = []
    for entry in paths:
        path = Path(entry)
        if any(c in entry for c in "*?["):
            start = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(p for p in start.glob(str(path.relative_to(start))) if p.is_file())
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file())
        else:
            matches = [path] if path.is_file() else []
        if not matches:
            raise FileNotFoundError(
                f"no file matches corpus path {entry!r}; expected a file, a folder or a glob pattern"
            )
        found += matches
    return found


def _identity_of(files: list[Path]) -> str:
    """Hash of the names and sizes of the files; not of their times, which differ between copies of one corpus."""
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _decode(path: Path, on_undecodable: Undecodable) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        if on_undecodable == "skip":
            return None
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); set undecodable: skip"
        ) from error


def _without_surrogates(text: str, on_undecodable: Undecodable, where: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if on_undecodable == "skip":
            return None
        raise ValueError(f"{where}: text has a lone surrogate, which is not UTF-8; set undecodable: skip") from error
    return text


class _FileCorpus(Corpus):
    """Corpus of the files that `paths` name: files, folders (everything below) or glob patterns."""

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("corpus paths are empty; give at least one file, folder or glob pattern")
        self.paths = paths

    def identity(self) -> str:
        return _identity_of(_find_files(self.paths))


class TextFiles(_FileCorpus):
    """Local text files, one document each.

    Args:
        paths: files, folders (everything below) or glob patterns
        undecodable: what to do with a file that is not UTF-8
    """

    def __init__(self, paths: list[str], undecodable: Undecodable = "error") -> None:
        super().__init__(paths)
        self.undecodable = undecodable

    def documents(self, skip: int) -> Iterator[Document]:
        for path in _find_files(self.paths)[skip:]:
            yield Document(_decode(path, self.undecodable))


class JsonLines(_FileCorpus):
    """JSON lines, one document a line; files ending in .gz are decompressed.

    Args:
        paths: files, folders (everything below) or glob patterns
        text_field: key of the text
        undecodable: what to do with a text that is not UTF-8 (escaped lone surrogates)
    """

    def __init__(self, paths: list[str], text_field: str = "text", undecodable: Undecodable = "error") -> None:
        super().__init__(paths)
        self.text_field = text_field
        self.undecodable = undecodable

    def documents(self, skip: int) -> Iterator[Document]:
        yield from itertools.islice(self._lines(), skip, None)

    def _lines(self) -> Iterator[Document]:
        for path in _find_files(self.paths):
            with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number} is not JSON ({error}); mend or remove the line") from error
                    text = _text_of(record, self.text_field, f"{path}:{number}")
                    yield Document(_without_surrogates(text, self.undecodable, f"{path}:{number}"))


class Parquet(_FileCorpus):
    """Parquet files, one document a row, read one row group at a time.

    Args:
        paths: files, folders (everything below) or glob patterns
        text_field: column of the text
    """

    def __init__(self, paths: list[str], text_field: str = "text") -> None:
        super().__init__(paths)
        self.text_field = text_field

    def documents(self, skip: int) -> Iterator[Document]:
        import pyarrow.parquet

        for path in _find_files(self.paths):
            with pyarrow.parquet.ParquetFile(path) as file:
                if self.text_field not in file.schema_arrow.names:
                    raise _missing_field(self.text_field, file.schema_arrow.names, str(path))
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if skip >= rows:
                        skip -= rows
                        continue
                    column = file.read_row_group(group, columns=[self.text_field]).column(0)
                    for row in range(skip, rows):
                        text = column[row].as_py()
                        yield Document(_text_of({self.text_field: text}, self.text_field, f"{path} row {row}"))
                    skip = 0


class SourceTree(Corpus):
    """Source files below some folders or installed packages. Groups are "ROOT/FIRST", e.g. "torch/nn".

    Args:
        paths: folders
        packages: names of installed Python packages whose folders are read
        include: patterns of file names, e.g. "*.py"
        exclude: names of folders or files left out at any depth, as patterns
        max_file_bytes: larger files are left out; None for no limit
        join_directories: make one document of all files of a folder, in order of their names
        undecodable: what to do with a file that is not UTF-8
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        packages: list[str] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        max_file_bytes: int | None = None,
        join_directories: bool = False,
        undecodable: Undecodable = "error",
    ) -> None:
        self.roots = [Path(path) for path in paths or []] + [_package_folder(name) for name in packages or []]
        self.include = include or ["*"]
        self.exclude = exclude or []
        self.max_file_bytes = max_file_bytes
        self.join_directories = join_directories
        self.undecodable = undecodable
        if not self.roots:
            raise ValueError("SourceTree has neither paths nor packages; give at least one folder or installed package")
        names = [root.resolve().name for root in self.roots]
        for root, name in zip(self.roots, names, strict=True):
            if not root.is_dir():
                raise FileNotFoundError(f"source folder {root} does not exist")
            if names.count(name) > 1:
                raise ValueError(f"two source folders are named {name!r}; their groups could not be told apart")

    def group_of(self, root: Path, path: Path) -> str:
        return f"{root.resolve().name}/{Path(path.relative_to(root).parts[0]).stem}"

    def _documents_paths(self) -> Iterator[tuple[str, list[Path]]]:
        """Group and files of each document, in order."""
        for root in self.roots:
            files = sorted(self._files_below(root))
            if not files:
                raise FileNotFoundError(f"no file below {root} matches {self.include}; change include or exclude")
            if self.join_directories:
                folders: dict[tuple[str, Path], list[Path]] = {}
                for path in files:  # the group too: files of the root folder are groups of their own
                    folders.setdefault((self.group_of(root, path), path.parent), []).append(path)
                yield from ((group, members) for (group, _), members in folders.items())
            else:
                yield from ((self.group_of(root, path), [path]) for path in files)

    def _files_below(self, root: Path) -> Iterator[Path]:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not _matches(name, self.exclude)]  # not walked at all
            for name in names:
                path = Path(folder, name)
                wanted = _matches(name, self.include) and not _matches(name, self.exclude) and path.is_file()
                if wanted and (self.max_file_bytes is None or path.stat().st_size <= self.max_file_bytes):
                    yield path

    def documents(self, skip: int) -> Iterator[Document]:
        for group, paths in itertools.islice(self._documents_paths(), skip, None):
            texts = [text for path in paths if (text := _decode(path, self.undecodable)) is not None]
            yield Document("".join(texts) if texts else None, group)

    def groups(self) -> set[str]:
        return {group for group, _ in self._documents_paths()}

    def identity(self) -> str:
        return _identity_of([path for _, paths in self._documents_paths() for path in paths])


class StandardLibrary(SourceTree):
    """Sources of the running Python's standard library without its tests. Groups are its packages, e.g. "asyncio"."""

    def __init__(self) -> None:
        super().__init__(
            paths=[sysconfig.get_path("stdlib")],
            include=["*.py"],
            exclude=[
                "test",
                "tests",
                "idle_test",
                "idlelib",
                "lib2to3",
                "site-packages",
                "dist-packages",
                "__pycache__",
            ],
        )

    def group_of(self, root: Path, path: Path) -> str:
        return Path(path.relative_to(root).parts[0]).stem


class Hub(Corpus):
    """A data set that the `datasets` library can load, from the hub or from local files of the same schema.

    Args:
        path: first argument of datasets.load_dataset: a hub name, or "parquet" or "json" with data_files
        name: configuration of the data set
        split: split of the data set
        data_files: files to read instead of all, as load_dataset takes them
        revision: commit or tag of the data set; fix it for reproducible corpora
        text_field: column of the text
        streaming: read while downloading; False downloads everything first
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        data_files: list[str] | None = None,
        revision: str | None = None,
        text_field: str = "text",
        streaming: bool = True,
    ) -> None:
        self.text_field = text_field
        self.arguments: dict[str, Any] = {"path": path, "name": name, "split": split, "streaming": streaming}
        self.arguments |= {"data_files": data_files, "revision": revision}

    def documents(self, skip: int) -> Iterator[Document]:
        import datasets

        data = datasets.load_dataset(**self.arguments)
        if not self.arguments["streaming"] and skip >= len(data):  # Dataset.skip raises there
            return
        if data.column_names is not None:  # None: known only after the first record
            if self.text_field not in data.column_names:
                raise _missing_field(self.text_field, data.column_names, f"data set {self.arguments['path']}")
            data = data.select_columns([self.text_field])
        for number, record in enumerate(data.skip(skip), start=skip):
            yield Document(_text_of(record, self.text_field, f"data set {self.arguments['path']} record {number}"))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name) if "." not in name else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no installed package {name!r} with a folder; install it or remove it from packages")
    return Path(next(iter(spec.submodule_search_locations)))


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or text_field not in record:
        raise _missing_field(text_field, list(record) if isinstance(record, dict) else [], where)
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} is {type(text).__name__}, expected text; set text_field")
    return text


def _missing_field(text_field: str, fields: list[str], where: str) -> ValueError:
    return ValueError(f"{where} has no field {text_field!r} (it has: {', '.join(fields)}); set text_field")
