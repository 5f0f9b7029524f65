"""Exported entmax models in transformers: logits, gradients and answers of ours, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import longsplash.hub  # noqa: F401 — registers
import model.export
import model.hub.convert
from data.tokenizer import load_tokenizer
from eval.generation import generate
from model.config import AttentionConfig, ModelConfig, RopeScaling
from model.hub.weights import hub_name
from model.loading import load_model
from model.transformer import Transformer
from tests.hub_tokenizers import END, byte_level
from tests.hub_tokenizers import save as save_tokenizer
from tests.model.test_checkpoint import save
from tests.training.conftest import ROOT

SIZES: dict[str, Any] = dict(vocab_size=512, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "asentmax": (dict(positions="nape"), dict(kind="asentmax")),
    "exponential slopes": (dict(positions="nape", nape_slopes="exp"), dict(kind="entmax", learn_alpha=False)),
    "rope": (
        dict(positions="rope", n_kv_heads=4),
        dict(kind="asentmax", temperature_offset=0.5, temperature_range=1.0),
    ),
    "wide heads": (dict(positions="rope", head_dim=16, qk_norm=True, tie_embeddings=False), dict(kind="entmax")),
    "qkv_bias": (dict(positions="rope", qkv_bias=True, norm_eps=1e-3), dict(kind="asentmax", alpha_max=1.6)),
    "window": (dict(positions="nape", window=7), dict(kind="asentmax")),
    "rope window": (dict(positions="rope", window=7), dict(kind="entmax", alpha=1.2)),
    "no positions": (dict(positions="nope"), dict(kind="asentmax")),
    "without rope in a layer": (dict(positions="rope", nope_layers=[1]), dict(kind="asentmax")),
    "yarn": (
        dict(positions="rope", rope_scaling=RopeScaling("yarn", factor=2.0, original_length=16, high_turns=32.0)),
        dict(kind="asentmax"),
    ),
    "dynamic": (
        dict(positions="rope", rope_scaling=RopeScaling("dynamic", factor=2.0, original_length=16)),
        dict(kind="asentmax"),
    ),
    "annealing": (dict(positions="rope"), dict(kind="entmax", anneal_steps=40, anneal_from=1.05)),
    "annealing a number": (dict(positions="rope"), dict(kind="entmax", anneal_steps=40, learn_alpha=False)),
}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = ["def f(x):", "a", "import os\nimport sys\n", "class A:\n    def g(self):", "x = 1", "", "for i in", "\n\n# "]


def stored(folder: Path, name: str) -> Path:
    """A run of a random model, at step 10."""
    options, attention = MODELS[name]
    torch.manual_seed(0)
    ours = Transformer(ModelConfig(**{**SIZES, **options}, attention=AttentionConfig(**attention)))
    with torch.no_grad():
        for weight in ours.parameters():  # norms, biases, alphas as well
            weight.add_(torch.randn_like(weight) * 0.2)
    tokenizer = load_tokenizer(save_tokenizer(folder / "tokenizer", byte_level([END]), bos_token=END, eos_token=END))
    save(folder / "run", 10, ours, tokenizer=tokenizer)
    return folder / "run"


def exported(folder: Path, name: str = "asentmax", dtype: str = "float32") -> tuple[Any, Path]:
    """Ours, as loaded, and the folder for transformers."""
    run = stored(folder, name)
    arguments = [str(run), str(folder / "out"), "--format", "transformers", "--dtype", dtype]
    assert model.export.main(arguments) == 0
    return load_model(run).model, folder / "out"


@pytest.fixture(scope="module")
def asentmax(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return exported(tmp_path_factory.mktemp("asentmax"))


def ids(tokens: int = 40, rows: int = 2) -> Tensor:
    return torch.randint(256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def ours_on(device: str, ours: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Our logits and the gradients of their mean square, computed on a device, by transformers' names."""
    ours = ours.to(device)
    ours.zero_grad()
    logits = ours.logits(ours(tokens.to(device)))
    logits.square().mean().backward()
    gradients = {hub_name(key): weight.grad for key, weight in ours.named_parameters()}
    return logits.detach().cpu(), {key: None if x is None else x.detach().cpu() for key, x in gradients.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dynamic"])  # has a test of its own
def test_logits_and_gradients_are_ours(name: str, device: str, tmp_path: Path) -> None:
    ours, folder = exported(tmp_path, name)
    theirs = AutoModelForCausalLM.from_pretrained(folder).to(device)
    assert type(theirs).__name__ == "LongSplashForCausalLM" and theirs.dtype == torch.float32
    tokens = ids()
    plain, plain_gradients = ours_on("cpu", ours, tokens)
    expected, gradients = ours_on(device, ours, tokens)
    found = theirs(tokens.to(device)).logits
    lost = (expected - plain).abs().max()  # float32 on that device: its products add up in another order
    assert lost <= 2e-4 * plain.std()
    assert (found.cpu() - expected).abs().max() <= 1e-5 * plain.std() + 3 * lost
    found.square().mean().backward()
    weights = dict(theirs.named_parameters())
    assert weights.keys() - gradients.keys() == set()
    for key, grad in gradients.items():
        mine = weights[key].grad
        assert grad is not None and mine is not None, key
        lost = (grad - plain_gradients[key]).norm()
        assert lost <= 2e-3 * grad.norm(), key
        assert (mine.cpu() - grad).norm() <= 1e-4 * grad.norm() + 3 * lost, key


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("annealing")])
@torch.no_grad()
def test_a_folder_becomes_the_run_again(name: str, tmp_path: Path) -> None:
    ours, folder = exported(tmp_path, name)
    assert model.hub.convert.main([str(folder), "--output", str(tmp_path / "again")]) == 0
    again = load_model(tmp_path / "again")
    assert again.config == ours.config
    assert torch.equal(again.model(ids()), ours(ids()))


def test_an_alpha_on_its_way_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = exported(tmp_path, "annealing")
    capsys.readouterr()
    assert model.hub.convert.main([str(folder), "--output", str(tmp_path / "again")]) == 2
    line = capsys.readouterr().err.strip()
    assert "alpha_progress in config.json is 0.25" in line and "start from the run itself" in line and "\n" not in line


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", ["asentmax", "rope window", "annealing a number"])
@torch.no_grad()
def test_padded_prompts_are_answered_as_ours(name: str, device: str, tmp_path: Path) -> None:
    """Eight prompts of different lengths in one batch, padded on the left, against eval.generation's answers."""
    ours, folder = exported(tmp_path, name)
    ours, theirs = ours.to(device), AutoModelForCausalLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token=END)
    own = load_tokenizer(str(folder / "tokenizer.json"))
    prompts = [[own.bos_id, *own.encode(prompt)] for prompt in PROMPTS]
    expected = [answer.tokens for answer in generate(ours, prompts, max_new_tokens=12)]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    assert batch.attention_mask.min() == 0
    out = theirs.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert out[:, batch.input_ids.shape[1] :].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("tokens", [15, 16, 20])
def test_dynamic_positions_remember_no_longer_text(tokens: int, tmp_path: Path) -> None:
    """Of the original length, one less and more."""
    ours, folder = exported(tmp_path, "dynamic")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    expected = ours.logits(ours(ids(tokens)))
    for text in (ids(40), ids(tokens)):
        found = theirs(text, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


@torch.no_grad()
def test_positions_count_real_tokens(asentmax: tuple[Any, Path]) -> None:
    """The temperature needs them, also where a caller gives a padding mask alone."""
    theirs = AutoModelForCausalLM.from_pretrained(asentmax[1])
    tokens = ids(12, rows=1)
    padded = torch.cat([tokens.new_zeros(1, 5), tokens], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    expected = theirs(tokens).logits
    assert (theirs(padded, attention_mask=mask).logits[:, 5:] - expected).abs().max() <= 1e-5 * expected.std()


def test_saved_again_and_loaded_by_name(asentmax: tuple[Any, Path], tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(asentmax[1])
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    written, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", asentmax[1]))
    assert {key: written[key] for key in first} == first
    base = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(base(ids()).last_hidden_state, theirs.model(ids()).last_hidden_state)
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print(type(model).__module__, model.config.alpha, model.config._attn_implementation)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again"), str(tmp_path / "third")]
    path = os.pathsep.join([str(ROOT), *sys.path])  # a PYTHONPATH of before may hold transformers
    environment = dict(os.environ, PYTHONPATH=path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].split() == ["longsplash.hub", "1.5", "entmax"]
    files = ["config.json", "generation_config.json", "model.safetensors", "modeling_longsplash.py"]
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == files


def test_bfloat16(tmp_path: Path) -> None:
    ours, folder = exported(tmp_path, dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    tokens = ids()
    expected = ours.logits(ours(tokens)).detach()
    plain = ours.to(torch.bfloat16)
    lost = (plain.logits(plain(tokens)).float() - expected).norm()
    assert (theirs(tokens).logits.float() - expected).norm() <= 2 * lost


@torch.no_grad()
def test_other_attention_is_refused(asentmax: tuple[Any, Path]) -> None:
    for kind in ("eager", "sdpa"):
        with pytest.raises(ValueError, match=f"trained with entmax attention, got attn_implementation='{kind}'"):
            AutoModelForCausalLM.from_pretrained(asentmax[1], attn_implementation=kind)
    longsplash.register(alpha=1.9, name="entmax-torch", backend="torch")
    theirs = AutoModelForCausalLM.from_pretrained(asentmax[1], attn_implementation="entmax-torch")
    expected = AutoModelForCausalLM.from_pretrained(asentmax[1])(ids()).logits
    assert (theirs(ids()).logits - expected).abs().max() <= 1e-5 * expected.std()  # with its own alpha
    with pytest.raises(ValueError, match="model has an alpha already"):
        longsplash.add_alpha(theirs)


def test_fresh_models_start_as_configured() -> None:
    config = longsplash.hub.LongSplashConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, positions="nape", adaptive_temperature=True, temperature_bias=-3.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    assert attention.entmax_alpha().tolist() == pytest.approx([1.5] * 4)
    assert attention.temperature.beta.bias.tolist() == [-3.0] * 2


def test_the_card_says_how_to_load(asentmax: tuple[Any, Path]) -> None:
    card = (asentmax[1] / "README.md").read_text()
    assert "import longsplash.hub" in card
    assert "alpha-entmax attention (alpha per head learned from 1.5 on) and the adaptive temperature" in card
    code = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(asentmax[1])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert ended.returncode and "trust_remote_code=True" in ended.stderr
