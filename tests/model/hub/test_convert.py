"""From a folder of the hub to a run and back: the same logits and tokens, and one line for what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.export
import model.hub.convert
from data.tokenizer import load_tokenizer
from model.checkpoint import resolve_checkpoint
from model.config import ModelConfig
from model.loading import load_model
from model.transformer import Transformer
from tests.hub_tokenizers import END, byte_level, llama_2
from tests.hub_tokenizers import save as save_tokenizer
from tests.model.hub.test_architecture import config
from tests.model.test_checkpoint import CONFIG, save

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the hub of each family, with one tokenizer."""
    root = tmp_path_factory.mktemp("hub")
    for family in FAMILIES:
        torch.manual_seed(1)
        folder = root / family
        save_tokenizer(folder, byte_level([END]), bos_token=END, eos_token=END)
        options: dict[str, Any] = dict(vocab_size=512, tie_word_embeddings=family == "qwen3")
        if family == "smollm3":
            options["no_rope_layer_interval"] = 2
        network = AutoModelForCausalLM.from_config(config(family, **options)).to(torch.bfloat16)
        network.save_pretrained(folder)
    return root


def convert(*arguments: object) -> int:
    return model.hub.convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_there_and_back(family: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert convert(sources / family, "--output", run) == 0
    said = capsys.readouterr().out
    assert f"{run}: " in said and f"{family} as softmax with rope, 64 tokens of context" in said
    loaded = load_model(run)
    assert (loaded.step, loaded.training_length) == (0, 64)
    assert Path(loaded.tokenizer_path) == run / "tokenizer" / "tokenizer.json"
    assert load_tokenizer(loaded.tokenizer_path).fingerprint == loaded.tokenizer_fingerprint
    assert model.export.main([str(run), str(exported), "--format", "transformers", "--dtype", "float32"]) == 0
    text = "def f(x):\n    return  1"
    theirs = AutoModelForCausalLM.from_pretrained(sources / family, dtype=torch.float32).eval()
    again = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(again) is type(theirs) and again.dtype == torch.float32
    tokens = AutoTokenizer.from_pretrained(exported)(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    ours = loaded.model.logits(loaded.model(tokens))
    assert (ours - theirs(tokens).logits).abs().max() <= 1e-4 * ours.std()
    card = (exported / "README.md").read_text()
    assert f"A {family} language model" in card and f"Weights came from {sources / family}." in card


def test_large_models_are_cut(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.hub.convert, "FILE_BYTES", 2**14)
    assert convert(sources / "llama", "--output", tmp_path / "run") == 0
    found = resolve_checkpoint(tmp_path / "run")
    assert len(list(found.path.glob("state-*.safetensors"))) > 2
    load_model(found.path)
    model.export.export(found.path, tmp_path / "out", torch.float32, shard_size="16KB", layout="transformers")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def changed(source: Path, folder: Path, **changes: object) -> Path:
    """A copy with other values in config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def test_what_cannot_be_converted_is_one_line(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    lossy = save_tokenizer(tmp_path / "lossy", llama_2(), bos_token="<s>", eos_token="</s>")
    silent = save_tokenizer(tmp_path / "silent", byte_level([END]))
    llama, new = sources / "llama", tmp_path / "new"
    small = tmp_path / "small"
    AutoModelForCausalLM.from_config(config("llama", vocab_size=300)).save_pretrained(small)
    save_tokenizer(small, byte_level([END]), bos_token=END, eos_token=END)
    cases = [
        (
            (tmp_path / "none", "--output", new),
            "no such folder; expected a folder with config.json, or a name on the hub",
        ),
        ((tmp_path / "none.gguf", "--output", new), "no such file; expected a GGUF file"),
        ((tmp_path / "empty", "--output", new), "cannot be loaded by transformers"),
        ((llama, "--output", tmp_path / "full"), "is not empty: expected a new folder"),
        ((llama, "--output", llama / "config.json"), "is a file: expected a new folder"),
        ((llama, "--output", new, "--tokenizer", lossy), f"tokenizer {lossy}/tokenizer.json changes text"),
        ((llama, "--output", new, "--tokenizer", silent), "has no bos: "),
        ((llama, "--output", new, "--tokenizer", silent, "--bos", "<x>"), "--bos is '<x>', which is no token"),
        ((small, "--output", new), "expected at most the model's 300: choose another with --tokenizer"),
        ((changed(llama, tmp_path / "gelu", hidden_act="gelu"), "--output", new), "hidden_act is 'gelu'"),
        ((changed(llama, tmp_path / "more", num_hidden_layers=4), "--output", new), "has missing keys, of 9 the first"),
        (
            (changed(llama, tmp_path / "less", num_hidden_layers=2), "--output", new),
            "has unexpected keys, of 9 the first",
        ),
        ((changed(llama, tmp_path / "wide", vocab_size=500), "--output", new), "cannot be loaded by transformers"),
    ]
    capsys.readouterr()
    for arguments, part in cases:
        assert convert(*arguments) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and part in line and "\n" not in line, (arguments, line)
        assert not new.exists() and not list(tmp_path.glob(".new-*"))
    assert convert(llama, "--output", new, "--tokenizer", lossy, "--lossy") == 0
    assert load_tokenizer(load_model(new).tokenizer_path).lossy


def test_a_model_that_is_not_reproduced_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = model.hub.convert.architecture_of

    def wrong(config: object) -> ModelConfig:
        network = right(config)
        network.rope_base = 77.0
        return network

    monkeypatch.setattr(model.hub.convert, "architecture_of", wrong)
    assert convert(sources / "llama", "--output", tmp_path / "run") == 2
    assert "is not reproduced: logits of 64 tokens differ by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_entmax_models_are_none_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run", 10, Transformer(CONFIG))
    assert model.export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "transformers"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and ("tokenizer" in line or "none of transformers' own" in line)
    assert not (tmp_path / "out").exists()
