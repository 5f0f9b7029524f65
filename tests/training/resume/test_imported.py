"""A model of the Hugging Face hub, trained on: converted to entmax it starts where softmax stands, and resumes."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import model.hub.convert
from data.prepare import main as prepare
from model.checkpoint import resolve_checkpoint
from tests.hub_tokenizers import END, byte_level
from tests.hub_tokenizers import save as save_tokenizer
from tests.model.hub.test_architecture import config
from tests.training.conftest import TrainProcess, logged

Imported = tuple[Path, tuple[object, ...]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """A Llama whose attention matters, as a run; options of train.py on drawn texts in its tokens."""
    root = tmp_path_factory.mktemp("imported")
    save_tokenizer(root / "hub", byte_level([END]), bos_token=END, eos_token=END)
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(config("llama", vocab_size=512))
    with torch.no_grad():
        for weight in network.parameters():  # scores of a few units
            weight.add_(torch.randn_like(weight) * 0.3)
    network.save_pretrained(root / "hub")
    assert model.hub.convert.main([str(root / "hub"), "--output", str(root / "run")]) == 0
    words, generator = ["def", "return", "value", "index", "for", "range", "self", "items", "path"], random.Random(0)
    for number in range(20):
        text = "\n".join(" ".join(generator.choices(words, k=6)) for _ in range(150))
        (root / f"{number:02d}.txt").write_text(text)
    texts, prepared = str(root / "*.txt"), root / "prepared"
    prepare(
        [
            "--corpus=data.corpora.TextFiles", f"--corpus.paths=[{texts}]", f"--output={prepared}",
            f"--tokenizer.path={root / 'run'}", "--heldout_fraction=0.2", "--workers=1",
        ]
    )  # fmt: skip
    options = (
        "--data.sources", f"[{{path: {prepared}}}]", "--init_from", root / "run", "--resume", "auto",
        "--trainer.log_every_n_steps", 1, "--checkpoint.every_n_steps", 3, "--model.optimizer.lr", 1e-4,
    )  # fmt: skip
    return root / "run", options


def test_conversion_starts_at_softmax_and_resumes(train: TrainProcess, imported: Imported, tmp_path: Path) -> None:
    run, options = imported
    network, convert = run / "network.yaml", "configs/stages/from_softmax.yaml"

    def losses_of(
        name: str, steps: int, *more: object, configs: tuple[object, ...] = (network, convert)
    ) -> list[float]:
        done = train("--run_dir", tmp_path / name, "--trainer.max_steps", steps, *options, *more, configs=configs)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        return [loss for loss, _ in logged(tmp_path / name).values()]

    said: list[str] = []
    softmax = losses_of("softmax", 3, configs=(network,))
    whole = losses_of("whole", 8)
    at_once = losses_of("at_once", 3, "--model.network.attention.anneal_steps", 0)
    assert whole[0] == pytest.approx(softmax[0], rel=0.01)
    assert abs(whole[0] - softmax[0]) < abs(at_once[0] - softmax[0]), (softmax[0], whole[0], at_once[0])
    killed = train(
        "--run_dir", tmp_path / "parts", "--trainer.max_steps", 8, *options,
        "--trainer.callbacks", "[{class_path: tests.training.faults.callbacks.KillAfterStep, init_args: {step: 4}}]",
        configs=(network, convert),
    )  # fmt: skip
    assert resolve_checkpoint(tmp_path / "parts").step == 3, killed.stderr
    parts = losses_of("parts", 8)
    assert "resuming from" in said[-1] and len(parts) == len(whole) == 8
    assert parts == whole
