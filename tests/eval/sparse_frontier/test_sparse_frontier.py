"""The comparison of policies with the entmax twin, on tiny checkpoints."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import eval.calibrate
import eval.sparse_frontier.measure
from eval.common.scoring import Context, Runtime, score
from eval.common.subjects import find_subjects
from eval.held_out.texts import open_held_out
from eval.sparse_frontier.command import differences, main
from eval.sparse_frontier.config import PHASES, FrontierConfig
from eval.sparse_frontier.measure import Measuring
from eval.sparse_frontier.tasks import Scorer, decode, entmax_density, make_tasks, set_density
from kernels import entmax_attention
from model.config import AttentionConfig, ModelConfig, RopeScaling
from model.loading import load_model
from model.policies.families import FAMILIES, policy_at
from model.policies.minference import BlockSparse
from model.policies.quest import Quest
from model.policies.window import SlidingWindow
from model.transformer import Transformer
from tests.eval.conftest import BASE_LENGTH, MakeRun, tracked_tables
from tests.eval.reporting.pages import check_html

QUICK = ["--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2", "--decode_tokens", "3", "--timed_runs", "1"]
RUNTIME = Runtime(torch.device("cpu"), None, 8192)


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("frontier_runs")
    return {kind: make_run(folder / kind, kind) for kind in ("softmax", "asentmax")}


def options(corpus: Path, runs: dict[str, Path], output: Path) -> list[str]:
    named = ["--softmax", str(runs["softmax"]), "--entmax", str(runs["asentmax"])]
    return [*named, "--data", str(corpus), "--output", str(output), "--device", "cpu", *QUICK]


def load(run: Path) -> Transformer:
    return load_model(run / "checkpoints/step-00000007", torch.device("cpu")).model


def test_all_policies_beside_both_models(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*options(corpus, runs, tmp_path), "--densities", "0.5", "1", "--lengths", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[-1].endswith("report.html")
    assert "of the keys and is not told apart from dense" in check_html(Path(printed[-1][8:]).read_text()).texts["p"][0]
    report = json.loads((tmp_path / "sparse_frontier.json").read_text())
    cells = {(c["method"], c["phase"], c["wanted"]): c for c in report["cells"]}
    assert {method for method, _, _ in cells} == {"dense", "entmax", *FAMILIES}
    for phase in ("prefill", "decode"):
        own = round(float(np.mean(cells["entmax", phase, None]["density"])), 4)
        assert {wanted for method, where, wanted in cells if (method, where) == ("window", phase)} == {0.5, own, 1.0}
        dense = cells["dense", phase, None]
        assert np.mean(dense["density"]) == 1
        assert 0 < np.mean(cells["entmax", phase, None]["density"]) <= 1
        for (method, where, wanted), cell in cells.items():
            if where != phase or wanted in (None, own):
                continue
            if wanted == 1:  # equal to dense attention
                assert np.mean(cell["density"]) == 1, method
                np.testing.assert_allclose(cell["loss"], dense["loss"], rtol=1e-4)
                assert cell["needles"] == dense["needles"] and cell["several"] == dense["several"]
            else:
                assert 0.3 < np.mean(cell["density"]) < 0.8, (method, where)
    assert all(
        (tmp_path / f"plots/{name}.png").is_file() for name in ("prefill_over_density", "decode_density_by_head")
    )
    assert "SpargeAttention" in (tmp_path / "sparse_frontier.md").read_text()

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(eval.sparse_frontier.measure, "make_tasks", refuse)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "sparse_frontier.json").read_text())["cells"] == report["cells"]
    with pytest.raises(AssertionError, match="measured again"):
        main([*arguments, "--seed", "1"])


def test_cells_and_prefill_times_in_wandb(corpus: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--densities", "0.5", "--lengths", "1", "--policies", "window", "--wandb.mode", "offline"]
    assert main([*options(corpus, runs, tmp_path), *arguments]) == 0
    tables = tracked_tables(tmp_path)
    assert set(tables) == {"cells", "prefill_times"}  # no RULER was asked for
    report = json.loads((tmp_path / "sparse_frontier.json").read_text())
    for found, summary, cell in zip(tables["cells"], report["summaries"], report["cells"], strict=True):
        for name in ("method", "phase", "multiple", "wanted", "policy", "density", "tile_density"):
            assert found[name] == summary[name], name
        assert (found["run"], found["context"]) == (cell["label"], BASE_LENGTH)
        assert found["scored_tokens"] == sum(cell["tokens"])
        pairs = {"perplexity": "perplexity", "perplexity_ratio": "ratio", "needle_token_accuracy": "needles"}
        for column, name in (pairs | {"control_token_accuracy": "chance"}).items():
            ends = [None] * 3 if summary[name] is None else [summary[name][key] for key in ("value", "low", "high")]
            assert [found[f"{column}{end}"] for end in ("", "_low", "_high")] == ends, column
    for found, time in zip(tables["prefill_times"], report["times"], strict=True):
        assert found["milliseconds"] == found["milliseconds_longest"] == 1e3 * time["seconds"][0]
        assert (found["run"], found["method"], found["timed_runs"]) == (time["label"], time["method"], 1)
    drawn = {path.name.rsplit("_", 2)[0] for path in (tmp_path / "wandb").rglob("images/**/*.png")}
    assert drawn == {f"{phase}_{name}" for phase in PHASES for name in ("over_density", "density_by_head")}


def test_bsfa_is_compared_at_the_densities_of_its_thresholds(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "thresholds.safetensors"
    calibration = [str(runs["softmax"]), "--data", str(corpus), "--output", str(path), "--device", "cpu"]
    calibration += ["--length", "256", "--samples", "4", "--measured", "0", "--ks"]
    assert eval.calibrate.main([*calibration, "1", "2"]) == 0
    arguments = [*options(corpus, runs, tmp_path), "--lengths", "2", "--densities", "0.5", "--policies", "window"]
    arguments += ["--thresholds", str(path)]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "sparse_frontier.json").read_text())
    cells = {(c["method"], c["phase"], c["wanted"]): c for c in report["cells"]}
    # of 256 tokens the last 128 see two earlier blocks of 64; k = 1 keeps one of them
    one = 1 - 64 * 128 / (256 * 257 / 2)
    assert [key for key in cells if key[0] == "bsfa"] == [("bsfa", "prefill", one), ("bsfa", "prefill", 1)]
    assert cells["bsfa", "prefill", 1]["loss"] == pytest.approx(cells["dense", "prefill", None]["loss"], rel=1e-4)
    assert np.mean(cells["bsfa", "prefill", 1]["density"]) == 1
    assert one - 0.1 < np.mean(cells["bsfa", "prefill", one]["density"]) < 1
    assert "BSFA" in (tmp_path / "sparse_frontier.md").read_text()

    assert eval.calibrate.main([*calibration, "2"]) == 0  # another file of this name: bsfa is measured again, no other
    measured = []
    real = Measuring._measure

    def counting(self: Measuring, method: str, *rest: Any) -> Any:
        measured.append(method)
        return real(self, method, *rest)

    monkeypatch.setattr(Measuring, "_measure", counting)
    assert main(arguments) == 0
    assert measured == ["bsfa"]
    capsys.readouterr()
    assert main([*arguments, "--thresholds", str(tmp_path / "none")]) == 2
    assert "make it first" in capsys.readouterr().err


def test_times_are_of_policies_that_skip_work_at_their_setting(
    corpus: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the policy as it is at the length of the text, and of its device and model; those of decoding never."""
    asked = []

    def faster(self: Any, device: torch.device, config: ModelConfig) -> bool:
        asked.append((self, device.type, config.window))
        return True

    for kind in (BlockSparse, Quest):
        monkeypatch.setattr(kind, "faster", faster)
    timed: list[Any] = []
    monkeypatch.setattr(Measuring, "_time", lambda self, *cell: timed.append(cell))
    config = FrontierConfig(policies=["window", "block_sparse", "quest"], densities=[0.25, 0.5], lengths=[1, 2])
    subject = find_subjects([str(runs["softmax"])])[0]
    held_out = open_held_out(corpus, [subject], config.shared())
    Measuring(subject, held_out, tmp_path, config, torch.device("cpu")).times({("prefill", 2): 0.3})
    lengths = [(1, [0.25, 0.5]), (2, [0.25, 0.3, 0.5])]
    expected = [[("dense", n, None), *(("block_sparse", n, wanted) for wanted in found)] for n, found in lengths]
    assert timed == sum(expected, [])
    assert asked == [(policy_at("block_sparse", 0.5, n * BASE_LENGTH), "cpu", None) for n in (1, 2)]


def test_decoding_scores_what_one_pass_scores(runs: dict[str, Path]) -> None:
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(0, 420, (2, 50))
    targets[:40] = -100
    targets[44] = -100
    context = Context(tokens, targets)
    for kind in ("softmax", "asentmax"):
        model = load(runs[kind])
        one, whole = decode(model, context, RUNTIME, 16), score(model, [context], RUNTIME, "")[0]
        np.testing.assert_allclose(one.loss, whole.loss, rtol=1e-4)
        assert (one.hit == whole.hit).all() and len(one.loss) == 9
    with pytest.raises(ValueError, match="needs a prompt"):
        decode(model, Context(tokens, tokens), RUNTIME, 16)


def test_a_policy_acts_in_its_phase_only(corpus: Path, runs: dict[str, Path]) -> None:
    """A window in decoding leaves the prompt dense: the first layer's keys of late tokens are near ones only there."""
    model = load(runs["softmax"])
    held_out = open_held_out(corpus, find_subjects([str(runs["softmax"])]), FrontierConfig(lengths=[1]).shared())
    contexts = make_tasks(held_out, 1, "decode", 4).text[0][:1]
    _, record = Scorer(model, "decode", RUNTIME, 64, "")(contexts, SlidingWindow(16))
    assert record is not None and set(record.counts) == {"decode"}
    n = BASE_LENGTH
    expected = 4 * 16 / sum(range(n - 3, n + 1))
    torch.testing.assert_close(record.density("decode"), torch.full((2, 2), expected).double())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_entmax_density_is_its_support(
    corpus: Path, runs: dict[str, Path], phase: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the support of each scored query, caught where the attention is called."""
    model = load(runs["asentmax"])
    held_out = open_held_out(corpus, find_subjects([str(runs["asentmax"])]), FrontierConfig(lengths=[1]).shared())
    tasks = make_tasks(held_out, 1, phase, 2)
    density, tiles = entmax_density(model, tasks, RUNTIME)
    assert (tiles is None) == (phase == "decode")
    supports: list[torch.Tensor] = []

    def caught(*arguments: Any, **options: Any) -> Any:
        out, stats = entmax_attention(*arguments, **{**options, "return_stats": True})
        supports.append(stats.support[0])
        return out

    monkeypatch.setattr("model.attention.entmax_attention", caught)
    kept, visible = torch.zeros(2, 2), 0
    for windows in tasks.text:
        scored = torch.from_numpy(windows[0].targets >= 0)
        supports.clear()
        with torch.no_grad():
            model(torch.from_numpy(windows[0].tokens)[None])
        kept += torch.stack([support[:, scored].sum(-1) for support in supports])
        visible += int((torch.arange(1, len(scored) + 1) * scored).sum())
    assert visible == len(tasks.text) * (
        2 * BASE_LENGTH - 1 if phase == "decode" else BASE_LENGTH * (BASE_LENGTH + 1) // 2
    )
    torch.testing.assert_close(density.float(), kept / visible, rtol=1e-4, atol=0)


def test_the_level_with_the_wanted_density_is_found() -> None:
    """On a curve whose density is the square of its size: 0.09 is 300 of 1,000."""

    def make(level: float) -> SlidingWindow:
        return SlidingWindow(max(1, round(1000 * level)))

    def density_of(policy: Any) -> float:
        return (policy.size / 1000) ** 2

    found = set_density(make, density_of, 0.09)
    assert abs(math.log(density_of(found) / 0.09)) < 0.05
    assert set_density(make, density_of, 1.0) == SlidingWindow(1000)
    assert set_density(make, lambda policy: max(0.2, density_of(policy)), 0.01).size < 450  # as near as the curve comes


def test_wrong_arguments_end_in_one_line(corpus: Path, runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    def failing(*arguments: str) -> str:
        assert main([*options(corpus, runs, tmp_path), *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "expected different ones of window, streaming_llm" in failing("--policies", "windows")
    assert "policies is ['quest', 'quest']: expected different ones" in failing("--policies", "quest", "quest")
    assert "densities is [0.0]: expected different shares in (0, 1]" in failing("--densities", "0")
    assert "densities is [0.1, 0.1]: expected different" in failing("--densities", "0.1", "0.1")
    assert "decode_tokens is 0" in failing("--decode_tokens", "0")
    assert "decode_tokens is 128, of contexts of 128 tokens" in failing("--decode_tokens", "128")
    swapped = failing("--softmax", str(runs["asentmax"]), "--entmax", str(runs["softmax"]))
    assert "--softmax" in swapped and "expected softmax or ssmax" in swapped


def test_models_that_differ_in_more_than_attention_are_named() -> None:
    def subject(label: str, kind: str, **sizes: Any) -> Any:
        attention = AttentionConfig(kind=kind)  # type: ignore[arg-type]
        architecture = ModelConfig(vocab_size=64, attention=attention, **sizes)
        return SimpleNamespace(label=label, checkpoint=SimpleNamespace(architecture=architecture))

    same = dict(n_layers=2, d_model=64, n_heads=4, positions="rope")
    assert differences([subject("a", "softmax", **same), subject("b", "asentmax", **same)]) == []
    unlike = differences([subject("a", "softmax", **same), subject("b", "entmax", **same | dict(n_layers=3))])
    assert unlike == ["a and b are no twins, they differ in: n_layers 2 and 3."]
    yarn = RopeScaling(kind="yarn", factor=8.0, original_length=128)
    [unlike] = differences([subject("a", "softmax", **same), subject("b", "entmax", **same, rope_scaling=yarn)])
    assert "differ in: rope_scaling None and {" in unlike
