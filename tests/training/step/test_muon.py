"""Muon's steps against its definition, the two optimizers as one, and runs that continue with its state."""

import copy
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from model.checkpoint import checkpoint_folder
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from tests.training.conftest import TrainProcess, assert_same_weights, callbacks, stored_tensors
from training.distributed.checkpoint_state import whole_state
from training.step.muon import MuonAdamW, is_muon
from training.step.optim import OptimizerConfig, build_optimizer, lr_factor, parameter_groups, reapply_settings

CONFIG = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.3, warmup_steps=4, alpha_lr_factor=3.0)
# 5 iterations of 3 products, each rounded to bfloat16
TOLERANCE = 15 * 2.0**-8


def small_model(tie_embeddings: bool = True) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=64, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, tie_embeddings=tie_embeddings,
            qkv_bias=True, attention=AttentionConfig(kind="asentmax", learn_alpha=True),
        )
    )  # fmt: skip


def built(model: Transformer) -> tuple[MuonAdamW, LambdaLR]:
    optimizer, scheduler = build_optimizer(model, CONFIG, total_steps=50, fused=False)
    assert isinstance(optimizer, MuonAdamW)
    return optimizer, scheduler


def take_steps(model: Transformer, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz in float64, on the singular values themselves: s becomes a s + b s^3 + c s^5, five times."""
    left, s, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ s.diag() @ right


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40)])
def test_steps_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    group = {"name": "hidden", "params": [weight], "lr": 0.0, "weight_decay": 0.3, "momentum": 0.9, "nesterov": True,
             "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}  # fmt: skip
    optimizer = MuonAdamW([group])
    average = torch.zeros(shape, dtype=torch.float64)
    for lr in (0.1, 0.04):
        optimizer.param_groups[0]["lr"] = lr  # as a schedule sets it
        weight.grad = torch.randn(shape, generator=generator)
        expected = weight.detach().double() * (1 - lr * 0.3)
        average = 0.9 * average + 0.1 * weight.grad.double()
        direction = orthogonal(0.1 * weight.grad.double() + 0.9 * average)
        optimizer.step()
        scale = 0.2 * max(shape) ** 0.5
        step = (expected - weight.detach().double()) / (lr * scale)
        assert (step - direction).norm() < TOLERANCE * direction.norm()
        # as large as AdamW's steps, which are about 0.2 lr: singular values end in [0.7, 1.2]
        assert 0.2 * 0.6 < (step * scale).square().mean().sqrt() < 0.2 * 1.3
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"].double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_matrices_of_blocks_are_muon_s(tied: bool) -> None:
    model = small_model(tied)
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG, fused=False)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert list(groups) == ["hidden", "matrices", "vectors", "embeddings", "alpha"]
    assert [name for name, group in groups.items() if is_muon(group)] == ["hidden"]
    hidden = {names[id(p)].split(".", 2)[2] for p in groups["hidden"]["params"]}
    assert hidden == {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")} | {
        f"feed_forward.{w}.weight" for w in ("w_gate", "w_up", "w_down")
    }
    rest = {names[id(p)].split(".")[-2] for p in groups["matrices"]["params"]}
    assert rest == {"beta", "gamma"} | ({"head"} if not tied else set())
    assert sorted(id(p) for group in groups.values() for p in group["params"]) == sorted(names)
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "hidden": (0.02, 0.3), "matrices": (0.02, 0.3), "vectors": (0.02, 0.0), "embeddings": (0.02, 0.0),
        "alpha": (0.06, 0.0),
    }  # fmt: skip


def test_each_group_gets_what_its_own_optimizer_alone_would_do() -> None:
    model, twin = small_model(), small_model()
    optimizer, scheduler = built(model)
    take_steps(model, optimizer, scheduler, 6)
    groups = parameter_groups(twin, CONFIG, fused=False)
    muon = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3, "lr": 0.02}
    alone = [
        torch.optim.Muon([{"params": group["params"]} for group in groups if is_muon(group)], **muon),
        torch.optim.AdamW([group for group in groups if not is_muon(group)]),
    ]
    schedules = [LambdaLR(one, lr_factor(CONFIG, 50)) for one in alone]
    for _ in range(6):
        twin(torch.arange(8)[None]).square().mean().backward()
        for one, schedule in zip(alone, schedules, strict=True):
            one.step(), schedule.step()
        twin.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_is_saved_and_loaded_goes_on_bit_by_bit() -> None:
    model = small_model()
    optimizer, scheduler = built(model)
    take_steps(model, optimizer, scheduler, 3)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    take_steps(model, optimizer, scheduler, 3)
    other = small_model()
    restored, schedule = built(other)
    for one, state in zip((other, restored, schedule), saved, strict=True):
        one.load_state_dict(state)
    reapply_settings(restored, schedule, parameter_groups(other, CONFIG, fused=False))
    take_steps(other, restored, schedule, 3)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [group["lr"] for group in restored.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_a_checkpoint_has_one_moment_of_muon_s_matrices_and_no_count() -> None:
    model = small_model()
    optimizer, scheduler = built(model)
    for steps in (0, 2):  # before the first step too
        take_steps(model, optimizer, scheduler, steps)
        state = whole_state(model, optimizer)
        kinds: dict[str, set[str]] = {}
        for key in state.shapes:
            kind, name = key.split("/")
            kinds.setdefault(name, set()).add(kind)
        hidden = {n for n, p in model.named_parameters() if any(p is q for q in optimizer.param_groups[0]["params"])}
        assert len(hidden) == 14
        assert {name for name, found in kinds.items() if found == {"weight", "momentum_buffer"}} == hidden
        assert all(found == {"weight", "exp_avg", "exp_avg_sq"} for n, found in kinds.items() if n not in hidden)
        assert state.steps == {name: steps for name in kinds if name not in hidden}
        assert {fragment.key for fragment in state.fragments} == set(state.shapes)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(train: TrainProcess, tmp_path: Path, precision: str) -> None:
    options = ("--model.optimizer.name", "muon", "--trainer.precision", precision, "--trainer.max_steps", 8)
    config = ("configs/attention/asentmax.yaml",)
    whole = train("--run_dir", tmp_path / "whole", *options, configs=config)
    assert whole.returncode == 0, whole.stderr
    parts = ("--run_dir", tmp_path / "parts", "--resume", "auto", *options)
    killed = train(*parts, callbacks(("KillAfterStep", {"step": 6})), configs=config)
    assert killed.returncode == -signal.SIGKILL
    done = train(*parts, configs=config)
    assert done.returncode == 0 and "step-00000005 (step 5)" in done.stderr, done.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    ours, theirs = (stored_tensors(tmp_path / name, 8) for name in ("whole", "parts"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    assert any(key.startswith("momentum_buffer/") for key in ours)
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    refused = train("--run_dir", tmp_path / "parts", "--resume", "auto", "--trainer.max_steps", 9, configs=config)
    assert refused.returncode == 2 and "model.optimizer.name muon (config: adamw)" in refused.stderr


def test_several_ranks_go_on_with_one_rank_s_checkpoint(train: TrainProcess, tmp_path: Path) -> None:
    options = ("--model.optimizer.name", "muon", "--trainer.max_steps", 6, "--checkpoint.every_n_steps", 4)
    assert train("--run_dir", tmp_path / "one", *options).returncode == 0
    middle = checkpoint_folder(tmp_path / "one", 4)
    done = train("--run_dir", tmp_path / "two", *options, "--resume", middle, "--trainer.devices", 2)
    assert done.returncode == 0, done.stderr
    before, ours, theirs = (
        stored_tensors(tmp_path / name, step) for name, step in (("one", 4), ("two", 6), ("one", 6))
    )
    assert before.keys() == ours.keys() == theirs.keys()
    for key, tensor in ours.items():  # sums over ranks are rounded otherwise
        assert (tensor - theirs[key]).norm() <= 0.01 * (theirs[key] - before[key]).norm(), key
