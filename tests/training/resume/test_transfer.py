"""Runs that start from other weights: what may change, what a converted softmax model loses, alpha's schedule."""

import csv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.config import AttentionConfig, DMSConfig, DSAConfig, HierarchicalConfig, ModelConfig, NSAConfig, RopeScaling
from model.loading import load_model
from model.transformer import Transformer
from tests.training.conftest import ROOT, TrainProcess
from training.resume.transfer import check_transfer

CONVERT = yaml.safe_load((ROOT / "configs/stages/from_softmax.yaml").read_text())["model"]["network"]["attention"]
LAG = 9


def network(**attention: Any) -> ModelConfig:
    sizes: dict[str, Any] = dict(vocab_size=32, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48)
    return ModelConfig(**sizes, positions="rope", attention=AttentionConfig(**attention))


def copying_tokens(seed: int) -> Tensor:
    """(8, 8 * LAG): each token is the one LAG places before."""
    return torch.randint(32, (8, LAG), generator=torch.Generator().manual_seed(seed)).repeat(1, 8)


def copying_loss(model: Transformer, seed: int) -> Tensor:
    """Mean loss of the tokens that can be known: without attention it cannot be below log(32) = 3.5."""
    tokens = copying_tokens(seed)
    logits = model.logits(model(tokens))[:, LAG:-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, LAG + 1 :].flatten())


@pytest.fixture(scope="module")
def softmax_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(network(kind="softmax"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        copying_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def converted(source: Transformer, **attention: Any) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(network(**{**CONVERT, **attention}))
    model.load_state_dict(source.state_dict(), strict=False)
    model.set_step(0)
    return model.requires_grad_(False)


def test_a_converted_model_starts_with_the_softmax_models_predictions(softmax_model: Transformer) -> None:
    """Mean Kullback-Leibler divergence of the next token's probabilities from the softmax model's, in nats. (Losses can
    agree by chance.)"""
    assert float(copying_loss(softmax_model, -1)) < 2.5
    tokens = copying_tokens(-1)
    expected = F.log_softmax(softmax_model.logits(softmax_model(tokens)), dim=-1)

    def divergence(**options: Any) -> float:
        model = converted(softmax_model, **options)
        found = F.log_softmax(model.logits(model(tokens)), dim=-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    configured = divergence()
    assert configured < 1e-4
    assert divergence(temperature_bias=0.0) > 20 * configured  # the paper's temperature
    assert divergence(anneal_steps=0) > 20 * configured  # alpha at once


def test_alpha_moves_to_each_heads_own_value() -> None:
    model = Transformer(network(kind="entmax", alpha=1.5, anneal_from=1.1, anneal_steps=4))
    alpha_raw = model.layers()[0].attention.alpha.alpha_raw  # type: ignore[union-attr]
    torch.nn.init.constant_(alpha_raw[:1], 1.0)  # type: ignore[index]
    model.set_step(4)
    own = model.alphas()
    assert own[0, 1] == 1.5 and own[0, 0] > 1.6
    for step in range(6):
        model.set_step(step)
        torch.testing.assert_close(model.alphas(), 1.1 + (own - 1.1) * min(1, step / 4))


def test_the_schedule_reaches_the_kernels_and_the_gradient() -> None:
    """At progress 1 - epsilon the tensor path gives what the finished schedule gives."""
    model = Transformer(network(kind="entmax", alpha=1.5, learn_alpha=False, anneal_steps=10**6))
    tokens = torch.randint(32, (1, 40), generator=torch.Generator().manual_seed(0))
    outputs, gradients = [], []
    for step in (0, 10**6 - 1, 10**6):
        model.set_step(step)
        model.zero_grad()
        outputs.append(model(tokens))
        outputs[-1].square().sum().backward()
        gradients.append(model.layers()[0].attention.wv.weight.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[2], atol=1e-4, rtol=1e-3)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4


def test_annealing_does_not_compile_blocks_again() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    model = Transformer(network(kind="entmax", alpha=1.5, learn_alpha=False, anneal_steps=8))
    for block in model.blocks:
        block.compile(backend=backend)
    counts = []
    for step in range(4):
        model.set_step(step)
        model(torch.zeros(1, 16, dtype=torch.int64))
        counts.append(len(compiled))
    assert counts[0] >= 1 and set(counts) == {counts[0]}


def info(**attention: Any) -> CheckpointInfo:
    return CheckpointInfo(Path("old"), 10, {"model": asdict(network(**attention))})


def test_what_may_differ_and_what_may_not() -> None:
    check_transfer(info(kind="softmax"), network(kind="asentmax", alpha=1.3, anneal_steps=5))
    check_transfer(info(kind="softmax"), replace(network(kind="entmax"), rope_base=5e5, window=7))
    check_transfer(info(kind="entmax"), network(kind="asentmax", learn_alpha=False))
    check_transfer(info(kind="hierarchical"), network(kind="hierarchical", hierarchical=HierarchicalConfig(block=32)))
    check_transfer(info(kind="nsa"), network(kind="nsa", nsa=NSAConfig(window=1024, select_count=32)))
    check_transfer(info(kind="softmax"), network(kind="dsa", dsa=DSAConfig(stage="warmup")))
    check_transfer(info(kind="softmax"), network(kind="dms", dms=DMSConfig(window=64)))
    check_transfer(info(kind="dms"), network(kind="dms", dms=DMSConfig(64, 4.0, 100, loss_weight=2.0)))
    check_transfer(info(kind="dsa"), network(kind="dsa", dsa=DSAConfig(select_tokens=64, loss_weight=2.0)))
    for old, new, named in (
        ("asentmax", network(kind="softmax"), "attention.kind 'asentmax' (config: 'softmax')"),
        ("ssmax", network(kind="asentmax"), "attention.kind 'ssmax' (config: 'asentmax')"),
        ("softmax", network(kind="nsa"), "has attention.kind 'softmax' (config: 'nsa'); only"),
        ("softmax", network(kind="hierarchical"), "has attention.kind 'softmax' (config: 'hierarchical'); only"),
        ("entmax", network(kind="hierarchical"), "has attention.kind 'entmax' (config: 'hierarchical'); only"),
        ("nsa", network(kind="nsa", nsa=NSAConfig(compress_length=16)), "nsa.compress_length 32 (config: 16)"),
        ("dsa", network(kind="dsa", dsa=DSAConfig(index_dim=64)), "attention.dsa.index_dim 32 (config: 64)"),
        ("dms", network(kind="dms", dms=DMSConfig(scale=10.0)), "attention.dms.scale 100.0 (config: 10.0)"),
        ("entmax", network(kind="dms"), "has attention.kind 'entmax' (config: 'dms'); only"),
        ("nsa", network(kind="dsa"), "has attention.kind 'nsa' (config: 'dsa'); only"),
        ("softmax", replace(network(kind="softmax"), vocab_size=64), "vocab_size 32 (config: 64)"),
        ("softmax", replace(network(kind="softmax"), positions="nape"), "positions 'rope' (config: 'nape')"),
    ):
        with pytest.raises(ValueError, match="--init_from old has weights for another model") as error:
            check_transfer(info(kind=old), new)
        assert named in str(error.value)


def test_learned_alphas_are_taken_over_as_they_are() -> None:
    old = Transformer(network(kind="entmax", alpha=1.25))
    for layer in old.layers():
        torch.nn.init.normal_(layer.attention.alpha.alpha_raw, std=2)  # type: ignore[union-attr, arg-type]
    learned = old.alphas()
    for options in (
        {"alpha": 1.1},
        {"alpha": 1.5, "alpha_min": 1.2},
        {"alpha": 1.25},
        {"alpha": 1.3, "learn_alpha": False},
    ):
        new = Transformer(network(kind="entmax", **options))
        for mine, theirs in zip(new.layers(), old.layers(), strict=True):
            alpha: Any = mine.attention.alpha
            if (taken := alpha.taken_over(theirs.attention.alpha)) is not None:
                alpha.alpha_raw.data = taken
        expected = learned.clamp(min=1.2 + 0.8e-4) if "alpha_min" in options else learned
        expected = torch.full_like(learned, 1.3) if "learn_alpha" in options else expected
        torch.testing.assert_close(new.alphas(), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def first_stage(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stages") / "first"
    options = ("--model.network.attention.kind", "softmax", "--model.network.positions", "rope")
    done = train("--run_dir", run_dir, "--trainer.max_steps", 4, *options)
    assert done.returncode == 0, done.stderr
    return run_dir


EXTEND = (
    "--data.sequence_length", 128, "--data.micro_batch_size", 1, "--data.global_batch_size", 2, "--data.num_workers", 0,
    "--data.val_sequences", 2, "--trainer.log_every_n_steps", 1, "--model.network.positions", "rope",
    "--model.network.attention.anneal_steps", 5, "--checkpoint.every_n_steps", 3, "--validation.every_n_steps", 3,
    "--model.mlp_tile_tokens", 48, "--model.optimizer.warmup_steps", 2,
)  # fmt: skip
EXTEND_CONFIGS = ("configs/stages/extend_128k.yaml", "configs/stages/from_softmax.yaml")


def test_a_stage_extends_resumes_exactly_and_then_ignores_init_from(
    train: TrainProcess, first_stage: Path, tmp_path: Path
) -> None:
    def stage(run_dir: Path, steps: int) -> str:
        done = train(
            "--run_dir", run_dir, "--init_from", first_stage, "--resume", "auto", "--trainer.max_steps", steps,
            *EXTEND, configs=EXTEND_CONFIGS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = stage(tmp_path / "whole", 6)
    assert f"starting from the weights of {first_stage}/checkpoints/step-00000004 (its step 4)" in said
    assert "attention.kind softmax -> asentmax" in said and "rope_base 10000.0 -> 8000000.0" in said
    assert "new, with initial values: attention.alpha.alpha_raw, attention.temperature.beta.weight" in said
    # interrupted in the middle of the schedule, as a requeued job: with the learning rates of six steps
    killed = train(
        "--run_dir", tmp_path / "parts", "--init_from", first_stage, "--resume", "auto", "--trainer.max_steps", 6,
        "--trainer.callbacks", "[{class_path: tests.training.faults.callbacks.KillAfterStep, init_args: {step: 4}}]",
        *EXTEND, configs=EXTEND_CONFIGS,
    )  # fmt: skip
    assert resolve_checkpoint(tmp_path / "parts").step == 3, killed.stderr
    loaded = load_model(tmp_path / "parts")
    assert loaded.model.annealed == 3 / 5  # whoever loads it sees the alpha of that step
    said = stage(tmp_path / "parts", 6)
    assert "resuming from" in said and "starting from the weights" not in said
    states = [load_model(tmp_path / name).model.state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with (tmp_path / "whole/metrics/step-00000000/metrics.csv").open(newline="") as file:
        alphas = [float(row["alpha/layer_00/head_00"]) for row in csv.DictReader(file) if row["train/loss"]]
    way = CONVERT["alpha"] - 1.01
    assert alphas[0] == pytest.approx(1.01) and alphas[1] == pytest.approx(1.01 + way / 5, abs=1e-2)
    assert alphas[5] == pytest.approx(CONVERT["alpha"], abs=2e-2)


def test_a_stage_extends_with_yarn_in_its_own_config(train: TrainProcess, first_stage: Path, tmp_path: Path) -> None:
    stage = tmp_path / "yarn.yaml"
    stage.write_text(
        "model: {network: {positions: rope, attention: {kind: softmax}, rope_base: 10000.0,\n"
        "  rope_scaling: {kind: yarn, factor: 2, original_length: 64}}}\n"
        "data: {sequence_length: 128, micro_batch_size: 1, global_batch_size: 2, val_sequences: 2}\n"
        "trainer: {max_steps: 2, log_every_n_steps: 1}\n"
    )

    def extended(name: str, *options: object) -> tuple[str, float]:
        done = train("--run_dir", tmp_path / name, "--init_from", first_stage, *options, configs=(stage,))
        assert done.returncode == 0, done.stderr
        with (tmp_path / name / "metrics/step-00000000/metrics.csv").open(newline="") as file:
            return done.stderr, float(next(csv.DictReader(file))["train/loss"])

    said, loss = extended("yarn")
    assert "rope_scaling.kind None -> yarn" in said and "rope_scaling.factor None -> 2.0" in said
    assert "rope_base" not in said and "initial values" not in said
    assert load_model(tmp_path / "yarn").model.config.rope_scaling == RopeScaling("yarn", 2.0, 64)
    said, plain = extended("plain", "--model.network.rope_scaling", "null")
    assert "changed:" not in said and loss != plain  # the same weights and data
    other = ("--resume", "auto", "--model.network.rope_scaling.factor", 4, "--trainer.max_steps", 3)
    refused = train("--run_dir", tmp_path / "yarn", *other, configs=(stage,))
    assert refused.returncode == 2 and "rope_scaling.factor 2.0 (config: 4.0)" in refused.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--init_from", "FIRST", "--model.network.d_ff", 48), ("d_ff 32 (config: 48)", "--init_from")),
        (("--init_from", "FIRST", "--resume", "FIRST"), ("--init_from", "use one of them")),
        (
            ("--init_from", "FIRST", "--model.network.attention.kind", "softmax", "--data.sources", "OTHER"),
            ("was trained with tokenizer", "use the data it was trained on"),
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    train: TrainProcess, first_stage: Path, other_corpus: Path, tmp_path: Path, options: tuple[Any, ...],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    given = {"FIRST": first_stage, "OTHER": f"[{{path: {other_corpus}}}]"}
    filled = [given.get(option, option) for option in options]
    done = train("--run_dir", tmp_path / "run", "--model.network.positions", "rope", *filled)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "run").exists()
