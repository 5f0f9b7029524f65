"""eval.calibrate and eval.search_patterns on a small model trained for a moment, and who takes their files."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval.calibrate
import eval.generate
import eval.run
import eval.search_patterns
import eval.sparse_frontier.command
from data.corpora import TextFiles
from data.prepare import prepare
from data.prepare_settings import PrepareConfig, TokenizerConfig
from data.store import TokenStore
from eval.common.windows import choose_windows
from model.checkpoint import checkpoint_folder, write_complete
from model.config import AttentionConfig, ModelConfig
from model.policies.head_patterns import read_patterns
from model.policies.thresholds import read_thresholds
from model.transformer import Transformer
from tests.eval.conftest import MakeRun, failing_line

LENGTH = 1024
KS = ["2", "4", "7"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of paragraphs with topics, each of its own words: blocks of text differ, as in natural text."""
    folder = tmp_path_factory.mktemp("calibrate_texts")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 5)) for i in range(770)]
    topics, common = [words[30 * i : 30 * i + 30] for i in range(25)], words[750:]

    def paragraph() -> str:
        topic = generator.choice(topics)
        draws = [(generator.random(), generator.random()) for _ in range(40)]
        return " ".join(generator.choice(common) if a < 0.3 else topic[int(30 * b * b)] for a, b in draws)

    for number in range(40):
        (folder / f"{number:02d}.txt").write_text("\n".join(paragraph() for _ in range(40)))
    config = PrepareConfig(
        corpus=TextFiles([str(folder / "*.txt")]),
        output=str(folder / "prepared"),
        tokenizer=TokenizerConfig(vocab_size=420),
        heldout_fraction=0.4,
        workers=1,
    )
    prepare(config, {"paths": "test"})
    return folder / "prepared"


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model after 80 steps, in which it has begun to read topics."""
    folder = tmp_path_factory.mktemp("calibrate") / "softmax"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=420, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, positions="rope",
        attention=AttentionConfig(kind="softmax"),
    )  # fmt: skip
    model, store = Transformer(config), TokenStore(texts / "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for document, start in choose_windows(store, 257, 80, 0):
        text = torch.from_numpy(store.document(document)[start : start + 257].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(model.logits(model(text[None, :-1]))[0], text[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    checkpoint = checkpoint_folder(folder, 80)
    checkpoint.mkdir(parents=True)
    weights = {f"weight/{name}": value for name, value in model.state_dict().items()}
    save_file(weights, checkpoint / "state-00000.safetensors")
    tokenizer = {"path": str(store.tokenizer_path), "fingerprint": store.fingerprint_of_tokenizer}
    write_complete(checkpoint, {"step": 80, "model": asdict(config), "tokenizer": tokenizer, "sequence_length": 256})
    return folder


def options(run: Path, texts: Path, output: Path, *more: object) -> list[str]:
    named = [str(run), "--data", str(texts), "--output", str(output), "--device", "cpu"]
    return [*named, *(str(one) for one in more)]


@pytest.fixture(scope="module")
def thresholds(run: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.safetensors"
    assert eval.calibrate.main(options(run, texts, path, "--ks", *KS, "--length", LENGTH, "--measured", 8)) == 0
    return path


def test_held_out_density_is_within_5_percent_of_the_predicted(thresholds: Path) -> None:
    values, calibration = read_thresholds(thresholds)
    assert values.shape == (3, 2, 4, LENGTH // 128)
    assert (values[0, ..., 2:] > -torch.inf).all() and (values[0, ..., :2] == -torch.inf).all()
    assert (calibration.samples, calibration.length, calibration.step) == (16, LENGTH, 80)
    assert calibration.measured is not None
    for predicted, measured in zip(calibration.predicted, calibration.measured, strict=True):
        assert abs(predicted - measured) < 0.05
    assert max(calibration.predicted) - min(calibration.predicted) > 0.4


def test_the_table_and_the_file(run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of a YAML file, a length off the blocks' grid, no measuring."""
    config = tmp_path / "calibrate.yaml"
    config.write_text("ks: [1, 3]\nlength: 700\nsamples: 2\nmeasured: 0\nestimator: pooled\n")
    path = tmp_path / "deep" / "thresholds.safetensors"
    assert eval.calibrate.main(options(run, texts, path, "--config", config)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +1 +0\.\d{3} +-", lines[1]) and re.fullmatch(r" +3 +0\.\d{3} +-", lines[2])
    assert lines[3] == f"{path}: 700 tokens, 2 samples, pooled; not measured: no held-out window"
    assert {name: tuple(one.shape) for name, one in load_file(path).items()} == {"thresholds": (2, 2, 4, 5)}


def test_evaluation_runs_under_the_thresholds(run: Path, texts: Path, thresholds: Path, tmp_path: Path) -> None:
    quick = ["--base_length", "512", "--lengths", "1", "--needle_samples", "1", "--needle_depths", "2"]
    quick += ["--max_documents", "2", "--headline_tokens", "1024"]
    pages = []
    for chosen in ([], ["--thresholds", thresholds, "--keep_blocks", 2]):
        assert eval.run.main(options(run, texts, tmp_path, *quick, *chosen)) == 0
        pages.append((tmp_path / "report.html").read_text())
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    (none, dense), (policy, sparse) = sorted((one["policy"], one["perplexity"]["by_length"]["1"]) for one in results)
    assert none == "" and policy.startswith(f"attention is Block-Sparse FlashAttention with k = 2 of {thresholds}")
    assert "density 0.34 predicted at 1024 tokens" in policy and "k = 2" not in pages[0] and "k = 2" in pages[1]
    assert dense["loss"] != sparse["loss"] and dense["tokens"] == sparse["tokens"]


def test_generation_prefills_under_the_thresholds(
    run: Path, thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is under the policy while the text comes, and only where that was asked for."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("one two three " * 40)
    seen = []
    original = eval.generate.stream

    def record(model: Transformer, prompts: Sequence[Sequence[int]], chosen: eval.generate.GenerationOptions):
        seen.append([block.attention.override is not None for block in model.layers()])
        return original(model, prompts, chosen)

    monkeypatch.setattr(eval.generate, "stream", record)
    common = [run, "--prompt_file", prompt, "--max_new_tokens", 5, "--device", "cpu"]
    sparse = ["--thresholds", thresholds, "--keep_blocks", 2]
    for arguments in (common, [*common, *sparse]):
        assert eval.generate.main([str(one) for one in arguments]) == 0
    assert seen == [[False] * 2, [True] * 2]


def test_what_cannot_be_done_is_one_line(
    run: Path, texts: Path, thresholds: Path, tmp_path: Path, make_run: MakeRun, corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    entmax, other = make_run(tmp_path / "entmax", "asentmax"), make_run(tmp_path / "other", "softmax")
    out = tmp_path / "x.safetensors"
    calibrate, generate, evaluate = eval.calibrate.main, eval.generate.main, eval.run.main
    assert "kind is 'asentmax'" in failing_line(capsys, calibrate, *options(entmax, corpus, out))
    assert "prepared with" in failing_line(capsys, calibrate, *options(run, corpus, out))
    line = failing_line(capsys, calibrate, *options(run, texts, out, "--length", 100_000))
    assert "0 windows of 100000 tokens within documents, fewer than the 16 samples" in line
    assert "samples is 0" in failing_line(capsys, calibrate, *options(run, texts, out, "--samples", 0))
    assert "ks is [4, 4]" in failing_line(capsys, calibrate, *options(run, texts, out, "--ks", 4, 4))
    assert not out.exists()
    chosen = ["--thresholds", thresholds, "--keep_blocks"]
    assert "not 5: choose" in failing_line(capsys, generate, run, "--prompt", "a", "--device", "cpu", *chosen, 5)
    assert "belongs to model" in failing_line(capsys, generate, other, "--prompt", "a", "--device", "cpu", *chosen, 4)
    assert "no run is a softmax model" in failing_line(capsys, evaluate, *options(entmax, corpus, tmp_path, *chosen, 4))
    assert "give both, or neither" in failing_line(capsys, evaluate, *options(run, texts, tmp_path, "--keep_blocks", 4))


def test_windows_lie_within_documents_and_apart(texts: Path) -> None:
    store = TokenStore(texts / "train")
    windows = choose_windows(store, 300, 10**6, 0)
    assert len(set(windows)) == len(windows) == sum(int(size) // 300 for size in store.lengths)
    assert all(start % 300 == 0 and start + 300 <= store.lengths[document] for document, start in windows)
    assert choose_windows(store, 300, 5, 0) == windows[:5] != choose_windows(store, 300, 5, 1)


def test_each_head_gets_a_pattern_that_the_frontier_takes(
    run: Path, texts: Path, tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "patterns.safetensors"
    search = options(run, texts, path, "--density", 0.2, "--length", 512, "--samples", 2)
    assert eval.search_patterns.main(search) == 0
    lines = capsys.readouterr().out.splitlines()
    policy, calibration = read_patterns(path)
    assert 0.1 < calibration.reached < 0.4
    assert policy.kinds.shape == (2, 4) and calibration.density == 0.2 and calibration.refined_length is None
    assert sum(int(line.split()[1]) for line in lines[1:-1]) == 8
    assert lines[-1] == (
        f"{path}: density {calibration.reached:.3f}, recall {calibration.recall:.3f} over 2 samples of 512 tokens"
    )
    twin = make_run(tmp_path / "entmax", "entmax", data=texts)
    frontier = ["--softmax", str(run), "--entmax", str(twin), "--data", str(texts), "--output", str(tmp_path / "out")]
    frontier += ["--base_length", "256", "--lengths", "1", "--max_documents", "2", "--decode_tokens", "2", "--device"]
    frontier += ["cpu", "--needle_samples", "1", "--needle_depths", "2", "--policies", "window", "--densities", "0.3"]
    assert eval.sparse_frontier.command.main([*frontier, "--patterns", str(path)]) == 0
    cells = json.loads((tmp_path / "out" / "sparse_frontier.json").read_text())["cells"]
    (found,) = [cell for cell in cells if cell["method"] == "minference" and cell["wanted"] == 0.3]
    assert abs(np.mean(found["density"]) - 0.3) < 0.12 and found["phase"] == "prefill"
    refine = [*search, "--refine_length", "700", "--least_recall", "0.8"]
    capsys.readouterr()
    assert eval.search_patterns.main(refine) == 0
    more, refined = read_patterns(path)
    assert (more.sizes >= policy.sizes).all() and refined.recall >= 0.8 and refined.refined_length == 700
    lines = capsys.readouterr().out.splitlines()
    assert min(float(line.split()[-1]) for line in lines[1:-1]) >= 0.8
    said = failing_line(capsys, eval.search_patterns.main, *search, "--length", "1000000")
    assert "has 0 windows of 1000000 tokens within documents, fewer than the 2 samples" in said
    said = failing_line(capsys, eval.search_patterns.main, *search, "--density", 1.5)
    assert "density is 1.5: expected at most 0.5, and at least 0.0078 at 512 tokens" in said
    said = failing_line(capsys, eval.search_patterns.main, *search, "--least_recall", 0.5)
    assert "least_recall is 0.5, but refine_length is not set" in said
    said = failing_line(capsys, eval.sparse_frontier.command.main, *frontier, "--patterns", "none")
    assert said.endswith("none does not exist; make it first: python -m eval.search_patterns ...")
