"""Encode groups of documents in worker processes, each into at most one shard per split."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.files import write_json
from data.corpora import Document
from data.store import FORMAT, SPLITS, token_dtype, write_shard
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.interface import TAKE_IT_LOSSY


@dataclasses.dataclass
class Group:
    """Consecutive documents of the corpus.

    Attributes:
        end: number of the document after them, counting those left out.
        undecodable, missing: documents left out because they are not UTF-8, or have no text.
        digest: hash of the texts and of what is left out, in order.
    """

    index: int
    end: int
    texts: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {split: [] for split in SPLITS})
    undecodable: int = 0
    missing: int = 0
    num_bytes: int = 0
    digest: str = ""


def read_groups(
    documents: Iterable[Document], is_heldout: Callable[[Document], bool], shard_bytes: int, first: int, skip: int
) -> Iterator[Group]:
    """Groups from number `first` on. documents: those of the corpus from number `skip` on."""
    group, hashed = Group(first, skip), hashlib.blake2b(digest_size=16)
    for number, document in enumerate(documents, start=skip + 1):
        group.end = number
        content = (document.text or "").encode()
        hashed.update(struct.pack("<q?", len(content), document.text is None) + content)
        if document.text is None:
            group.missing += document.missing
            group.undecodable += not document.missing
        elif document.text:
            group.texts[SPLITS[is_heldout(document)]].append(document.text)
            group.num_bytes += len(content)
        if group.num_bytes >= shard_bytes:
            group.digest = hashed.hexdigest()
            yield group
            group, hashed = Group(group.index + 1, number), hashlib.blake2b(digest_size=16)
    if group.end > skip and (group.num_bytes or group.undecodable or group.missing):
        group.digest = hashed.hexdigest()
        yield group


def encode_group(group: Group, output: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the shards of a group, then its record. Returns the record."""
    dtype = token_dtype(tokenizer.vocab_size)
    record: dict[str, Any] = {"format": FORMAT, "end": group.end, "digest": group.digest, "splits": {}}
    record |= {"undecodable": group.undecodable, "missing": group.missing}
    name = shard_name(group.index)
    for split, texts in group.texts.items():
        if texts:
            ids = [_encode(text, tokenizer, dtype) for text in texts]
            sizes = [len(text.encode()) for text in texts]
            record["splits"][split] = write_shard(output / split, name, ids, sizes, tokenizer.fingerprint)
    write_json(output / "progress" / f"{name}.json", record, sort_keys=True)
    return record


def _encode(text: str, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> NDArray[Any]:
    """(tokens,) with bos and eos. Raises ValueError when they do not give the text back, but for a lossy tokenizer."""
    ids = tokenizer.encode(text)
    if not tokenizer.lossy:
        tokenizer.check_round_trip(text, ids, f"use another tokenizer, {TAKE_IT_LOSSY}")
    return np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)


def shard_name(index: int) -> str:
    return f"{index:06d}"


_worker_tokenizer: Tokenizer | None = None  # of a worker process, loaded once


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(tokenizer_path)
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
) -> Generator[tuple[int, int, dict[str, Any]], None, None]:
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
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer.path,))
    try:
        for group in groups:
            with _without_ctrl_c():
                future = pool.submit(_encode_in_worker, group, output)
            running[future] = (group.index, group.num_bytes)
            yield from collect(workers)
        yield from collect(0)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died (out of memory?); use fewer workers or smaller shard_bytes"
        ) from error
    except (
        KeyboardInterrupt,
        GeneratorExit,
    ):  # of Ctrl-C, here or in the caller; after other errors groups are finished
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes started here do not get Ctrl-C, which the terminal sends to all: this one ends them. It is not lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
