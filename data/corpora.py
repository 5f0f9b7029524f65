"""Corpus readers: each yields the documents of one kind of corpus, in a fixed order, one at a time.

A reader is chosen in YAML by `class_path` (see configs/data/prepare_*.yaml). To add one, subclass Corpus.
"""

from __future__ import annotations

import abc
import importlib.util
import itertools
import os
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data import records
from data.documents import Document, MissingText, TextField, documents_of_lines
from data.files import NO_SOURCES, Undecodable, decode, each_once, files_below, find_files, identity_of
from data.hub_formats import has_format, json_documents, reading_errors


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


class _FileCorpus(Corpus):
    """Corpus of the files that `paths` name: files, folders (everything below) or glob patterns."""

    hidden = True  # of a folder, files and folders that begin with a dot as well

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("corpus paths are empty; give at least one file, folder or glob pattern")
        self.paths = paths

    def files(self) -> list[Path]:
        return find_files(self.paths, self.hidden)

    def identity(self) -> str:
        return identity_of(self.files())


class TextFiles(_FileCorpus):
    """Local text files, one document each.

    Args:
        paths: files, folders (everything below, but for names that begin with a dot, such as .git or the .cache of a
            download) or glob patterns
        undecodable: what to do with a file that is not UTF-8
        hidden: take files and folders whose names begin with a dot too
    """

    def __init__(self, paths: list[str], undecodable: Undecodable = "error", hidden: bool = False) -> None:
        super().__init__(paths)
        self.undecodable = undecodable
        self.hidden = hidden

    def documents(self, skip: int) -> Iterator[Document]:
        for path in self.files()[skip:]:
            yield Document(decode(path, self.undecodable))


class JsonLines(_FileCorpus):
    """JSON lines, one document a line; files ending in .gz, .bz2, .xz or .zst are decompressed.

    Args:
        paths: files, folders (everything below, but for names that begin with a dot) or glob patterns
        text_field: key of the text
        undecodable: what to do with a text that is not UTF-8 (escaped lone surrogates)
        missing_text: what to do with a record whose text is null or missing; "skip" counts it in the manifest
    """

    hidden = False

    def __init__(
        self,
        paths: list[str],
        text_field: str = "text",
        undecodable: Undecodable = "error",
        missing_text: MissingText = "error",
    ) -> None:
        super().__init__(paths)
        self.field = TextField(text_field, missing_text)
        self.undecodable = undecodable

    def documents(self, skip: int) -> Iterator[Document]:
        yield from itertools.islice(self._records(), skip, None)

    def _records(self) -> Iterator[Document]:
        for path in self.files():
            with records.opened(path) as file:
                yield from documents_of_lines(file, str(path), self.field, self.undecodable)


class Parquet(_FileCorpus):
    """Parquet files, one document a row, read one row group at a time.

    Args:
        paths: files, folders (everything below, but for names that begin with a dot) or glob patterns
        text_field: column of the text
        missing_text: what to do with a row whose text is null; "skip" counts it in the manifest
    """

    hidden = False

    def __init__(self, paths: list[str], text_field: str = "text", missing_text: MissingText = "error") -> None:
        super().__init__(paths)
        self.field = TextField(text_field, missing_text)

    def documents(self, skip: int) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        for path in self.files():
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self.field.check_column(file.schema_arrow.names, str(path))
                    first = 0
                    for group in range(file.num_row_groups):
                        rows = file.metadata.row_group(group).num_rows
                        if skip < rows:
                            column = file.read_row_group(group, columns=[self.field.name]).column(0)
                            for row in range(skip, rows):
                                text = column[row].as_py()
                                yield self.field.document({self.field.name: text}, f"{path} row {first + row}")
                        skip = max(0, skip - rows)
                        first += rows
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # refused by the system, not damaged
                    raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
                raise ValueError(f"{path} cannot be read as Parquet ({error}); {records.WAY_OUT}") from error


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
                raise FileNotFoundError(f"source folder {root} does not exist; {NO_SOURCES}")
            if names.count(name) > 1:
                raise ValueError(f"two source folders are named {name!r}; their groups could not be told apart")

    def group_of(self, root: Path, path: Path) -> str:
        return f"{root.resolve().name}/{Path(path.relative_to(root).parts[0]).stem}"

    def _documents_paths(self) -> Iterator[tuple[str, list[Path]]]:
        """Group and files of each document, in order."""
        for root in self.roots:
            files = each_once(sorted(self._files_below(root)))
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
        for path in files_below(root, True, lambda name: _matches(name, self.exclude)):
            if _matches(path.name, self.include) and (
                self.max_file_bytes is None or path.stat().st_size <= self.max_file_bytes
            ):
                yield path

    def documents(self, skip: int) -> Iterator[Document]:
        for group, paths in itertools.islice(self._documents_paths(), skip, None):
            texts = [text for path in paths if (text := decode(path, self.undecodable)) is not None]
            yield Document("".join(texts) if texts else None, group)

    def groups(self) -> set[str]:
        return {group for group, _ in self._documents_paths()}

    def identity(self) -> str:
        return identity_of([path for _, paths in self._documents_paths() for path in paths])


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
    """A data set that the `datasets` library can load, from the hub or from local files.

    JSON is not read by datasets, which turns strings that look like numbers or dates into such, gives null where a
    number stands among texts, and refuses files whose other columns differ; only the files' names come from it.

    Args:
        path: first argument of datasets.load_dataset: a hub name, or "parquet" or "json" with data_files
        name: configuration of the data set
        split: split of the data set
        data_files: files to read instead of all, as load_dataset takes them
        revision: commit or tag of the data set; fix it for reproducible corpora
        text_field: column of the text
        streaming: read while downloading; False downloads everything first
        missing_text: what to do with a record whose text is null; "skip" counts it in the manifest
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
        missing_text: MissingText = "error",
    ) -> None:
        self.path, self.split, self.streaming = path, split, streaming
        self.field = TextField(text_field, missing_text)
        self.arguments: dict[str, Any] = {"path": path, "name": name, "data_files": data_files, "revision": revision}

    def documents(self, skip: int) -> Iterator[Document]:
        import datasets

        where = f"data set {self.path}"
        try:
            builder = datasets.load_dataset_builder(**self.arguments)
            if has_format(builder, "json"):
                documents = json_documents(builder, self.path, self.split, self.streaming, self.field)
                yield from itertools.islice(documents, skip, None)
                return
            if has_format(builder, "csv"):  # else numbers, dates and "NA" are no texts any more
                as_text = {"converters": {self.field.name: str}, "keep_default_na": False}
                builder = datasets.load_dataset_builder(**self.arguments, **as_text)
            data = self._open(builder)
            if self.streaming and has_format(builder, "parquet"):  # the files' other columns may differ
                self.field.check_column(data.column_names, where)
                data = self._open(datasets.load_dataset_builder(**self.arguments, columns=[self.field.name]))
            if data.column_names is not None:  # None: known only after the first record
                self.field.check_column(data.column_names, where)
                data = data.select_columns([self.field.name])
            if not self.streaming and skip >= len(data):  # Dataset.skip raises there
                return
            for number, record in enumerate(data.skip(skip), start=skip):
                yield self.field.document(record, f"{where} record {number}")
        except reading_errors() as error:
            cause = error.__cause__ or error
            raise ValueError(f"{where} cannot be read ({type(cause).__name__}: {cause}); mend or remove it") from error

    def _open(self, builder: Any) -> Any:
        if self.streaming:
            return builder.as_streaming_dataset(split=self.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=self.split)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name) if "." not in name else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no installed package {name!r} with a folder; install it or remove it from packages")
    return Path(next(iter(spec.submodule_search_locations)))
