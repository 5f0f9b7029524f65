"""The files of a corpus: found by paths, folders and patterns, each once, and decoded."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from common.files import naming

Undecodable = Literal["error", "skip"]
NO_SOURCES = "get the sources (the file of --config may say how), or set corpus.paths to folders that exist"


def find_files(paths: list[str], hidden: bool) -> list[Path]:
    """Files named by paths, folders (all files below, through symbolic links too) or glob patterns, sorted within each
    entry; a file that several entries name is taken once. hidden: of folders, also what lies in .names."""
    found: list[Path] = []
    for entry in paths:
        path = Path(entry)
        if any(c in entry for c in "*?[") and not path.exists():
            start = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(p for p in start.glob(str(path.relative_to(start))) if p.is_file())
        elif path.is_dir():
            matches = sorted(files_below(path, hidden))
        else:
            matches = [path] if path.is_file() else []
        if not matches:
            raise FileNotFoundError(
                f"no file matches corpus path {entry!r}; expected a file, a folder or a glob pattern"
            )
        found += matches
    return each_once(found)


def each_once(files: list[Path]) -> list[Path]:
    """The files without those that are another one by another name; says so where there are such."""
    folders: dict[Path, Path] = {}
    seen: dict[Path, Path] = {}
    for path in files:
        folder = folders.get(path.parent)
        if folder is None:
            folder = folders[path.parent] = path.parent.resolve()
        seen.setdefault(path.resolve() if path.is_symlink() else folder / path.name, path)
    if len(seen) < len(files):
        print(f"{len(files) - len(seen)} files of the corpus are named more than once; each is read once")
    return list(seen.values())


def files_below(root: Path, hidden: bool, leave_out: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Files below a folder, linked folders included, but for one that leads back to a folder that it lies in."""
    pending: list[tuple[Path, tuple[Path, ...]]] = [(root, (root.resolve(),))]
    while pending:
        folder, above = pending.pop()
        for entry in folder.iterdir():
            if leave_out(entry.name) or (entry.name.startswith(".") and not hidden):
                continue
            if entry.is_dir():
                real = entry.resolve()
                if real not in above:
                    pending.append((entry, (*above, real)))
            elif entry.is_file():
                yield entry


def identity_of(files: list[Path]) -> str:
    """Hash of the names and sizes of the files; not of their times, which differ between copies of one corpus."""
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def decode(path: Path, on_undecodable: Undecodable) -> str | None:
    try:
        with naming(path):
            content = path.read_bytes()
        return content.decode("utf-8")  # bytes, so that line ends stay as they are
    except UnicodeDecodeError as error:
        if on_undecodable == "skip":
            return None
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); set undecodable: skip"
        ) from error


def without_surrogates(text: str, on_undecodable: Undecodable, where: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if on_undecodable == "skip":
            return None
        raise ValueError(f"{where}: text has a lone surrogate, which is not UTF-8; set undecodable: skip") from error
    return text
