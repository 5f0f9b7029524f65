"""The command, and what it prints."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.loading import load_model
from tests.training.conftest import ROOT, corpus, tiny_config, train, undisturbed
from training.memory import command
from training.memory.estimate import estimate
from training.memory.states import parameter_count
from training.memory.teacher import teacher_weights

__all__ = ["corpus", "tiny_config", "train", "undisturbed"]  # fixtures


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["memory", *map(str, options)])
    monkeypatch.chdir(ROOT)
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


CONFIGS = [
    part for name in ("models/1b", "attention/asentmax", "stages/extend_128k", "cluster/ulysses")
    for part in ("--config", f"configs/{name}.yaml")
] + ["--data.sources", "[{path: not_needed}]"]  # fmt: skip


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    length = ("--trainer.max_steps", -1, "--trainer.max_tokens", 10**9)
    assert run(monkeypatch, *CONFIGS, "--trainer.num_nodes", 2, *length) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1,102,934,080 parameters, 32,768 tokens a rank and micro-batch (16 ranks, 4 share")
    assert any(line.split()[:3] == ["parameters", "4.11", "GiB"] for line in lines)
    assert any("peak per device" in line for line in lines) and "blocks' inputs (pinned)" in lines[-1]


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("batch", [1, 8])
def test_no_part_is_negative_and_the_peak_is_the_largest_phase(
    batch: int, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.sources", "[{path: not_needed}]", "--model.activation_checkpointing", mode)  # and no max_steps
    for more in ((), ("--trainer.precision", "bf16"), ("--parallel.zero_stage", 3, "--trainer.devices", 4)):
        sizes = ("--data.micro_batch_size", batch, "--data.global_batch_size", 8)
        assert run(monkeypatch, *options, *sizes, "--trainer.accelerator", "gpu", *more) == 0
        printed = capsys.readouterr().out
        found = [line.split(" GiB")[0].rsplit(maxsplit=1) for line in printed.splitlines() if " GiB" in line]
        parts = {name.strip(): float(size) for name, size in found}
        assert all(size >= 0 and not str(size).startswith("-") for size in parts.values()), printed
        phases = [size for name, size in parts.items() if name in ("loss",) or name.startswith("backward,")]
        assert len(phases) == 4 and parts["peak per device"] == max(phases), printed


def test_float8_keeps_less(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    activations = []
    options = ("--model.activation_checkpointing", "none", "--model.compile", "true", "--model.mlp_tile_tokens", 0)
    for recipe in ("none", "rowwise_with_gw_hp", "rowwise"):
        assert run(monkeypatch, *CONFIGS, *options, "--model.float8", recipe) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith(f", FP8 {recipe}") == (recipe != "none")
        row = next(line for line in lines if line.split()[:1] == ["activations"])
        activations.append(float(row.split()[1]))
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 3


def test_a_teacher_is_counted(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the run's architecture: two of four bytes for matrices of blocks, which have 4,608 of its weights."""
    options = ("--data.sources", "[{path: not_needed}]", "--model.network.vocab_size", 384, "--trainer.max_steps", 2)
    given = (*options, "--trainer.precision", "bf16-mixed", "--model.distill.teacher", undisturbed)
    assert run(monkeypatch, *given) == 0
    printed = capsys.readouterr().out
    assert "teacher's forward" in printed and "\n  teacher  " in printed
    setup = command.MemoryCLI().setup
    assert estimate(setup).total > estimate(replace(setup, teacher=None)).total
    assert run(monkeypatch, *options) == 0 and "teacher" not in capsys.readouterr().out
    network = load_model(undisturbed).config
    weights, matrices = parameter_count(network), 4608
    assert teacher_weights(network, 2) == 4 * weights - 2 * matrices


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options, part in (
        (("--trainer.devices", 6), "sequence_parallel is 4: expected a divisor of the 6 ranks"),
        (("--trainer.precision", "16-mixed"), "trainer.precision is '16-mixed'"),
        (("--model.network.n_layerz", 6), "model.network.n_layerz"),
        (
            ("--model.float8", "rowwise", "--trainer.precision", "32"),
            "trainer.precision is '32-true', but model.float8",
        ),
        (
            ("--model.float8", "rowwise", "--model.network.d_model", 1000, "--model.network.head_dim", 64),
            "model.float8 is 'rowwise', but no linear of the blocks has sizes that 16 divides: expected such a d_model",
        ),
    ):
        assert run(monkeypatch, *CONFIGS, *options) == 2
        assert part in capsys.readouterr().err
