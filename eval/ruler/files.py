"""RULER's samples on disk.

FOLDER/TASK-LENGTH.jsonl   one sample a line: index, prompt, answers, tokens (of the prompt, with <bos>)
FOLDER/manifest.json       settings, tokenizer, sources, sha256 and counts of every file, what was left out and why
manifest.partial.json is the manifest of a folder that is being built.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import check_keys, read_json, write_file, write_json
from model.checkpoint import CheckpointInfo

FORMAT = 1
MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
FILE_KEYS = {"task": str, "length": int, "samples": int, "sha256": str}
LEFT_OUT_KEYS: dict[str, type | tuple[type, ...]] = {"task": str, "length": (int, type(None)), "reason": str}
WAY_OUT = "build it again elsewhere: python -m eval.ruler"


@dataclass(frozen=True)
class FrozenTask:
    """One file. samples: its lines."""

    task: str
    length: int
    sha256: str
    samples: list[dict[str, Any]]


def file_name(task: str, length: int) -> str:
    return f"{task}-{length}.jsonl"


def write_samples(folder: Path, task: str, length: int, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes a file and returns its record for the manifest."""
    content = "".join(json.dumps(sample) + "\n" for sample in samples).encode()
    write_file(folder / file_name(task, length), content)
    tokens = [sample["tokens"] for sample in samples]
    return {
        "task": task,
        "length": length,
        "samples": len(samples),
        "tokens": {"least": min(tokens), "mean": round(sum(tokens) / len(tokens), 1), "most": max(tokens)},
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError that say what to do."""
    path = folder / MANIFEST
    if not path.is_file():
        reason = "its build was interrupted" if (folder / PARTIAL).is_file() else "RULER was not built there"
        raise FileNotFoundError(f"{path} does not exist ({reason}): run python -m eval.ruler --output {folder}")
    return load_manifest(path)


def load_manifest(path: Path) -> dict[str, Any]:
    """A manifest, whole or of a folder that is being built. Raises ValueError that names the file and what is wrong."""
    manifest = read_json(path, WAY_OUT)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, expected {FORMAT}; {WAY_OUT}")
    check_keys(manifest, {"files": list, "left_out": list, "tokenizer": dict}, str(path), WAY_OUT)
    check_keys(manifest["tokenizer"], {"fingerprint": str}, f"{path}: tokenizer", WAY_OUT)
    for name, keys in (("files", FILE_KEYS), ("left_out", LEFT_OUT_KEYS)):
        for i, one in enumerate(manifest[name]):
            check_keys(one, keys, f"{path}: {name}[{i}]", WAY_OUT)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any], name: str) -> None:
    write_json(folder / name, manifest, sort_keys=True)


def is_whole(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / file_name(record["task"], record["length"])
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]


def check_tokenizer(folder: Path, checkpoints: Sequence[CheckpointInfo]) -> None:
    """Raises ValueError where samples were built with another tokenizer than a checkpoint's."""
    built = read_manifest(folder)["tokenizer"]["fingerprint"]
    for checkpoint in checkpoints:
        trained = checkpoint.tokenizer["fingerprint"]
        if trained != built:
            raise ValueError(
                f"--ruler {folder} was built with tokenizer {built[:12]}, but {checkpoint.path} was trained with "
                f"{trained[:12]}, in which its lengths are other ones: python -m eval.ruler --tokenizer "
                f"{checkpoint.path} builds it anew"
            )


def open_frozen(folder: Path, task: str | None, lengths: Sequence[int]) -> list[FrozenTask]:
    """Files of a task (None: of all), at some lengths (none: at all that there are), checked against the manifest.

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: a task or length that the folder does not have, or a file that is damaged.
    """
    manifest = read_manifest(folder)
    records = [one for one in manifest["files"] if task in (None, one["task"])]
    for length in lengths:
        if length not in [one["length"] for one in records]:
            reasons = [
                f"; {one['task']} at {length} was left out: {one['reason']}"
                for one in manifest["left_out"]
                if one["length"] in (length, None) and task in (None, one["task"])
            ]
            raise ValueError(f"{folder} has no {task or 'task'} at {length}{''.join(reasons)}")
    if not records:
        reasons = [one["reason"] for one in manifest["left_out"] if one["task"] == task]
        raise ValueError(f"{folder} has no task {task}{': ' + reasons[0] if reasons else ''}")
    found = []
    for record in records:
        if lengths and record["length"] not in lengths:
            continue
        if not is_whole(folder, record):
            path = folder / file_name(record["task"], record["length"])
            raise ValueError(f"{path} is missing or damaged (sha256 differs from {MANIFEST}): build it again elsewhere")
        samples = _read_samples(folder / file_name(record["task"], record["length"]))
        found.append(FrozenTask(record["task"], record["length"], record["sha256"], samples))
    return found


def _read_samples(path: Path) -> list[dict[str, Any]]:
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON ({error}); {WAY_OUT}") from error
        samples.append(check_keys(sample, {"prompt": str, "answers": list, "tokens": int}, where, WAY_OUT))
    return samples
