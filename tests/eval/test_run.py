import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval.held_out.measurement
import eval.run
from data.store import TokenStore
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, choose_autocast, find_subjects
from eval.held_out.attention_profile import LayerProfile, measure_attention
from eval.held_out.config import EvalConfig
from eval.reporting.document import Heading
from eval.reporting.html_page import write_page
from eval.run import main
from model.checkpoint import resolve_checkpoint
from model.config import AttentionKind
from model.flops import density
from model.loading import load_model
from tests.eval.conftest import BASE_LENGTH, MakeRun, failing_line

QUICK = ["--headline_tokens", "600", "--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2"]


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(make_run(folder / kind, kind)) for kind in ("asentmax", "softmax")]


def options(corpus: Path, output: Path) -> list[str]:
    return ["--data", str(corpus), "--output", str(output), "--device", "cpu", *QUICK]


def test_runs_that_were_measured_one_by_one_are_compared_by_the_command_of_all(
    corpus: Path, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in runs:
        assert main([run, *options(corpus, tmp_path)]) == 0
    capsys.readouterr()
    assert main([*runs, *options(corpus, tmp_path)]) == 0
    assert capsys.readouterr().err.count("reusing") == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["label"] for run in report["runs"]] == ["asentmax", "softmax"] and report["pairs"]


def test_twins_are_compared_and_a_second_run_reuses_every_result(
    corpus: Path, runs: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*runs, *options(corpus, tmp_path)]) == 0
    first = json.loads((tmp_path / "report.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and printed[-1].endswith(str(tmp_path / "report.html"))
    assert [run["label"] for run in first["runs"]] == ["asentmax", "softmax"]
    # Untrained models know nothing: about log2(420) bits for each token.
    for run in first["runs"]:
        assert run["perplexity"]["value"] == pytest.approx(420, rel=0.2)
        assert [score["multiple"] for score in run["lengths"]] == [1, 2]
    assert first["pairs"][0]["baseline"] == "softmax"
    shares = [layer["live_share"] for layer in first["measurements"][0]["attention"]]
    assert len(shares) == 4 and all(0 < share <= 1 for layer in shares for share in layer)
    for one in first["measurements"]:
        for layer in one["attention"]:
            assert all(0 < share <= 1 for share in layer["relative_entropy"] + layer["sink_share"])

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(eval.held_out.measurement, "measure", refuse)
    assert main([*runs, *options(corpus, tmp_path)]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["runs"] == first["runs"] and again["measurements"] == first["measurements"]
    with pytest.raises(AssertionError, match="measured again"):
        main([*runs, *options(corpus, tmp_path), "--seed", "1"])


@pytest.mark.parametrize("kind", ["nsa", "dsa"])
def test_a_density_in_place_of_a_profile(
    kind: AttentionKind, corpus: Path, make_run: MakeRun, runs: list[str], tmp_path: Path
) -> None:
    run = str(make_run(tmp_path / kind, kind))
    network = load_model(run).config
    read = ", ".join(f"{100 * density(network, [n]):.1f} % at {n} tokens" for n in (BASE_LENGTH, 2 * BASE_LENGTH))
    size, value = {"nsa": ("nsa.window", 512), "dsa": ("dsa.index_heads", 4)}[kind]
    for compared, profiled in (([runs[1], run], ["softmax"]), ([run], [])):
        output = tmp_path / f"report-{len(compared)}"
        assert main([*compared, *options(corpus, output)]) == 0
        text, found = (output / "report.md").read_text(), json.loads((output / "report.json").read_text())
        assert f"{kind} is not in this part: of {kind} it knows no weights" in text and read in text
        assert [one["label"] for one in found["measurements"] if one["attention"]] == profiled
        assert f"attention.{size}" not in text or f"| model.network.attention.{size} | – | {value} |" in text


def test_hierarchical_entmax_has_a_profile(corpus: Path, make_run: MakeRun, runs: list[str], tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "hierarchical", "hierarchical", init_std=0.5))
    assert main([run, runs[1], *options(corpus, tmp_path / "report")]) == 0
    text, found = (tmp_path / "report/report.md").read_text(), json.loads((tmp_path / "report/report.json").read_text())
    assert "is not in this part" not in text and "Alpha of every head by layer." in text
    ours, softmax = (one["attention"] for one in found["measurements"])
    for layer, dense in zip(ours, softmax, strict=True):
        assert all(abs(alpha - 1.5) < 1e-6 for alpha in layer["alpha"])
        pairs = list(zip(layer["support"], dense["support"], strict=True))
        assert all(1 <= own <= every for own, every in pairs)
    assert min(min(layer["live_share"]) for layer in ours) < 1


def test_dms_is_profiled_without_alphas(corpus: Path, make_run: MakeRun, runs: list[str], tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "dms", "dms", init_std=0.5))
    assert main([run, runs[1], *options(corpus, tmp_path / "report")]) == 0
    text, found = (tmp_path / "report/report.md").read_text(), json.loads((tmp_path / "report/report.json").read_text())
    assert "is not in this part" not in text and "Alpha of every head" not in text
    assert "Support size and share of live tiles" in text
    ours, softmax = (one["attention"] for one in found["measurements"])
    for layer, dense in zip(ours, softmax, strict=True):  # W = 0: nothing is evicted
        assert layer["alpha"] is None and layer["support"] == pytest.approx(dense["support"])


def test_a_changed_checkpoint_is_measured_again_and_the_same_one_gives_the_same_numbers(
    corpus: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "softmax")
    arguments = [str(run), *options(corpus, tmp_path / "report")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "report/report.json").read_text())["runs"]
    checkpoint = run / "checkpoints/step-00000007"
    shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "copy", checkpoint, copy_function=shutil.copyfile)
    assert main(arguments) == 0
    assert len(list((tmp_path / "report/results").iterdir())) == 2
    assert json.loads((tmp_path / "report/report.json").read_text())["runs"] == first


def test_a_missing_run_and_one_without_a_checkpoint(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    assert "absent: no such folder" in failing_line(
        capsys, main, tmp_path / "absent", *options(corpus, tmp_path / "out")
    )
    (tmp_path / "empty/checkpoints/step-00000003").mkdir(parents=True)
    line = failing_line(capsys, main, str(tmp_path / "empty"), *options(corpus, tmp_path / "out"))
    assert "no complete checkpoint" in line and "step-00000003" in line


def test_a_tokenizer_that_does_not_match_the_data(corpus: Path, make_run: MakeRun, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "other", "softmax", fingerprint="0" * 64)
    line = failing_line(capsys, main, str(run), *options(corpus, tmp_path / "out"))
    assert "was trained with tokenizer 000000000000" in line and "pass the --data folder" in line


def test_data_that_is_not_there(corpus: Path, runs: list[str], tmp_path: Path, capsys: Any) -> None:
    arguments = options(corpus, tmp_path)
    arguments[1] = str(tmp_path / "nothing")
    assert "nothing/manifest.json does not exist" in failing_line(capsys, main, runs[0], *arguments)


def test_documents_too_short_for_every_length(corpus: Path, runs: list[str], tmp_path: Path, capsys: Any) -> None:
    longest = int(TokenStore(corpus / "heldout").lengths.max())
    line = failing_line(capsys, main, runs[0], *options(corpus, tmp_path), "--base_length", "100000")
    assert f"the longest document has {longest}" in line


def test_documents_too_short_for_some_lengths_are_noted(corpus: Path, runs: list[str], tmp_path: Path) -> None:
    arguments = options(corpus, tmp_path)
    arguments[arguments.index("--lengths") :] = ["--lengths", "1", "64"]
    assert main([runs[1], *arguments]) == 0
    assert "64x (8192 tokens) is not measured" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (["--lengths", "2", "3"], "lengths has 2 before 3"),
        (["--lengths", "0"], r"lengths is \[0\]"),
        (["--max_documents", "1"], "max_documents is 1: expected at least 2"),
        (["--seed", "three"], "seed"),
        (["--sed", "3"], "sed"),
        (["--device", "tpu9"], "device is 'tpu9': expected auto, cpu, cuda"),
        (["--device", "cuda:99"], "torch finds [0-9]+ CUDA devices"),
    ],
)
def test_bad_options(extra: list[str], wanted: str, corpus: Path, runs: list[str], tmp_path: Path, capsys: Any) -> None:
    line = failing_line(capsys, main, runs[0], *options(corpus, tmp_path), *extra)
    assert re.search(wanted, line), line


def test_runs_of_different_training_lengths_need_a_base_length(
    corpus: Path, make_run: MakeRun, tmp_path: Path, capsys: Any
) -> None:
    runs = [make_run(tmp_path / name, "softmax", step) for name, step in (("a", 3), ("b", 4))]
    marker = runs[1] / "checkpoints/step-00000004/complete.json"
    content = json.loads(marker.read_text()) | {"sequence_length": 64}
    del content["checksum"]
    marker.write_text(json.dumps(content))
    line = failing_line(capsys, main, *map(str, runs), *options(corpus, tmp_path / "out"))
    assert "(a 128, b 64): say which is 1x with --base_length" in line
    assert main([*map(str, runs), *options(corpus, tmp_path / "out"), "--base_length", "128"]) == 0
    assert "Trained at 64 and 128 tokens, 1x is 128: a (softmax" in capsys.readouterr().out


def test_labels_tell_runs_apart(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "x/run", "softmax", 3), make_run(tmp_path / "y/run", "softmax", 3)
    other = make_run(tmp_path / "x/other", "softmax", 4)
    assert [s.label for s in find_subjects([str(first), str(other)])] == ["run", "other"]
    earlier, later = first / "checkpoints/step-00000003", other / "checkpoints/step-00000004"
    shutil.copytree(later, first / "checkpoints/step-00000004")
    assert [s.label for s in find_subjects([str(first), str(earlier)])] == ["run@4", "run@3"]
    shutil.rmtree(first / "checkpoints/step-00000004")
    assert [s.label for s in find_subjects([str(first), str(second)])] == ["x-run@3", "y-run@3"]
    with pytest.raises(ValueError, match="given twice"):
        find_subjects([str(first), str(first / "checkpoints/step-00000003")])


def test_autocast_follows_the_run_on_cuda_alone(runs: list[str]) -> None:
    subject = Subject("x", resolve_checkpoint(runs[0]))
    config = Path(runs[0]) / "config.yaml"
    before = config.read_text()
    try:
        config.write_text("trainer:\n  precision: bf16-mixed\n")
        assert choose_autocast("auto", subject, torch.device("cuda")) is torch.bfloat16
        assert choose_autocast("auto", subject, torch.device("cpu")) is None
        assert choose_autocast("bfloat16", subject, torch.device("cpu")) is torch.bfloat16
        config.write_text("trainer:\n  precision: 32-true\n")
        assert choose_autocast("auto", subject, torch.device("cuda")) is None
    finally:
        config.write_text(before)


def test_attention_statistics_are_means_over_documents(corpus: Path, runs: list[str]) -> None:
    store, model = TokenStore(corpus / "heldout"), load_model(runs[0]).model
    documents = np.flatnonzero(store.lengths > 2 * BASE_LENGTH)[:2].tolist()
    runtime, config = Runtime(torch.device("cpu"), None, 512), EvalConfig(profile_queries=16)

    def profile(chosen: list[int]) -> list[LayerProfile]:
        return measure_attention(model, store, chosen, [1, 2], BASE_LENGTH, config, runtime, "test")

    both, first, second = profile(documents), profile(documents[:1]), profile(documents[1:])
    assert [(one.multiple, one.layer) for one in both] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for mean, a, b in zip(both, first, second, strict=True):
        for name in ("support", "live_share", "temperature", "entropy", "relative_entropy", "sink_share"):
            np.testing.assert_allclose(
                getattr(mean, name), (np.array(getattr(a, name)) + getattr(b, name)) / 2, rtol=1e-6, err_msg=name
            )
        assert all(1 <= keys <= mean.multiple * BASE_LENGTH for keys in mean.support)
        assert mean.alpha == pytest.approx([1.5, 1.5], abs=1e-4)


def test_the_page_of_another_report_is_not_written_over(
    corpus: Path, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_page(tmp_path, "LongSplash tasks", "x", [Heading("x", 1)])
    before = (tmp_path / "report.html").read_bytes()
    assert "has the page of another report, LongSplash tasks" in failing_line(
        capsys, main, *runs, *options(corpus, tmp_path)
    )
    assert (tmp_path / "report.html").read_bytes() == before and not (tmp_path / "results").exists()
