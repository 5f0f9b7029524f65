"""Which shards have been read and found whole, kept outside the corpora, which may be read-only.

One small file a split, in $LONGSPLASH_CACHE, else $XDG_CACHE_HOME/longsplash, else ~/.cache/longsplash. A shard file
counts as verified while its size, time of change and inode are those of when it was read and its recorded checksum is
the same. Removing the folder has everything read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_json

SETTLED_SECONDS = 2.0  # a file that changed this shortly before it was read may change again within a tick of its clock


def stamp_path(folder: Path) -> Path:
    """Path of a split's stamp; copies of a corpus on several machines, at one path, have stamps of their own."""
    base = os.environ.get("LONGSPLASH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "longsplash")
    manifest = folder.parent / "manifest.json"
    name = f"{folder.resolve()} {manifest.stat().st_ino}"
    return Path(base).expanduser() / "verified" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def signature(file: os.stat_result, sha256: str) -> list[Any]:
    """What stands in a stamp for one file."""
    return [file.st_size, file.st_mtime_ns, file.st_ino, sha256]


def read_stamp(folder: Path) -> dict[str, Any]:
    """File name -> signature; {} where there is none or it cannot be read, which only costs reading the shards."""
    try:
        content = json.loads(stamp_path(folder).read_bytes())
    except (OSError, RuntimeError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_stamp(folder: Path, verified: Mapping[str, list[Any]]) -> None:
    """Keep the signatures, but for files that have just changed. Where that is impossible, says so."""
    latest = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    try:
        write_json(stamp_path(folder), {name: sign for name, sign in verified.items() if sign[1] < latest}, indent=None)
    except (OSError, RuntimeError) as error:  # several nodes may write at once, and all find the same
        print(f"{folder} will be verified again at the next start: {error}", flush=True)
