"""benchmarks.imported_tasks: an import equals its original, another model does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import model.hub.convert
from benchmarks.imported_tasks import main
from tests.hub_tokenizers import END, byte_level
from tests.hub_tokenizers import save as save_tokenizer
from tests.model.hub.test_architecture import config


def folder(path: Path, seed: int, length: int = 2048) -> Path:
    torch.manual_seed(seed)
    options: dict[str, Any] = dict(vocab_size=512, max_position_embeddings=length)
    AutoModelForCausalLM.from_config(config("llama", **options)).save_pretrained(path)
    save_tokenizer(path, byte_level([END]), bos_token=END, eos_token=END)
    return path


def test_an_import_equals_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = folder(tmp_path / "source", 1), tmp_path / "run"
    assert model.hub.convert.main([str(source), "--output", str(run)]) == 0
    options = ["--tasks", "openbookqa", "lambada", "--limit", "3", "--device", "cpu"]
    assert main([str(run), str(source), *options, "--output", str(tmp_path / "out")]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| openb")]
    assert [row[1] for row in rows] == ["acc", "acc_norm"] and all(row[4:] == ["3", "0 |"] for row in rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "samples.json"]
    short = folder(tmp_path / "short", 1, length=64)
    assert model.hub.convert.main([str(short), "--output", str(tmp_path / "short run")]) == 0
    with pytest.raises(ValueError, match="tokens do not fit the window of 64"):
        main([str(tmp_path / "short run"), str(short), *options])
    other = folder(tmp_path / "other", 2)
    assert main([str(run), str(other), *options]) == 1
    with pytest.raises(ValueError, match="no such file; expected a GGUF file"):
        main([str(run), str(tmp_path / "none.gguf"), *options])
