"""python -m eval.generate: what it writes, and its errors in one line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.generate
from data.tokenizer import load_tokenizer
from eval.generate import main
from eval.generation import Piece, generate
from model.config import TRAINED_SPARSE, AttentionKind
from model.export import export
from model.loading import load_model
from tests.eval.conftest import MakeRun, failing_line


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generate") / "run", "asentmax")


def expected_text(run: Path, prompt: str, **options: Any) -> str:
    loaded = load_model(run)
    tokenizer = load_tokenizer(loaded.tokenizer_path)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    one = generate(loaded.model, [ids], eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, **options)[0]
    return tokenizer.decode(one.tokens)


def test_a_process_of_its_own_writes_the_continuation(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("def é(x):\r\n".encode())
    command = [sys.executable, "-m", "eval.generate", str(run), "--prompt_file", str(file)]
    command += ["--max_new_tokens", "20", "--device", "cpu"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == expected_text(run, "def é(x):\r\n", max_new_tokens=20) + "\n"
    assert re.fullmatch(
        r"\[(length after 20|eos after \d+) tokens, \d+ prompt tokens, .* s on cpu\]\n", result.stderr.decode()
    )


def test_sampling_options_arrive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = dict(temperature=3.0, top_k=50, top_p=0.9, seed=4, chunk_tokens=3)
    arguments = [f"--{name}={value}" for name, value in sampling.items()]
    assert main([str(run), "--prompt", "", "--max_new_tokens", "30", "--device", "cpu", *arguments]) == 0
    first = capsys.readouterr().out
    assert first == expected_text(run, "", max_new_tokens=30, **sampling) + "\n"
    arguments[3] = "--seed=5"
    assert main([str(run), "--prompt", "", "--max_new_tokens", "30", "--device", "cpu", *arguments]) == 0
    assert capsys.readouterr().out != first


def test_an_exported_model_in_bfloat16(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "exported", torch.bfloat16)
    arguments = ["--prompt", "if", "--max_new_tokens", "5", "--device", "cpu", "--precision"]
    for precision in ("float32", "bfloat16"):
        assert main([str(tmp_path / "exported"), *arguments, precision]) == 0
        assert "after 5 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TRAINED_SPARSE)
def test_what_is_trained_sparse_writes_what_full_passes_give(
    kind: AttentionKind, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedily, through edges of blocks, and where more tokens stand than are chosen."""
    run = make_run(tmp_path / kind, kind, init_std=0.2)
    prompt = "def index(path): " * 3
    arguments = [str(run), "--prompt", prompt, "--max_new_tokens", "40", "--device", "cpu"]
    assert main([*arguments, "--temperature", "0", "--chunk_tokens", "17"]) == 0
    loaded = load_model(run)
    tokenizer = load_tokenizer(loaded.tokenizer_path)
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids = list(start)
    while len(ids) < len(start) + 40 and ids[-1] != tokenizer.eos_id:
        logits = loaded.model.logits(loaded.model(torch.tensor([ids]))[0, -1])
        ids.append(int(logits[: tokenizer.vocab_size].argmax()))
    assert len(ids) > len(start) + 20
    assert capsys.readouterr().out == tokenizer.decode(ids[len(start) :]) + "\n"


def test_characters_of_several_tokens_are_written_whole(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write is part of the text: no half of a character, nothing twice. What stays incomplete is U+FFFD."""
    tokenizer = load_tokenizer(load_model(run).tokenizer_path)
    text = "x 漢字 = 'ñ€😀' ▁"
    ids = [*tokenizer.encode(text), *tokenizer.encode("漢")[:2]]
    assert len(tokenizer.encode("漢")) == 3
    written: list[str] = []

    def pieces(*_: object) -> Iterator[Piece]:
        for i, token in enumerate(ids):
            yield Piece(0, [token], "length" if i == len(ids) - 1 else None)
            written.append(capsys.readouterr().out)

    monkeypatch.setattr(eval.generate, "stream", pieces)
    assert main([str(run), "--prompt", "", "--device", "cpu"]) == 0
    assert "".join(written) == text + "\N{REPLACEMENT CHARACTER}"
    assert "漢" in written and "😀" in written and "" in written


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = (run, "--device", "cpu")
    assert "either --prompt or --prompt_file" in failing_line(capsys, main, *checkpoint)
    assert "either --prompt or" in failing_line(capsys, main, *checkpoint, "--prompt", "a", "--prompt_file", "b")
    assert "no such folder" in failing_line(capsys, main, tmp_path / "x", "--prompt", "a", "--device", "cpu")
    assert "nothing.txt" in failing_line(capsys, main, *checkpoint, "--prompt_file", tmp_path / "nothing.txt")
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert "latin is not UTF-8" in failing_line(capsys, main, *checkpoint, "--prompt_file", tmp_path / "latin")
    assert "temperature is -1.0" in failing_line(capsys, main, *checkpoint, "--prompt", "a", "--temperature=-1")
    long = failing_line(capsys, main, *checkpoint, "--prompt", "#" * 50, "--max_prompt_tokens", 10)
    assert re.search(r"prompt 0 has \d+ tokens, max_prompt_tokens is 10", long)
    assert "device is 'tpu'" in failing_line(capsys, main, run, "--prompt", "a", "--device", "tpu")
    assert "temprature" in failing_line(capsys, main, *checkpoint, "--prompt", "a", "--temprature", "1")


def test_the_tokenizer_must_be_the_models(
    run: Path, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(run)
    arguments = ("--prompt", "a", "--max_new_tokens", 2, "--device", "cpu")
    other = make_run(tmp_path / "other", "softmax", fingerprint="0" * 64)
    assert "was trained with 000000000000" in failing_line(capsys, main, other, *arguments)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    marker = moved / "checkpoints/step-00000007/complete.json"
    content = json.loads(marker.read_text().replace(loaded.tokenizer_path, str(tmp_path / "gone.model")))
    del content["checksum"]  # as the error line says of a change by hand
    marker.write_text(json.dumps(content))
    line = failing_line(capsys, main, moved, *arguments)
    assert "gone.model" in line and "say where it is with --tokenizer" in line
    assert main([str(moved), "--tokenizer", loaded.tokenizer_path, *map(str, arguments)]) == 0
