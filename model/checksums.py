"""Checksums of what a checkpoint holds, and whether its numbers are numbers.

XXH3 (github.com/Cyan4973/xxHash), 64 bits: it finds damage, it is no protection against people. From memory, one core
of an AMD EPYC computes it at 5 GB/s, zlib's crc32 at 1 GB/s and hashlib's sha256 at 0.6 GB/s. The 96 GB of an 8b model
with its optimizer state are 20 s of one core, a save or a resume, divided among the ranks (2.4 s with eight), beside
reading the files, which comes anyway. The weights alone (32 GB) cost load_model 6 s.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

Verify = Literal["size", "checksum"]
CHUNK = 2**24


def tensor_checksum(tensor: Tensor) -> str:
    """Checksum of dtype, shape and bytes. tensor: on the CPU."""
    digest = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Checksum of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_checksum(content: dict[str, Any]) -> str:
    """Checksum of an object as JSON, whatever the order of its keys, without its own "checksum"."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return xxhash.xxh3_64(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are: from the least and the largest, which are NaN where any element is."""
    if not tensor.numel():
        return True
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
