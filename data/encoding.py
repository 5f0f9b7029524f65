"""Encode groups of documents in worker processes, each into at most one shard per split."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from data.corpora import Document
from data.store import FORMAT, SPLITS, token_dtype, write_shard
from data.tokenizer import Tokenizer


@dataclasses.dataclass
class Group:
    """Consecutive documents of the corpus. end: number of the document after them, counting those left out."""

    index: int
    end: int
    texts: dict[str, list[str]]
    undecodable: int
    num_bytes: int


def read_groups(
    documents: Iterable[Document], is_heldout: Callable[[Document], bool], shard_bytes: int, first: int, skip: int
) -> Iterator[Group]:
    """Groups from number `first` on. documents: those of the corpus from number `skip` on."""
    group = Group(first, skip, {split: [] for split in SPLITS}, 0, 0)
    for number, document in enumerate(documents, start=skip + 1):
        group.end = number
        if document.text is None:
            group.undecodable += 1
        elif document.text:
            group.texts[SPLITS[is_heldout(document)]].append(document.text)
            group.num_bytes += len(document.text.encode())
        if group.num_bytes >= shard_bytes:
            yield group
            group = Group(group.index + 1, number, {split: [] for split in SPLITS}, 0, 0)
    if group.end > skip and (group.num_bytes or group.undecodable):
        yield group


def encode_group(group: Group, output: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the shards of a group, then its record. Returns the record."""
    dtype = token_dtype(tokenizer.vocab_size)
    record: dict[str, Any] = {"format": FORMAT, "end": group.end, "undecodable": group.undecodable, "splits": {}}
    name = shard_name(group.index)
    for split, texts in group.texts.items():
        if texts:
            ids = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype) for text in texts]
            sizes = [len(text.encode()) for text in texts]
            record["splits"][split] = write_shard(output / split, name, ids, sizes, tokenizer.fingerprint)
    write_json(output / "progress" / f"{name}.json", record, sort_keys=True)
    return record


def shard_name(index: int) -> str:
    return f"{index:06d}"


_worker_tokenizer: Tokenizer | None = None  # of a worker process, loaded once


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(tokenizer_path)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(group: Group, output: Path) -> dict[str, Any]:
    assert _worker_tokenizer is not None
    return encode_group(group, output, _worker_tokenizer)


def map_groups(
    groups: Iterator[Group], output: Path, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(index, bytes, record) of each group as it is finished. At most one group waits besides those being encoded.

    Raises RuntimeError when a worker process dies.
    """
    if workers == 1:
        for group in groups:
            yield group.index, group.num_bytes, encode_group(group, output, tokenizer)
        return
    running: dict[Future[dict[str, Any]], tuple[int, int]] = {}

    def collect(most: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        while len(running) > most:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield *running.pop(future), future.result()

    context = multiprocessing.get_context("spawn")  # fork is unsafe with the threads of pyarrow and datasets
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer.path,)) as pool:
        try:
            for group in groups:
                running[pool.submit(_encode_in_worker, group, output)] = (group.index, group.num_bytes)
                yield from collect(workers)
            yield from collect(0)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?); use fewer workers or smaller shard_bytes"
            ) from error
