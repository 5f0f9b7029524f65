"""The module's step: equal gradients for any micro-batch size, checkpointed and compiled blocks, loop counters."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from model.config import AttentionConfig, ModelConfig
from model.sequence_parallel import SequenceShards
from training.module import LanguageModule, align_batch_counters
from training.step import flash_attention
from training.step.loss import IGNORE_INDEX
from training.step.optim import OptimizerConfig

LENGTH = 24


def make_module(**options: Any) -> LanguageModule:
    torch.manual_seed(0)
    network = ModelConfig(
        vocab_size=50,
        n_layers=2,
        d_model=16,
        n_heads=2,
        n_kv_heads=1,
        d_ff=32,
        attention=AttentionConfig(kind="asentmax"),
    )
    module = LanguageModule(
        network, OptimizerConfig(), **{"loss_backend": "chunked", "loss_chunk_tokens": 10, **options}
    )
    return module.double()


def make_batch(sequences: range) -> dict[str, Any]:
    """Each sequence holds two documents; how many labels are ignored differs between sequences."""
    tokens, labels, bounds = [], [], [0]
    for i in sequences:
        generator = torch.Generator().manual_seed(i)
        row = torch.randint(50, (LENGTH,), generator=generator)
        label = row.roll(-1)
        label[LENGTH - 1 - 3 * (i % 4) :] = IGNORE_INDEX
        tokens.append(row)
        labels.append(label)
        bounds += [bounds[-1] + 7 + i % 3, bounds[-1] + LENGTH]
    return {
        "tokens": torch.cat(tokens)[None], "labels": torch.cat(labels)[None], "max_seqlen": LENGTH,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "sample_ids": torch.tensor(sequences),
    }  # fmt: skip


def accumulated_gradients(module: LanguageModule, global_batch: int, micro_batch: int) -> dict[str, Tensor]:
    """As Lightning accumulates: the loss of each micro-batch is divided by their number."""
    module.zero_grad()
    count = global_batch // micro_batch
    for start in range(0, global_batch, micro_batch):
        output = module.training_step(make_batch(range(start, start + micro_batch)), 0)
        (output["loss"] / count).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradients_do_not_depend_on_the_micro_batch_size() -> None:
    module = make_module()
    whole = accumulated_gradients(module, 8, 8)
    assert set(whole) == {name for name, _ in module.named_parameters()}
    for micro_batch in (1, 2, 4):
        parts = accumulated_gradients(module, 8, micro_batch)
        for name, gradient in whole.items():
            error = (parts[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error:.2e}"  # attention computes partly in float32


def test_z_loss_counts_valid_tokens_as_the_loss_does_and_in_training_only() -> None:
    module, batch = make_module(z_loss=0.05), make_batch(range(4))
    for micro_batch in (1, 2, 4):
        parts = accumulated_gradients(module, 4, micro_batch)
        module.zero_grad()
        logits = module.model(batch["tokens"], batch["cu_seqlens"], LENGTH).flatten(0, 1) @ module.model.head_weight.T
        labels = batch["labels"].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        z_loss = 0.05 * logits.logsumexp(dim=1)[labels != IGNORE_INDEX].square().sum()
        ((loss + z_loss) / labels.numel()).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            error = (parts[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, f"{name}: {error:.2e}"  # attention computes partly in float32
    output = module.training_step(batch, 0)
    torch.testing.assert_close(output["loss"] * labels.numel(), loss + z_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output["loss_sum"], loss.detach(), rtol=1e-6, atol=0)
    module.eval()
    zero = torch.zeros_like(loss)
    torch.testing.assert_close(module.loss_sum(batch), torch.stack([loss, loss, zero, zero, zero]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="model.z_loss is -0.1: expected a finite number"):
        make_module(z_loss=-0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "offload"},
        {"loss_chunk_tokens": 1000},
        {"mlp_tile_tokens": 7},
    ],
)
def test_options_do_not_change_gradients(options: dict[str, Any]) -> None:
    plain, other = (
        accumulated_gradients(make_module(), 2, 2),
        accumulated_gradients(make_module(**options), 2, 2),
    )
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-14, msg=name)


def test_activation_checkpointing_runs_each_block_again_in_backward() -> None:
    calls = {}
    for option in ("none", "selective", "full", "offload"):
        module = make_module(activation_checkpointing=option)
        count = []
        module.model.blocks[0].attention.register_forward_hook(lambda *_, count=count: count.append(1))
        module.training_step(make_batch(range(1)), 0)["loss"].backward()
        calls[option] = len(count)
    assert calls == {"none": 1, "selective": 2, "full": 2, "offload": 2}


def test_compile_keeps_the_state_dict_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiled.append(given) or f)
    module = make_module(compile=True)
    assert compiled == [{"options": {"comprehensive_padding": False}}] * 2
    assert module.state_dict().keys() == make_module().state_dict().keys()


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_compile_reaches_checkpointed_blocks(mode: str) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()  # or blocks stay eager past so many tests
    module = make_module(activation_checkpointing=mode, mlp_tile_tokens=10)
    for block in module.model.blocks:
        block.compile(backend=backend)
    plain = accumulated_gradients(make_module(), 2, 2)
    for name, gradient in accumulated_gradients(module, 2, 2).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-14, msg=name)
    assert len(graphs) == 1  # whole, and shared by all blocks


def test_every_form_of_micro_batch_is_compiled_in_the_first_step() -> None:
    """Rows of whole documents and packed ones: what comes later compiles nothing, and the first step's gradients are
    its own."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    plain, module = make_module(), make_module()
    module.compiled = True
    for block in module.model.blocks:
        block.compile(backend=backend)
    data = SimpleNamespace(sequence_length=LENGTH, task=SimpleNamespace(name=None))
    module.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    whole = {**make_batch(range(2)), "cu_seqlens": torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)}
    packed = {**make_batch(range(2)), "cu_seqlens": torch.tensor([0, 5, 19, 31, 2 * LENGTH], dtype=torch.int32)}
    packed["max_seqlen"], compiled = 17, []
    for batch in (whole, packed, whole, make_batch(range(2))):
        for one in (plain, module):
            one.zero_grad()
            one.training_step(one.on_before_batch_transfer(batch, 0), 0)["loss"].backward()
        for (name, weight), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-9, atol=1e-14, msg=name)
        compiled.append(len(graphs))
    assert compiled == [compiled[0]] * 4 and compiled[0] >= 2


def test_batches_are_measured_before_they_leave_the_cpu() -> None:
    module = make_module()
    one, two = (module.on_before_batch_transfer(make_batch(range(n)), 0) for n in (1, 2))
    assert one["valid_tokens"] == int((make_batch(range(1))["labels"] >= 0).sum())
    assert two["flops"] > one["flops"] > 0


def test_a_batch_is_sliced_for_ranks_that_share_it() -> None:
    module, whole = make_module(), make_module().on_before_batch_transfer(make_batch(range(2)), 0)
    slices = []
    for rank in range(2):
        module.shards = SequenceShards(None, rank, 2)  # type: ignore[arg-type]
        slices.append(module.on_before_batch_transfer(make_batch(range(2)), 0))
    for key in ("tokens", "labels"):
        assert torch.equal(torch.cat([part[key] for part in slices], dim=1), whole[key])
    for key in ("flops", "valid_tokens"):
        assert sum(part[key] for part in slices) == whole[key] and slices[0][key] > 0
    assert all(torch.equal(part["cu_seqlens"], whole["cu_seqlens"]) for part in slices)


def test_bad_arguments_name_the_value() -> None:
    with pytest.raises(ValueError, match="mlp_tile_tokens is -1"):
        make_module(mlp_tile_tokens=-1)
    with pytest.raises(ValueError, match="activation_checkpointing is True: expected one of"):
        make_module(activation_checkpointing=True)
    with pytest.raises(ValueError, match="loss_chunk_tokens is 0"):
        make_module(loss_chunk_tokens=0)
    module = make_module(loss_backend="fast")
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="loss_backend is 'fast'"):
        module.setup("fit")


def test_loop_counters_are_aligned_to_optimizer_steps() -> None:
    counts = {"ready": 31, "started": 31, "processed": 31, "completed": 30}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": True}
    checkpoint = {"global_step": 10, "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
    untouched = copy.deepcopy(checkpoint)
    align_batch_counters(checkpoint, accumulation=4)
    wanted = {"ready": 40, "started": 40, "processed": 40, "completed": 39}
    assert progress == {"total": wanted, "current": wanted, "is_last_batch": False}
    assert untouched["global_step"] == checkpoint["global_step"]


def test_whole_sequences_are_not_packed() -> None:
    """Where each document fills a sequence, rows of a batch give the same loss and gradients."""
    module, packed = make_module(), make_batch(range(3))
    packed["cu_seqlens"] = torch.arange(0, 3 * LENGTH + 1, LENGTH, dtype=torch.int32)
    rows = module.on_before_batch_transfer(packed, 0)
    assert rows["cu_seqlens"] is None and rows["tokens"].shape == rows["labels"].shape == (3, LENGTH)
    results = []
    for batch in (packed, rows):
        module.zero_grad()
        loss = module.loss_sum(batch)[0]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        # the temperature is float32 whatever the model is: a few roundings
        rounding = 4 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=rounding)
    mixed = module.on_before_batch_transfer(make_batch(range(3)), 0)
    assert mixed["cu_seqlens"] is not None and mixed["tokens"].shape == (1, 3 * LENGTH)


@pytest.mark.parametrize("option", ["auto", "none"])
@pytest.mark.parametrize("active", [True, False])
def test_flash_attention_is_asked_for_and_left_for_validation(
    option: str, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the dtype of the run's products; what a failed run in this process left is put back first."""
    calls: list[object] = []
    monkeypatch.setattr("training.step.flash_attention.activate", lambda *given: calls.append(given))
    monkeypatch.setattr("training.module.deactivate", lambda: calls.append("back") or active)
    monkeypatch.setattr("training.module.reactivate", lambda: calls.append("on"))
    module = make_module(flash_attention=option)
    module.trainer = Trainer(
        accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, enable_checkpointing=False
    )
    module.setup("validate")
    assert calls == ["back"]  # nothing is trained
    module.setup("fit")
    asked = [([module.network_config], torch.device("cpu"), torch.bfloat16, 1, False)]
    assert calls[1:] == ["back", *(asked if option == "auto" else [])]
    calls.clear()
    module.on_validation_start()
    assert calls == ["back"]
    module.on_validation_end()
    assert calls == ["back", *["on"] * active]
    module.teardown("fit")
    assert calls[-1] == "back"


ELSEWHERE = "flash-attn-4 cannot be used on another rank: attention by torch's own kernels"


@pytest.mark.parametrize(
    ("here", "others", "rank", "told"),
    [
        (True, True, 0, "attention by a peer"),
        (True, True, 3, ""),
        (True, False, 0, ELSEWHERE),
        (True, False, 3, ""),
        (False, True, 0, "no kernels"),
        (False, True, 3, "rank 3: no kernels"),
        (False, False, 0, "no kernels"),
        (False, False, 3, ""),  # what all ranks have to say the first one says
    ],
)
def test_flash_attention_on_all_ranks_or_none(
    here: bool, others: bool, rank: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[str] = []
    monkeypatch.setattr(flash_attention, "activate", lambda *given: "attention by a peer" if here else "no kernels")
    monkeypatch.setattr(flash_attention, "is_active", lambda: here)
    monkeypatch.setattr(flash_attention, "deactivate", lambda: left.append("back"))
    strategy: Any = SimpleNamespace(
        root_device=None, global_rank=rank, is_global_zero=rank == 0,
        reduce_boolean_decision=lambda decision, all: (decision and others) if all else (decision or others),
    )  # fmt: skip
    monkeypatch.setattr("training.tracking.rank_zero_only.rank", rank)
    flash_attention.take_flash_attention(strategy, [], None, 1, False)
    assert capsys.readouterr().err == (told and told + "\n")
    assert left == ["back"] * (here and not others)
