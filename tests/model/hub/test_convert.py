"""From a folder of the hub to a run and back: the same logits and tokens, and one line for what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.export
import model.hub.convert
from data.tokenizer import load_tokenizer
from data.tokenizers.training import train_tokenizer
from model.checkpoint import resolve_checkpoint
from model.config import AttentionConfig, ModelConfig
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
    monkeypatch.setattr(model.hub.run_folder, "FILE_BYTES", 2**14)
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
    rope = dict(rope_type="linear", rope_theta=1e4, factor=0.0)
    linear = changed(llama, tmp_path / "linear", rope_parameters=rope)
    cut = changed(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUFxxxx")
    nan, silent_model = changed(llama, tmp_path / "nan"), changed(llama, tmp_path / "silent_model")
    weights = load_file(nan / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    headed = changed(sources / "qwen3", tmp_path / "headed")
    weights = load_file(headed / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, headed / "model.safetensors", metadata={"format": "pt"})
    for path in silent_model.glob("tokenizer*"):
        path.unlink()
    run = save(tmp_path / "a run", 10, Transformer(CONFIG)).parent.parent
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
        (
            (changed(llama, tmp_path / "gelu", hidden_act="gelu"), "--output", new),
            "hidden_act in config.json is",
        ),
        ((changed(llama, tmp_path / "more", num_hidden_layers=4), "--output", new), "has missing keys, of 9 the first"),
        (
            (changed(llama, tmp_path / "less", num_hidden_layers=2), "--output", new),
            "has unexpected keys, of 9 the first",
        ),
        ((changed(llama, tmp_path / "wide", vocab_size=500), "--output", new), "has mismatched keys, of 2 the first"),
        ((changed(llama, tmp_path / "other", model_type="gpt2"), "--output", new), "model_type is 'gpt2'"),
        ((changed(llama, tmp_path / "heads", num_attention_heads=3), "--output", new), "cannot be loaded"),
        ((changed(llama, tmp_path / "text", vocab_size="x"), "--output", new), "cannot be loaded"),
        ((linear, "--output", new), "rope_scaling.factor"),
        ((cut, "--output", new), "cannot be loaded by transformers"),
        ((broken, "--output", new), "cannot be loaded by transformers"),
        ((nan, "--output", new), "has model.norm.weight, which is not finite"),
        ((headed, "--output", new), "has an lm_head.weight that differs from its embedding"),
        ((silent_model, "--output", new), "has no tokenizer that transformers loads"),
        ((run, "--output", new), "is a run of this code already"),
        ((llama, "--output", llama / "run"), "is inside"),
        ((small, "--output", tmp_path / "deep" / "er" / "run"), "expected at most the model's"),
    ]
    capsys.readouterr()
    for arguments, part in cases:
        assert convert(*arguments) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and part in line and "\n" not in line, (arguments, line)
        assert not new.exists() and not list(tmp_path.glob(".new-*")) and not (tmp_path / "deep").exists()
    assert convert(llama, "--output", new, "--tokenizer", lossy, "--lossy") == 0
    assert load_tokenizer(load_model(new).tokenizer_path).lossy
    moved = new.rename(tmp_path / "moved")
    assert load_model(moved).tokenizer_path == str(moved / "tokenizer" / "tokenizer.json")
    file = sources / "qwen2" / "tokenizer.json"
    assert convert(llama, "--output", new, "--tokenizer", file) == 0
    assert load_tokenizer(new).fingerprint == load_tokenizer(file).fingerprint
    assert convert(llama, "--output", tmp_path / "newer", "--tokenizer", new) == 0  # a run's
    assert convert(llama, "--output", tmp_path / "x", "--tokenizer", tmp_path / "empty") == 2
    line = capsys.readouterr().err
    assert "is a folder without tokenizer.json or tokenizer.model" in line and "holds no complete checkpoint" in line
    given = load_tokenizer(sources / "qwen2")
    trained = save(tmp_path / "trained", 10, Transformer(CONFIG), tokenizer=given).parent.parent
    assert convert(llama, "--output", tmp_path / "newest", "--tokenizer", trained) == 0
    assert load_tokenizer(tmp_path / "newest").fingerprint == given.fingerprint
    assert convert(llama, "--output", tmp_path / "x", "--tokenizer", run) == 2
    assert "error: tokenizer t.model does not exist" in capsys.readouterr().err  # the run's has gone
    assert model.export.main([str(sources / "llama"), str(tmp_path / "x")]) == 2
    assert "is a model of transformers: expected a run" in capsys.readouterr().err


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


@pytest.mark.parametrize("split_by_unicode_script", [True, False])
def test_sentencepiece_is_written_as_tokenizer_json(split_by_unicode_script: bool, tmp_path: Path) -> None:
    """Code, whose tokenizers have pieces of many spaces."""
    texts = [path.read_text() for path in Path(model.hub.convert.__file__).parent.glob("*.py")]
    train_tokenizer(
        texts, 600, tmp_path / "t.model", sample_bytes=2**20, scan_bytes=2**20,
        split_by_unicode_script=split_by_unicode_script,
    )  # fmt: skip
    ours = load_tokenizer(tmp_path / "t.model")
    sizes: dict[str, Any] = dict(vocab_size=600, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    network = ModelConfig(**sizes, positions="rope", attention=AttentionConfig(kind="softmax"))
    folder = save(tmp_path / "run", 10, Transformer(network), tokenizer=ours)
    model.export.export(folder, tmp_path / "out", torch.float32, layout="transformers")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, 600)
    for text in (*texts, " a", "  x  ", "a\tb\n\n", "größer 漢字 \U0001f680 \0", "<s> hi</s> <unk><0x0A>", ""):
        ids = theirs(text).input_ids
        assert ids == [ours.bos_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
