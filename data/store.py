"""Prepared corpus on disk: token shards with document offsets, and the reader.

CORPUS/manifest.json       format, tokenizer fingerprint and vocabulary size, sha256 of its files, config, totals and
                           shard names per split
CORPUS/tokenizer.model     SentencePiece model, or tokenizer.json of the Hugging Face hub
CORPUS/tokenizer_config.json     bos, eos and lossy of a tokenizer.json, or lossy of a model that changes texts
CORPUS/<split>/NAME.bin          token ids, uint16 (uint32 when the vocabulary has more than 65535 ids), documents end
                                 to end, each `<bos> ids <eos>`
CORPUS/<split>/NAME.idx.npy      int64 (2, documents + 1): where each document starts in tokens, and in UTF-8 bytes
CORPUS/<split>/NAME.json         counts, tokenizer fingerprint, size and sha256 of the two files; written last
Splits are `train` and `heldout`. numpy only.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.files import check_keys, read_json, write_file, write_json
from data.tokenizers.special_tokens import TOKENIZER_FILES
from data.verified import read_stamp, signature, write_stamp

FORMAT = 1
SPLITS = ("train", "heldout")
OPEN_SHARDS = 256  # memory maps kept per process: far under the kernel's default limit of 65530
Verify = Literal["size", "checksum"]


def read_record(path: Path, way_out: str, keys: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The JSON object of this FORMAT in `path`, as `read_json` has it."""
    content = read_json(path, way_out, keys)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}, expected {FORMAT}; {way_out}")
    return content


COUNT_KEYS = {"documents": int, "tokens": int, "bytes": int}
MANIFEST_KEYS = {"splits": dict, "tokenizer_fingerprint": str, "vocab_size": int}
SHARD_KEYS = {**COUNT_KEYS, "dtype": str, "tokenizer_fingerprint": str, "files": dict}


def read_manifest(folder: Path, way_out: str) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises as `read_json`, also for splits that are not what they should be."""
    path = folder / "manifest.json"
    manifest = read_record(path, way_out, MANIFEST_KEYS)
    for split in SPLITS:
        check_keys(manifest["splits"], {split: dict}, f"{path}, splits,", way_out)
        counts = check_keys(manifest["splits"][split], {**COUNT_KEYS, "shards": list}, f"{path}, {split},", way_out)
        if not all(isinstance(name, str) for name in counts["shards"]):
            raise ValueError(f"{path}, {split}, names shards that are no texts; {way_out}")
    # Of before there were other tokenizers: the fingerprint of a SentencePiece model is the sha256 of its file.
    files = manifest.setdefault("tokenizer_files", {"tokenizer.model": manifest["tokenizer_fingerprint"]})
    check_keys(manifest, {"tokenizer_files": dict}, str(path), way_out)
    if not all(isinstance(digest, str) for digest in files.values()) or not files.keys() & set(TOKENIZER_FILES):
        names = " or ".join(TOKENIZER_FILES)
        raise ValueError(f"{path} has tokenizer_files {files}, expected {names} with its sha256; {way_out}")
    return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest of uint16 and uint32 that holds the ids."""
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def write_shard(
    folder: Path,
    name: str,
    documents: Sequence[NDArray[Any]],
    num_bytes: Sequence[int],
    tokenizer_fingerprint: str,
) -> dict[str, int]:
    """Write one shard, its JSON last. documents: ids with bos and eos, of one dtype; num_bytes: UTF-8 bytes of each.

    Returns the counts: documents, tokens, bytes.
    """
    index = np.zeros((2, len(documents) + 1), np.int64)
    np.cumsum([len(document) for document in documents], out=index[0, 1:])
    np.cumsum(num_bytes, out=index[1, 1:])
    index_file = io.BytesIO()
    np.save(index_file, index)
    tokens = np.concatenate(documents)
    files = {f"{name}.bin": tokens.data.cast("B"), f"{name}.idx.npy": index_file.getbuffer()}
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        write_file(folder / file_name, content)
    counts = {"documents": len(documents), "tokens": int(index[0, -1]), "bytes": int(index[1, -1])}
    meta = {
        **counts,
        "format": FORMAT,
        "dtype": tokens.dtype.name,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "files": {
            file_name: {"bytes": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
            for file_name, content in files.items()
        },
    }
    write_json(folder / f"{name}.json", meta, sort_keys=True)
    return counts


class TokenStore:
    """Read one split of a prepared corpus, e.g. TokenStore("prepared/stdlib/train"), by memory maps.

    verify: "size" compares the size of every file with its record, "checksum" also the sha256 of those that have
    changed since it was last compared.
    Raises FileNotFoundError (missing manifest, shard or tokenizer) or ValueError (wrong size, checksum, tokenizer,
    or no documents). Memory is bounded: tokens and offsets stay on disk; only `lengths` and `num_bytes` hold 8 bytes
    per document. Copies sent to other processes carry no open maps.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: Verify = "size") -> None:
        self.folder = Path(folder)
        if verify not in ("size", "checksum"):
            raise ValueError(f"verify is {verify!r}, expected 'size' or 'checksum'")
        self.way_out = f"prepare the corpus again: python -m data.prepare --config ... --output {self.folder.parent}"
        manifest = read_manifest(self.folder.parent, self.way_out)
        if self.folder.name not in manifest["splits"]:
            raise FileNotFoundError(f"{self.folder} is no split of a corpus; expected one of {', '.join(SPLITS)}")
        split = manifest["splits"][self.folder.name]
        self.fingerprint_of_tokenizer: str = manifest["tokenizer_fingerprint"]
        self.vocab_size: int = manifest["vocab_size"]
        self._tokenizer_files: dict[str, str] = manifest["tokenizer_files"]
        self.tokenizer_path = self.folder.parent / next(n for n in TOKENIZER_FILES if n in self._tokenizer_files)
        self.shard_names: list[str] = split["shards"]
        if not self.shard_names:
            raise ValueError(f"{self.folder} has no documents; {self.way_out} with more text or held-out documents")
        self._check_tokenizer()
        self._shards = [self._read_meta(name) for name in self.shard_names]
        self._first_document = np.cumsum([0] + [meta["documents"] for meta in self._shards])
        for key in ("documents", "tokens", "bytes"):
            found = sum(meta[key] for meta in self._shards)
            if found != split[key]:
                raise ValueError(f"{self.folder} has {found} {key}, its manifest says {split[key]}; {self.way_out}")
        self.num_documents: int = split["documents"]
        self.num_tokens: int = split["tokens"]
        self._check_sizes()
        if verify == "checksum":
            self.verify_checksums()
        self._open_caches()

    @property
    def content(self) -> str:
        """Identity of the tokens and their order: sha256 over the shards' recorded checksums."""
        checksums = [[name, record["sha256"]] for meta in self._shards for name, record in meta["files"].items()]
        return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()

    def _check_tokenizer(self) -> None:
        for name, recorded in self._tokenizer_files.items():
            path = self.folder.parent / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist; {self.way_out}")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != recorded:
                raise ValueError(
                    f"{path} has fingerprint {found[:12]}, but the shards were written with {recorded[:12]}; put back "
                    f"that tokenizer, or {self.way_out}"
                )

    def _read_meta(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        meta = read_record(path, self.way_out, SHARD_KEYS)
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"{path} has dtype {meta['dtype']!r}, expected 'uint16' or 'uint32'; {self.way_out}")
        for file_name in (f"{name}.bin", f"{name}.idx.npy"):
            check_keys(meta["files"], {file_name: dict}, f"{path}, files,", self.way_out)
            check_keys(meta["files"][file_name], {"bytes": int, "sha256": str}, f"{path}, {file_name},", self.way_out)
        if meta["tokenizer_fingerprint"] != self.fingerprint_of_tokenizer:
            raise ValueError(
                f"shard {self.folder / name} was written with tokenizer {meta['tokenizer_fingerprint'][:12]}, the "
                f"corpus has {self.fingerprint_of_tokenizer[:12]}; {self.way_out}"
            )
        return meta

    def _check_sizes(self) -> None:
        for meta in self._shards:
            for file_name, record in meta["files"].items():
                path = self.folder / file_name
                if not path.is_file():
                    raise FileNotFoundError(f"shard file {path} does not exist; {self.way_out}")
                if (size := path.stat().st_size) != record["bytes"]:
                    raise ValueError(f"shard file {path} has {size} bytes, expected {record['bytes']}; {self.way_out}")

    def verify_checksums(self) -> None:
        """Read the shard files that have changed since they were last verified (see data.verified).

        Raises ValueError when the sha256 of one differs from its record.
        """
        records = {name: record for meta in self._shards for name, record in meta["files"].items()}
        before = {name: signature((self.folder / name).stat(), record["sha256"]) for name, record in records.items()}
        stamp = read_stamp(self.folder)
        verified = {name: sign for name, sign in before.items() if stamp.get(name) == sign}
        files = {name: record for name, record in records.items() if name not in verified}
        total = sum(record["bytes"] for record in files.values())
        try:
            with tqdm(desc=f"checksums of {self.folder}", total=total, unit="B", unit_scale=True, delay=5) as bar:
                for name, record in files.items():
                    self._verify_checksum(name, record["sha256"])
                    verified[name] = before[name]  # of before it was read, so that a change meanwhile shows
                    bar.update(record["bytes"])
        finally:
            if files:
                write_stamp(self.folder, verified)

    def _verify_checksum(self, name: str, expected: str) -> None:
        with open(self.folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"shard file {self.folder / name} has sha256 {found[:12]}, expected {expected[:12]} (damaged); "
                f"{self.way_out}"
            )

    def _open_caches(self) -> None:
        self._open_tokens = functools.lru_cache(OPEN_SHARDS)(self._map_tokens)
        self._open_index = functools.lru_cache(OPEN_SHARDS)(self._map_index)

    def _map_tokens(self, shard: int) -> NDArray[Any]:
        path = self.folder / f"{self.shard_names[shard]}.bin"
        return np.memmap(path, dtype=self._shards[shard]["dtype"], mode="r")

    def _map_index(self, shard: int) -> NDArray[np.int64]:
        path = self.folder / f"{self.shard_names[shard]}.idx.npy"
        expected = (2, self._shards[shard]["documents"] + 1)
        try:
            index = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no index of a shard ({error}); {self.way_out}") from error
        if index.shape != expected or index.dtype != np.int64:
            raise ValueError(f"{path} has {index.dtype} {index.shape}, expected int64 {expected}; {self.way_out}")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_open_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_tokens(self, shard: int) -> NDArray[Any]:
        """(tokens of the shard,) uint16 or uint32, memory-mapped."""
        return self._open_tokens(shard)

    def shard_offsets(self, shard: int) -> NDArray[np.int64]:
        """(documents of the shard + 1,) int64, memory-mapped: where each document starts in `shard_tokens`."""
        return self._open_index(shard)[0]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(num_documents,) int64: tokens of each document, bos and eos included."""
        return np.concatenate([np.diff(self._open_index(shard)[0]) for shard in range(self.num_shards)])

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """(num_documents,) int64: UTF-8 bytes of each document."""
        return np.concatenate([np.diff(self._open_index(shard)[1]) for shard in range(self.num_shards)])

    def document(self, index: int) -> NDArray[Any]:
        """(tokens,) uint16 or uint32, memory-mapped: document `index` with bos and eos. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside [0, {self.num_documents}) of {self.folder}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        local = index - int(self._first_document[shard])
        offsets = self.shard_offsets(shard)
        return self.shard_tokens(shard)[offsets[local] : offsets[local + 1]]
