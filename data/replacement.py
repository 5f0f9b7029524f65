"""A prepared corpus that takes the place of another: it is prepared in OUTPUT/.replacement, and the one in OUTPUT stays
until the new one is complete. Moving it there is a few renames; killed between them, the next data.prepare ends it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common.locks import LOCK
from data.store import SPLITS, read_manifest
from data.tokenizers.special_tokens import SETTINGS, TOKENIZER_FILES

NEXT = ".replacement"
TOKENIZER_PARTS = (*TOKENIZER_FILES, SETTINGS)
MANIFEST = "manifest.json"
PROGRESS = "progress"
WRITTEN = {LOCK, NEXT, PROGRESS, MANIFEST, *TOKENIZER_PARTS, *SPLITS}
TEMPORARY = "*.[0-9]*.tmp"  # of common.files.write_file


def has_earlier_run(output: Path) -> bool:
    return (output / MANIFEST).exists() or (output / PROGRESS / "config.json").exists()


def check_replaceable(output: Path) -> None:
    """Raises ValueError where other files than data.prepare's lie in a prepared corpus."""
    foreign = sorted(path.name for path in output.iterdir() if path.name not in WRITTEN and not path.match(TEMPORARY))
    if foreign:
        raise ValueError(
            f"{output} holds {', '.join(foreign[:3])}, which data.prepare did not write: move that away, or choose "
            "another --output; nothing is removed"
        )


def move_into_place(output: Path, way_out: str) -> bool:
    """Put the corpus in OUTPUT/.replacement into the place of the one in OUTPUT, if it is complete: whether it was.

    The manifest of the old one goes first and that of the new one comes last: between them there is no corpus for
    those who read, and the new one is complete for this function. A part that is no longer in OUTPUT/.replacement
    is in its place already.
    """
    new = output / NEXT
    if not (new / MANIFEST).exists():
        return False
    manifest = read_manifest(new, way_out)
    parts = {*manifest["tokenizer_files"], *(name for name in SPLITS if manifest["splits"][name]["shards"])}
    (output / MANIFEST).unlink(missing_ok=True)
    for name in (*TOKENIZER_PARTS, *SPLITS):
        there, part = output / name, new / name
        if not part.exists() and name in parts:
            continue
        if there.is_dir():
            shutil.rmtree(there)
        else:
            there.unlink(missing_ok=True)  # a tokenizer of the other kind, and its settings
        if part.exists():
            part.replace(there)
    shutil.rmtree(output / PROGRESS, ignore_errors=True)  # of an earlier run that never was complete
    (new / MANIFEST).replace(output / MANIFEST)
    shutil.rmtree(new)
    return True
