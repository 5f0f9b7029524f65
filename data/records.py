"""Records of files: opened, decompressed, parsed, with errors that name the file and, where there are any, the line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.files import naming

WAY_OUT = "copy or download it again, or remove it"
DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raises ValueError that names the file for data that cannot be decompressed, OSError that names it where the
    system refuses to read it."""
    try:
        with naming(Path(name)):
            yield
    except DECOMPRESSION_ERRORS as error:
        raise ValueError(f"{name} is damaged or cut short ({error}); {WAY_OUT}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{name} is damaged or cut short ({error}); {WAY_OUT}") from error  # bz2's


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file in binary, decompressed by its name's ending: .gz, .bz2, .xz or .zst.

    Raises ValueError that names the file for damaged data, and for .zst without the package zstandard.
    """
    with reading(str(path)), open(path, "rb") as file:
        yield decompressed(file, path.name)


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """What `file` holds, decompressed by the ending of its name. Raises ValueError for .zst without zstandard."""
    ending = Path(name).suffix
    if ending == ".zst":
        return io.BufferedReader(_Zstandard(file, name))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[ending](file, "rb") if ending in openers else file


class _Zstandard(io.RawIOBase):
    """All frames of a file. The readers of zstandard end without an error where a file is cut short."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{name} needs the package zstandard: pip install zstandard, or decompress it") from error
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(65536)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def json_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[Any, str]]:
    """(record, "NAME:LINE") of each line that is not blank; a byte order mark before the first is no part of it. A file
    that is one list of records gives these, and "NAME record NUMBER".

    Raises ValueError that names file and line for a line that is not JSON or not UTF-8.
    """
    lines = iter(enumerate(file, start=1))
    for number, line in lines:
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        if number == 1 and content.lstrip().startswith(b"["):
            rest = b"".join(line for _, line in lines)
            found = _parsed(content + rest, name, "the file")
            yield from ((record, f"{name} record {index}") for index, record in enumerate(found))
            return
        yield _parsed(content, f"{name}:{number}", "the line"), f"{name}:{number}"


def _parsed(content: bytes, where: str, what: str) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); mend or remove {what}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); mend or remove {what}") from error
