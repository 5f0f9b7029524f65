"""A tiny prepared corpus and tiny checkpoints of the real formats, and stand-ins with known answers."""

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.corpora import TextFiles
from data.prepare import prepare
from data.prepare_settings import PrepareConfig, TokenizerConfig
from data.store import TokenStore
from model.checkpoint import checkpoint_folder, write_complete
from model.config import AttentionConfig, DMSConfig, DSAConfig, ModelConfig, Positions
from model.transformer import Transformer

BASE_LENGTH = 128
Command = Callable[[list[str]], int]  # main of a program
WORDS = ["def", "return", "value", "import", "class", "index", "for", "range", "if", "else", "self", "items", "path"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_wandb_left() -> Iterator[None]:
    """wandb's service outlives a run and is inherited by processes that other tests start."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def failing_line(capsys: pytest.CaptureFixture[str], command: Command, *arguments: object) -> str:
    """The one line on stderr that a command ends with, exit code 2 and nothing on stdout."""
    capsys.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and captured.out == "", captured.err
    return lines[0]


class ListStore:
    """A held-out split in memory. texts become <bos> bytes <eos> of ByteCodec."""

    def __init__(self, texts: list[str]) -> None:
        codec = ByteCodec()
        self._documents = [np.array([codec.bos_id, *codec.encode(text), codec.eos_id], np.uint16) for text in texts]
        self.lengths = np.array([len(document) for document in self._documents], np.int64)
        self.num_bytes = np.array([len(text.encode()) for text in texts], np.int64)

    def document(self, index: int) -> np.ndarray:
        return self._documents[index]


class ByteCodec:
    """One token a byte."""

    bos_id, eos_id, vocab_size = 256, 257, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class UniformModel:
    """Gives every token of a vocabulary the same probability; counts the tokens it read."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.read = vocab_size, 0

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        assert cu_seqlens is not None and cu_seqlens[-1] == tokens.shape[1]
        assert max_seqlen == int(cu_seqlens.diff().max())
        self.read += tokens.shape[1]
        return tokens[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(*hidden.shape[:-1], self.vocab_size)


class PositionModel(UniformModel):
    """At position t of its context gives the token TARGET probability 1 / (2 + t); the others share the rest."""

    TARGET = ord("a")

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        super().__call__(tokens, cu_seqlens, max_seqlen)
        assert cu_seqlens is not None
        return torch.cat([torch.arange(int(n)) for n in cu_seqlens.diff()])[None, :, None].double()

    def logits(self, hidden: Tensor) -> Tensor:
        p = 1 / (2 + hidden)  # (..., 1)
        rest = torch.log((1 - p) / (self.vocab_size - 1)).expand(*hidden.shape[:-1], self.vocab_size - 1)
        return torch.cat([rest[..., : self.TARGET], torch.log(p), rest[..., self.TARGET :]], -1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus whose held-out split has several documents beyond 8 * BASE_LENGTH tokens."""
    folder = tmp_path_factory.mktemp("eval_corpus")
    generator = random.Random(0)
    for number in range(24):
        lines = [
            f"    {' '.join(generator.choices(WORDS, k=6))} = {generator.randrange(1000)}  # é"
            for _ in range(130 if number % 4 else 12)
        ]
        (folder / f"{number:02d}.py").write_text("\n".join(lines))
    config = PrepareConfig(
        corpus=TextFiles([str(folder / "*.py")]),
        output=str(folder / "prepared"),
        tokenizer=TokenizerConfig(vocab_size=420),
        heldout_fraction=0.5,
        workers=1,
    )
    prepare(config, {"paths": "test"})
    return folder / "prepared"


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(corpus: Path) -> MakeRun:
    """make_run(folder, kind, step=7, fingerprint=None, init_std=0.02, data=corpus, positions="nape"): a run folder with
    one complete checkpoint and metrics. Weights that are small repeat the last token for ever, large ones write what
    depends on the context."""

    def make(
        folder: Path, kind: str, step: int = 7, fingerprint: str | None = None, init_std: float = 0.02,
        data: Path = corpus, positions: Positions = "nape",
    ) -> Path:  # fmt: skip
        store = TokenStore(data / "heldout")
        of_kind = {"dsa": {"dsa": DSAConfig(select_tokens=20)}, "dms": {"dms": DMSConfig(window=20)}}
        sizes = of_kind.get(kind, {})  # fewer than a test has
        torch.manual_seed(step)
        config = ModelConfig(
            vocab_size=store.vocab_size, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, init_std=init_std,
            positions=positions, attention=AttentionConfig(kind=kind, **sizes),  # type: ignore[arg-type]
        )  # fmt: skip
        weights = {f"weight/{name}": value for name, value in Transformer(config).state_dict().items()}
        checkpoint = checkpoint_folder(folder, step)
        checkpoint.mkdir(parents=True)
        save_file(weights, checkpoint / "state-00000.safetensors")
        tokenizer = {
            "path": str(store.tokenizer_path), "fingerprint": fingerprint or store.fingerprint_of_tokenizer,
        }  # fmt: skip
        meta = {"step": step, "samples": 4 * step, "tokens": 4 * step * BASE_LENGTH, "model": asdict(config)}
        meta |= {"tokenizer": tokenizer, "sequence_length": BASE_LENGTH, "code_version": "abc", "created": "2026-01-01"}
        write_complete(checkpoint, meta)
        write_metrics(folder, 0, [{"step": s, "train/loss": 6 - 0.1 * s, "val/loss": ""} for s in range(step)])
        (folder / "config.yaml").write_text(f"model:\n  network:\n    attention:\n      kind: {kind}\nseed: 1\n")
        return folder

    return make


def write_metrics(run: Path, start: int, rows: list[dict[str, object]]) -> None:
    """One session's metrics.csv with the columns of the first row."""
    session = run / "metrics" / f"step-{start:08d}"
    session.mkdir(parents=True)
    lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    (session / "metrics.csv").write_text("\n".join(lines) + "\n")


def tracked_tables(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by table name of the one evaluation that was tracked offline in this folder."""
    sys.modules["wandb"].teardown()  # its service may still be writing the run's files
    (folder,) = (output / "wandb").glob("offline-run-*")
    found = {}
    for path in folder.rglob("*.table.json"):
        table = json.loads(path.read_text())
        # wandb's file name ends in its step and a hash
        found[path.name.rsplit("_", 2)[0]] = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return found
