"""Parameter groups, schedules, and what a restored optimizer keeps of its checkpoint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer
from training.step.optim import (
    OptimizerConfig,
    build_optimizer,
    lr_factor,
    parameter_groups,
    reapply_settings,
)


def small_model(tie_embeddings: bool = True) -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=64, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, tie_embeddings=tie_embeddings,
            attention=AttentionConfig(kind="asentmax", learn_alpha=True),
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    model = small_model(tied)
    groups = parameter_groups(model, OptimizerConfig(), fused=False)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [group["name"] for group in groups] == ["matrices", "vectors", "embeddings", "alpha"]


def test_decay_and_learning_rate_of_each_group() -> None:
    model = small_model(tie_embeddings=False)
    config = OptimizerConfig(lr=0.5, weight_decay=0.3, alpha_lr_factor=4.0)
    groups = {group["name"]: group for group in parameter_groups(model, config, fused=False)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.3, "vectors": 0.0, "embeddings": 0.0, "alpha": 0.0,
    }  # fmt: skip
    assert {name: group["lr"] for name, group in groups.items()} == {
        "matrices": 0.5, "vectors": 0.5, "embeddings": 0.5, "alpha": 2.0,
    }  # fmt: skip
    assert all(p.ndim == 1 for p in groups["vectors"]["params"])
    assert [id(p) for p in groups["embeddings"]["params"]] == [id(model.embedding.weight)]
    assert id(model.head_weight) in {id(p) for p in groups["matrices"]["params"]}
    alphas = {id(p) for name, p in model.named_parameters() if name.endswith("alpha_raw")}
    assert {id(p) for p in groups["alpha"]["params"]} == alphas and len(alphas) == 2
    decayed = parameter_groups(model, OptimizerConfig(weight_decay=0.3, decay_embeddings=True), fused=False)
    assert {group["name"]: group["weight_decay"] for group in decayed}["embeddings"] == 0.3


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 200),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_schedules_stay_in_bounds_and_end_where_asked(schedule, warmup, total, final, decay) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, final_lr_fraction=final, decay_fraction=decay)
    factors = [lr_factor(config, total)(step) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if total > warmup + 1:
        assert factors[-1] == pytest.approx(final, abs=1e-9)


def test_schedule_values() -> None:
    cosine = lr_factor(OptimizerConfig(schedule="cosine", warmup_steps=4, final_lr_fraction=0.1), 105)
    assert [cosine(step) for step in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert [cosine(step) for step in (54, 104, 1000)] == pytest.approx([0.55, 0.1, 0.1])
    wsd = lr_factor(OptimizerConfig(schedule="wsd", warmup_steps=4, final_lr_fraction=0.0, decay_fraction=0.1), 100)
    assert [wsd(step) for step in (0, 4, 50, 89, 94, 99)] == pytest.approx([0.25, 1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("betas", (0.9, 1.0)), ("eps", -1.0), ("weight_decay", -0.1), ("warmup_steps", -1),
     ("final_lr_fraction", 1.5), ("decay_fraction", 0.0), ("schedule", "linear"), ("alpha_lr_factor", -1.0),
     ("name", "sgd"), ("momentum", 1.0), ("warmup_steps", 1.5),
     ("lr", 1e37), ("weight_decay", 1e300), ("weight_decay", 1001.0), ("eps", 1e30), ("alpha_lr_factor", 1e30)],
)  # fmt: skip
def test_bad_settings_name_the_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"model.optimizer.{field} is .*expected"):
        OptimizerConfig(**{field: value})


def test_a_momentum_needs_an_optimizer_that_has_one() -> None:
    assert OptimizerConfig(name="muon", momentum=0.9).momentum == 0.9
    with pytest.raises(ValueError, match="model.optimizer.momentum is 0.9: .* needs model.optimizer.name muon"):
        OptimizerConfig(momentum=0.9)


def train_steps(model: Transformer, optimizer: torch.optim.Optimizer, scheduler, steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def test_a_restored_optimizer_takes_the_settings_of_the_config() -> None:
    model = small_model()
    optimizer, scheduler = build_optimizer(model, OptimizerConfig(lr=0.1), total_steps=50, fused=False)
    train_steps(model, optimizer, scheduler, 3)
    changed = OptimizerConfig(lr=0.2, betas=(0.8, 0.9), weight_decay=0.7, alpha_lr_factor=2.0)
    restored, schedule = build_optimizer(model, changed, total_steps=50, fused=False)
    restored.load_state_dict(optimizer.state_dict())
    schedule.load_state_dict(scheduler.state_dict())
    assert restored.param_groups[0]["weight_decay"] == 0.1  # what torch does, and why reapply_settings exists
    reapply_settings(restored, schedule, parameter_groups(model, changed, fused=False))
    by_name = {group["name"]: group for group in restored.param_groups}
    assert by_name["matrices"]["weight_decay"] == 0.7 and by_name["matrices"]["betas"] == (0.8, 0.9)
    factor = lr_factor(changed, 50)
    assert by_name["matrices"]["lr"] == 0.2 * factor(3) and by_name["alpha"]["lr"] == 0.4 * factor(3)
    train_steps(model, restored, schedule, 1)
    assert by_name["matrices"]["lr"] == 0.2 * factor(4)


def test_reapplying_the_same_settings_changes_no_bit() -> None:
    model = small_model()
    config = OptimizerConfig(lr=0.1, alpha_lr_factor=3.0)
    optimizer, scheduler = build_optimizer(model, config, total_steps=50, fused=False)
    train_steps(model, optimizer, scheduler, 7)
    before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    reapply_settings(optimizer, scheduler, parameter_groups(model, config, fused=False))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == before


def test_restoring_into_other_groups_is_refused() -> None:
    model = small_model()
    optimizer, scheduler = build_optimizer(model, OptimizerConfig(), total_steps=5, fused=False)
    softmax = Transformer(ModelConfig(attention=AttentionConfig(kind="softmax")))
    with pytest.raises(ValueError, match="parameter groups .*alpha.* the config gives"):
        reapply_settings(optimizer, scheduler, parameter_groups(softmax, OptimizerConfig(), fused=False))


def test_gates_of_nsa_are_no_matrices_for_muon() -> None:
    model = Transformer(ModelConfig(attention=AttentionConfig(kind="nsa")))
    names = {
        id(p): name.rpartition("attention.sparse.")[2] for name, p in model.named_parameters() if ".sparse." in name
    }
    found = {
        group["name"]: {names[id(p)] for p in group["params"] if id(p) in names}
        for group in parameter_groups(model, OptimizerConfig(name="muon"), fused=False)
    }
    assert found == {
        "hidden": {f"compress_{part}.{w}.weight" for part in "kv" for w in ("w_in", "w_out")},
        "matrices": {"gate.weight"},
        "vectors": {"gate.bias"},
        "embeddings": {"compress_k.place.weight", "compress_v.place.weight"},
    }
