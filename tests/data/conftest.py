"""A small prepared corpus that the data tests share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.datamodule import PackedDataModule, SourceConfig
from data.prepare import main

PrepareTexts = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_texts(folder: Path, count: int, seed: int) -> Path:
    """Text files of 20 to 3000 words over a small alphabet."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for number in range(count):
        words = ["".join(generator.choices("abcdefg", k=generator.randint(1, 6))) for _ in range(60)]
        text = " ".join(generator.choices(words, k=int(20 * 150 ** generator.random())))
        (folder / f"{number:03d}.txt").write_text(f"document {number}\n" + text + "\n")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts", count=60, seed=0)


@pytest.fixture(scope="session")
def prepare_texts(texts: Path) -> PrepareTexts:
    """Prepare the text files in this process: prepare_texts(output, *options)."""

    def prepare(output: Path, *options: str) -> Path:
        settings = ["--corpus=data.corpora.TextFiles", f"--corpus.paths=[{texts}]", f"--output={output}"]
        settings += ["--tokenizer.vocab_size=400", "--shard_bytes=40000", "--workers=1"]
        main([*settings, *options])
        return output

    return prepare


@pytest.fixture(scope="session")
def prepared(prepare_texts: PrepareTexts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of some ten thousand tokens in several shards, about a fifth of its documents held out."""
    return prepare_texts(tmp_path_factory.mktemp("prepared") / "texts", "--heldout_fraction=0.2")


def make_module(prepared: Path, **options: Any) -> PackedDataModule:
    settings: dict[str, Any] = {"sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 2}
    settings |= {"num_workers": 0, "val_sequences": 8, "seed": 5}
    return PackedDataModule([SourceConfig(str(prepared))], **(settings | options))


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))
