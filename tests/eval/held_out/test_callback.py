"""Evaluation during training: what it logs is what eval measures, and training goes on as if it were not there."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.store import TokenStore
from eval.common.scoring import Runtime
from eval.held_out.callback import (
    HeldOutEvaluation,
    Tally,
    finished,
    measure,
    open_held_out_set,
    undisturbed,
    unless_told_to_stop,
)
from eval.held_out.config import EvalConfig
from model.checkpoint import resolve_checkpoint
from model.config import ModelConfig
from model.loading import load_model
from model.transformer import Transformer
from tests.training.conftest import (
    ROOT,
    TrainProcess,
    assert_same_weights,
    callbacks,
    corpus,
    other_corpus,
    stored_tensors,
    tiny_config,
    train,
)

__all__ = ["corpus", "other_corpus", "tiny_config", "train"]  # fixtures
CONFIG = ROOT / "configs" / "eval" / "during_training.yaml"
QUICK = {"base_length": 128, "needle_digits": 2, "lengths": [1, 2], "profile_queries": 16}
STEPS = ("--trainer.max_steps", 8, "--checkpoint.every_n_steps", 3)


def options(**arguments: object) -> tuple[str, ...]:
    """Of the callback that the YAML names last."""
    given = QUICK | {"every_n_steps": 3} | arguments
    return tuple(f"--trainer.callbacks.init_args.{name}={json.dumps(value)}" for name, value in given.items())


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """The callback's metrics by step, over all sessions."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(run_dir.glob("metrics/*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if values := {name: float(text) for name, text in row.items() if name.startswith("eval/") and text}:
                    found[int(row["step"])] = values
    return found


@pytest.fixture(scope="module")
def runs(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run without the evaluation, with it, and with it and an interruption."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("plain", "evaluated", "resumed")}
    stop = callbacks(("StopAfterStep", {"step": 5}))
    for name, configs, more in (
        ("plain", (), ()), ("evaluated", (CONFIG,), options()), ("resumed", (), (stop,)),
        ("resumed", (CONFIG,), (*options(), "--resume", "auto")),
    ):  # fmt: skip
        done = train("--run_dir", found[name], *STEPS, *more, configs=configs)
        assert done.returncode == 0, done.stderr
    return found


def test_training_is_not_disturbed(runs: dict[str, Path]) -> None:
    for name in ("evaluated", "resumed"):
        assert_same_weights(runs["plain"], runs[name])
        plain, ours = stored_tensors(runs["plain"], 8), stored_tensors(runs[name], 8)
        assert plain.keys() == ours.keys() and all(torch.equal(plain[key], ours[key]) for key in plain)  # AdamW's too
    assert sorted(logged(runs["evaluated"])) == [3, 6, 8] and sorted(logged(runs["resumed"])) == [6, 8]
    for step in (6, 8):
        assert logged(runs["resumed"])[step] == logged(runs["evaluated"])[step]


def test_what_is_logged_is_what_is_measured(runs: dict[str, Path], corpus: Path) -> None:
    for step in (6, 8):
        loaded = load_model(resolve_checkpoint(runs["evaluated"] / f"checkpoints/step-{step:08d}").path)
        config = HeldOutEvaluation(3, **QUICK).config  # type: ignore[arg-type]
        fingerprint = resolve_checkpoint(runs["evaluated"]).meta["tokenizer"]["fingerprint"]
        held_out = open_held_out_set(corpus, fingerprint, 64, config)
        runtime = Runtime(torch.device("cpu"), None, config.row_tokens)
        with torch.no_grad():
            whole = measure(loaded.model, held_out, config, runtime, 0, 1)
            shares = [measure(loaded.model, held_out, config, runtime, rank, 3) for rank in range(3)]
        expected = finished(whole.means(whole.sums))
        assert logged(runs["evaluated"])[step] == pytest.approx(expected, rel=1e-6)
        added: torch.Tensor = sum(share.sums for share in shares)  # type: ignore[assignment]
        assert finished(whole.means(added)) == pytest.approx(expected, rel=1e-6)
        assert {"eval/perplexity_2x", "eval/needle_1x", "eval/needle_chance", "eval/live_share_2x"} <= set(expected)
        assert 1 < expected["eval/perplexity_1x"] < 400 and 0 < expected["eval/relative_entropy_2x"] <= 1


@pytest.mark.parametrize(
    "ranks",
    [("--parallel.zero_stage", 2), ("--parallel.sequence_parallel", 2, "--model.network.attention.kind", "asentmax")],
    ids=["zero2", "sequence_parallel"],
)
def test_ranks_add_up_what_they_measure(
    ranks: tuple[object, ...], runs: dict[str, Path], train: TrainProcess, tmp_path: Path
) -> None:
    done = train(
        "--run_dir", tmp_path / "run", *STEPS, *options(), "--trainer.devices", 2, *ranks, configs=(CONFIG,)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 3: held-out perplexity 1x") == 1
    one, two = logged(runs["evaluated"]), logged(tmp_path / "run")
    assert sorted(two) == [3, 6, 8]
    # weights of one and two ranks differ by the rounding of sums
    assert two[3] == pytest.approx(one[3], rel=1e-3)


def test_zero_3_is_refused_in_one_line_at_the_start(train: TrainProcess, tmp_path: Path) -> None:
    zero = ("--parallel.zero_stage", 3, "--trainer.devices", 2)
    done = train("--run_dir", tmp_path / "run", *STEPS, *options(), *zero, configs=(CONFIG,))
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and "parallel.zero_stage is 3" in line and "python -m eval.run" in line


def test_zero_3_is_refused_by_one_rank_alone() -> None:
    def refused(first: bool) -> BaseException:
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=True), is_global_zero=first)
        with pytest.raises((ValueError, SystemExit)) as found:
            HeldOutEvaluation(1).setup(trainer, None, "fit")
        return found.value

    assert isinstance(refused(True), ValueError)
    other = refused(False)
    assert isinstance(other, SystemExit) and other.code is None


def test_what_does_not_fit_the_run_is_refused(corpus: Path, other_corpus: Path) -> None:
    fingerprint = TokenStore(corpus / "heldout").fingerprint_of_tokenizer
    with pytest.raises(ValueError, match="needs a corpus of the run's tokenizer"):
        open_held_out_set(other_corpus, fingerprint, 64, EvalConfig())
    ours = r"(lengths|base_length) of HeldOutEvaluation in trainer.callbacks.*"
    with pytest.raises(
        ValueError, match=f"hold out longer documents, or set smaller {ours} or a smaller {ours}"
    ) as one:
        open_held_out_set(corpus, fingerprint, 64, HeldOutEvaluation(1, lengths=[1000]).config)
    with pytest.raises(
        ValueError, match=f"64 tokens cannot hold .* set a larger {ours} or fewer needle_digits of"
    ) as two:
        open_held_out_set(corpus, fingerprint, 64, HeldOutEvaluation(1, lengths=[1]).config)
    assert "--" not in str(one.value) + str(two.value), "train.py has no such option"
    with pytest.raises(ValueError, match="every_n_steps of HeldOutEvaluation is 0: expected at least 1"):
        HeldOutEvaluation(0)


def test_a_model_that_diverged_has_no_perplexity(runs: dict[str, Path], corpus: Path) -> None:
    model, config = load_model(runs["plain"]).model, HeldOutEvaluation(3, **QUICK).config  # type: ignore[arg-type]
    torch.nn.init.constant_(model.norm.weight, torch.inf)
    fingerprint = TokenStore(corpus / "heldout").fingerprint_of_tokenizer
    held_out = open_held_out_set(corpus, fingerprint, 64, config)
    with torch.no_grad():
        tally = measure(model, held_out, config, Runtime(torch.device("cpu"), None, config.row_tokens), 0, 1)
    metrics = finished(tally.means(tally.sums))
    assert math.isnan(metrics["eval/perplexity_1x"]) and metrics["eval/live_share_1x"] > 0


def test_modes_random_states_and_compiled_blocks_are_as_before() -> None:
    module = torch.nn.Module()
    module.model = decoder = Transformer(ModelConfig(vocab_size=50, n_layers=1, d_model=16, n_heads=2, d_ff=16))
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return graph.forward

    for block in decoder.layers():
        block.compile(backend=backend)
    tokens = torch.arange(8)[None]
    state = torch.random.get_rng_state()
    with undisturbed(module):
        assert not decoder.training and not decoder(tokens).requires_grad
        torch.rand(3)
    assert compiled == [] and decoder.training and torch.equal(torch.random.get_rng_state(), state)
    decoder(tokens)
    assert compiled


def test_each_layer_is_progress_and_a_run_that_is_told_to_stop_leaves_the_evaluation() -> None:
    model = Transformer(ModelConfig(vocab_size=16, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8))
    notes: list[tuple[str, int]] = []
    watchdog = SimpleNamespace(progress=SimpleNamespace(note=lambda *note: notes.append(note)))
    interruption = SimpleNamespace(requested=False)
    trainer: Any = SimpleNamespace(callbacks=[object(), watchdog, interruption], global_step=3)

    def work() -> Tally:
        model(torch.zeros(1, 4, dtype=torch.int64))
        return Tally(["x"])

    assert unless_told_to_stop(trainer, model, work) is not None
    assert notes == [("evaluating", 3)] * 2
    interruption.requested = True
    assert unless_told_to_stop(trainer, model, work) is None
    assert len(notes) == 3
    work()  # hooks are gone
    assert len(notes) == 3
