"""Training towards a teacher's predictions, as a user starts it, and the module's step."""

import copy
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.checkpoint import checkpoint_folder, resolve_checkpoint
from model.config import AttentionConfig, ModelConfig
from model.export import export
from model.flops import train_flops
from model.loading import load_model
from model.transformer import Transformer
from tests.training.conftest import (
    ROOT,
    TrainProcess,
    assert_same_weights,
    corpus,
    logged,
    other_corpus,
    stored_tensors,
    tiny_config,
    train,
)
from tests.training.test_module import LENGTH, make_batch, make_module
from training.module import LanguageModule
from training.step.loss import IGNORE_INDEX
from training.step.teacher import DistillConfig, Teacher, load_teacher

__all__ = ["corpus", "other_corpus", "tiny_config", "train"]  # fixtures
ATTENTION = ROOT / "configs" / "attention"
SOFTMAX, ENTMAX, DMS = (ATTENTION / f"{name}.yaml" for name in ("softmax", "entmax", "dms"))
EVERY = ("--trainer.log_every_n_steps", 1)


def distill(teacher: object, **more: object) -> tuple[object, ...]:
    given = {"teacher": teacher, **more}
    return tuple(part for name, value in given.items() for part in (f"--model.distill.{name}", value))


def metric(run: Path, name: str) -> dict[int, float]:
    rows = [row for path in sorted(run.glob("metrics/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


@pytest.fixture(scope="module")
def softmax(train: TrainProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished softmax run of 20 steps."""
    run = tmp_path_factory.mktemp("teacher") / "softmax"
    ended = train("--run_dir", run, configs=(SOFTMAX,))
    assert ended.returncode == 0, ended.stderr
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_student_that_starts_as_its_teacher(
    precision: str, softmax: Path, train: TrainProcess, tmp_path: Path
) -> None:
    """Both make the same products of the same weights: the divergence of the first step is zero, not small."""
    options = ("--trainer.max_steps", 3, *EVERY, "--trainer.precision", precision, "--validation.every_n_steps", 3)
    ended = train("--run_dir", tmp_path, "--init_from", softmax, *distill(softmax), *options, configs=(SOFTMAX,))
    assert ended.returncode == 0, ended.stderr
    assert f"distilling from {checkpoint_folder(softmax, 20)} (step 20)" in ended.stderr
    kl, loss = metric(tmp_path, "train/distill_kl"), metric(tmp_path, "train/loss")
    assert kl[1] == 0 and metric(tmp_path, "train/grad_norm")[1] == 0
    assert 2 < loss[1] < 6 and 2 < metric(tmp_path, "val/loss")[3] < 6  # token losses
    stored = stored_tensors(tmp_path, 3)  # the student and its optimizer alone
    own = {name for name, _ in load_model(tmp_path).model.named_parameters()}
    assert {key.partition("/")[2] for key in stored} == own and len(stored) == 3 * len(own)
    assert len(own) == len(list(load_model(softmax).model.parameters()))


def test_training_lowers_the_divergence_of_another_attention_and_resumes_bit_by_bit(
    softmax: Path, train: TrainProcess, tmp_path: Path
) -> None:
    """A fresh entmax student comes nearer to a softmax model, and a run that stops in between ends the same."""
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved"
    options = ("--trainer.max_steps", 30, "--checkpoint.every_n_steps", 15, *EVERY)
    given = distill(softmax, temperature=2)
    ended = train("--run_dir", whole, *options, *given, configs=(ENTMAX,))
    assert ended.returncode == 0, ended.stderr
    kl = metric(whole, "train/distill_kl")
    assert kl[1] > 0.1 and max(kl[step] for step in range(26, 31)) < kl[1] / 4, kl
    shutil.copytree(whole, parts)
    shutil.rmtree(checkpoint_folder(parts, 30))
    shutil.copytree(softmax, moved)  # who the teacher is does not depend on where it lies
    again = train("--run_dir", parts, "--resume", "auto", *options, *distill(moved, temperature=2), configs=(ENTMAX,))
    assert again.returncode == 0 and "from step 15 to 30" in again.stderr + again.stdout, again.stderr
    assert "changed since" not in again.stderr
    assert_same_weights(whole, parts)
    assert {step: value for step, value in metric(parts, "train/distill_kl").items() if step > 15} == {
        step: value for step, value in kl.items() if step > 15
    }
    for name, value in stored_tensors(whole, 30).items():
        assert torch.equal(value, stored_tensors(parts, 30)[name]), name


def test_an_exported_teacher(softmax: Path, train: TrainProcess, tmp_path: Path) -> None:
    """Weights rounded to bfloat16, computed with in float32: a small divergence from where they come from."""
    export(softmax, tmp_path / "exported", torch.bfloat16)
    found = {}
    for name, teacher in (("exported", tmp_path / "exported"), ("early", checkpoint_folder(softmax, 15))):
        options = ("--init_from", softmax, *distill(teacher), "--trainer.max_steps", 2, *EVERY)
        ended = train("--run_dir", tmp_path / name, *options, configs=(SOFTMAX,))
        assert ended.returncode == 0, ended.stderr
        found[name] = metric(tmp_path / name, "train/distill_kl")[1]
    assert 0 < found["exported"] < 1e-3 * found["early"], found


def test_another_teacher_needs_leave(softmax: Path, train: TrainProcess, tmp_path: Path) -> None:
    run, other = tmp_path / "run", checkpoint_folder(softmax, 15)
    assert train("--run_dir", run, *distill(softmax), configs=(SOFTMAX,)).returncode == 0
    resumed = ("--run_dir", run, "--resume", "auto", "--trainer.max_steps", 22)
    settings = json.loads((checkpoint_folder(run, 20) / "complete.json").read_text())["settings"]
    assert settings["model.distill.teacher"].endswith(" (step 20)") and settings["model.distill.weight"] == 1
    leave = ("--allow_changes", "[trainer.max_steps]")
    for given, now in ((distill(other), "step 15"), ((), "None")):
        refused = train(*resumed, *given, *leave, configs=(SOFTMAX,))
        line = refused.stderr.splitlines()[-1]
        assert refused.returncode == 2 and line.startswith("error: model.distill.teacher "), refused.stderr
        assert "(step 20) (config: " in line and now in line and '--allow_changes "[model.distill.teacher]"' in line
    leave = ("--allow_changes", "[trainer.max_steps,model.distill.teacher]")
    done = train(*resumed, *distill(other, weight=0.5), *leave, configs=(SOFTMAX,))
    assert done.returncode == 0, done.stderr
    assert "model.distill.teacher " in done.stderr and "model.distill.weight 1.0 (config: 0.5)" in done.stderr


def test_micro_batches_ranks_and_recomputation_change_nothing(
    softmax: Path, train: TrainProcess, tmp_path: Path
) -> None:
    """Means over all ranks and micro-batches, whatever their sizes, their numbers of labels, and who holds what."""
    two = ("--trainer.devices", 2, "--data.micro_batch_size", 1)
    ways: dict[str, tuple[object, ...]] = {
        "small": ("--data.micro_batch_size", 1),
        "large": ("--data.micro_batch_size", 4, "--model.loss_chunk_tokens", 50),
        "full": ("--model.activation_checkpointing", "full", "--model.mlp_tile_tokens", 16),
        "two": two,
        "shared": ("--trainer.devices", 2, "--parallel.sequence_parallel", 2),
        **{f"stage {number}": (*two, "--parallel.zero_stage", number) for number in (1, 3)},
    }
    found = []
    for name, more in ways.items():
        given = distill(softmax, weight=0.7, temperature=1.5)
        ended = train("--run_dir", tmp_path / name, "--trainer.max_steps", 4, *EVERY, *given, *more, configs=(ENTMAX,))
        assert ended.returncode == 0, ended.stderr
        run = tmp_path / name
        found.append([list(metric(run, f"train/{key}").values()) for key in ("distill_kl", "loss", "grad_norm")])
    assert len(found[0][0]) == 4 and min(found[0][0]) > 0.01
    for kl, loss, norm in found[1:]:  # float32 sums in another order
        assert kl == pytest.approx(found[0][0], rel=1e-4) and loss == pytest.approx(found[0][1], rel=1e-4)
        assert norm == pytest.approx(found[0][2], rel=1e-3)


def test_the_retrofit_of_dms(softmax: Path, train: TrainProcess, tmp_path: Path) -> None:
    """Its loss is the divergence and the share of evicted tokens that is missing."""
    sizes = tuple(
        f"--model.network.attention.dms.{name}={value}"
        for name, value in {"window": 8, "compression": 4, "ramp_steps": 10}.items()
    )
    ended = train(
        "--run_dir", tmp_path, "--init_from", softmax, *distill(softmax), *EVERY, *sizes, "--trainer.max_steps", 40,
        "--checkpoint.every_n_steps", 40, configs=(DMS,),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    kl, evicted = metric(tmp_path, "train/distill_kl"), metric(tmp_path, "train/evicted")
    assert kl[1] < 0.01 and evicted[1] < 0.2 and min(evicted[step] for step in range(36, 41)) > 0.7
    losses = logged(tmp_path)
    assert losses[40][0] < losses[1][0] + 0.5  # what is evicted costs no more than that


def test_a_teacher_of_another_tokenizer_is_refused(
    softmax: Path, other_corpus: Path, train: TrainProcess, tmp_path: Path
) -> None:
    sources = ("--data.sources", json.dumps([{"path": str(other_corpus)}]))
    refused = train("--run_dir", tmp_path / "new", *sources, *distill(softmax), configs=(SOFTMAX,))
    line = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2 and line.startswith(f"error: {checkpoint_folder(softmax, 20)} was trained with")
    assert line.endswith("use the data it was trained on, or another model.distill.teacher")


def make_teacher(kind: Any = "softmax", **sizes: Any) -> Teacher:
    torch.manual_seed(7)
    given: dict[str, Any] = dict(vocab_size=50, n_layers=1, d_model=24, n_heads=2, n_kv_heads=2, d_ff=40)
    network = ModelConfig(**{**given, **sizes}, attention=AttentionConfig(kind=kind))
    return Teacher(Transformer(network).double(), Path("teacher"), 0)


def distilled(weight: float, **options: Any) -> LanguageModule:
    """In float64, with a teacher of other sizes."""
    module = make_module(distill=DistillConfig("teacher", weight, 1.3), **options)
    module.teacher = make_teacher()
    return module


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_gradients_are_of_the_sum_over_labels_over_all_tokens(weight: float) -> None:
    """Of the definition, whatever the micro-batches, with z-loss beside it; validation has the token loss alone."""
    module, batch = distilled(weight, z_loss=0.05), make_batch(range(4))
    assert module.teacher is not None
    documents = batch["tokens"], batch["cu_seqlens"], LENGTH
    valid, tokens = batch["labels"].flatten() != IGNORE_INDEX, batch["labels"].numel()
    logits = module.model.logits(module.model(*documents)).flatten(0, 1)
    teacher = module.teacher.model
    with torch.no_grad():
        log_q = torch.log_softmax(teacher.logits(teacher(*documents)).flatten(0, 1) / 1.3, dim=1)
    log_p = torch.log_softmax(logits / 1.3, dim=1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1)[valid].sum()
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    z_loss = 0.05 * logits.logsumexp(1)[valid].square().sum()
    wanted = ((1 - weight) * loss + weight * 1.3**2 * kl + z_loss) / tokens
    expected = torch.autograd.grad(wanted, list(module.model.parameters()))
    for micro_batch in (1, 2, 4):
        module.zero_grad()
        for start in range(0, 4, micro_batch):
            part = make_batch(range(start, start + micro_batch))
            (module.training_step(part, 0)["loss"] * micro_batch / 4).backward()
        for (name, parameter), gradient in zip(module.model.named_parameters(), expected, strict=True):
            assert parameter.grad is not None
            error = (parameter.grad - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error:.2e}"  # attention computes partly in float32
    sums = module.loss_sum(batch)
    torch.testing.assert_close(sums[1:4], torch.stack([loss, z_loss, kl]).detach(), rtol=1e-6, atol=0)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    module.eval()
    assert module.loss_sum(batch)[0] == module.loss_sum(batch)[1] and module.loss_sum(batch)[3] == 0
    torch.testing.assert_close(module.loss_sum(batch)[0], loss, rtol=1e-6, atol=0)


def test_the_teacher_is_no_part_of_the_module() -> None:
    with_teacher, without = distilled(1.0), make_module()
    assert with_teacher.state_dict().keys() == without.state_dict().keys()
    assert len(list(with_teacher.modules())) == len(list(without.modules()))
    assert with_teacher.teacher is not None and not with_teacher.teacher.model.training
    with_teacher.train()
    assert not with_teacher.teacher.model.training
    with_teacher.teacher = None
    with pytest.raises(RuntimeError, match="is to be loaded"):
        with_teacher.training_step(make_batch(range(1)), 0)


def test_flops_count_the_teachers_forward_pass() -> None:
    module, plain = distilled(1.0), make_module()
    lengths = make_batch(range(2))["cu_seqlens"].diff().tolist()
    assert module.teacher is not None
    more = train_flops(module.teacher.model.config, lengths) / 3
    found = [one.on_before_batch_transfer(make_batch(range(2)), 0)["flops"] for one in (module, plain)]
    assert found[0] == pytest.approx(found[1] + more)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_matrices_in_bfloat16_predict_what_autocast_does(qkv_bias: bool) -> None:
    """Bit for bit, since autocast casts them likewise."""
    sizes = dict(qkv_bias=qkv_bias, positions="rope", tie_embeddings=False)
    tokens, whole = torch.arange(30)[None] % 50, make_teacher(**sizes).model.float()
    teacher = Teacher(copy.deepcopy(whole), Path("teacher"), 0)
    teacher.place(torch.device("cpu"), "bf16-mixed", compile=False, tile_tokens=7)
    assert teacher.model.layers()[0].attention.wq.weight.dtype == torch.bfloat16
    assert teacher.model.embedding.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = whole(tokens)
    assert torch.equal(teacher.hidden(tokens, None, 30, None), expected)


def test_identity_is_that_of_the_weights(softmax: Path) -> None:
    last, before = (resolve_checkpoint(path) for path in (softmax, checkpoint_folder(softmax, 15)))
    identity = load_teacher(last).identity
    assert load_teacher(last, "size").identity == identity and identity.endswith(" (step 20)")
    assert load_teacher(before).identity.split()[0] != identity.split()[0]


def test_what_is_compiled_is_compiled_in_the_first_step() -> None:
    """Student and teacher, for both forms of a micro-batch."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    plain, module = distilled(0.5), distilled(0.5)
    for one in (plain, module):
        one.teacher = make_teacher("entmax")
    module.compiled = True
    assert module.teacher is not None
    for block in (*module.model.blocks, *module.teacher.model.blocks):
        block.compile(backend=backend)
    data = SimpleNamespace(sequence_length=LENGTH, task=SimpleNamespace(name=None))
    module.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    whole = {**make_batch(range(2)), "cu_seqlens": torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)}
    packed = {**make_batch(range(2)), "cu_seqlens": torch.tensor([0, 5, 19, 31, 2 * LENGTH], dtype=torch.int32)}
    compiled, gradients = [], []
    for batch in (whole, {**packed, "max_seqlen": 17}, whole, make_batch(range(2))):
        for one in (plain, module):
            one.zero_grad()
            one.training_step(one.on_before_batch_transfer(batch, 0), 0)["loss"].backward()
        gradients = [[weight.grad for weight in one.parameters()] for one in (plain, module)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-14)
        compiled.append(len(graphs))
    assert compiled == [compiled[0]] * 4 and compiled[0] >= 4


def test_a_compiled_teacher_is_compiled_whatever_its_student_has_used_up() -> None:
    """torch counts recompilations of both together, since their blocks are one class's."""
    network = ModelConfig(32, 1, 16, 2, 2, 32, attention=AttentionConfig(kind="softmax"))
    student, teacher = Transformer(network), Teacher(Transformer(network), Path("teacher"), 0)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        for model in (student, teacher.model):
            model.compile_blocks = lambda model=model: [  # type: ignore[method-assign,misc]
                block.compile(backend=backend, dynamic=False) for block in model.blocks
            ]
        student.compile_blocks()
        teacher.place(torch.device("cpu"), "32-true", compile=True, tile_tokens=0)
        for length in range(2, 10):
            student(torch.zeros(1, length, dtype=torch.int64), None, length)
        used = len(compiled)
        teacher.hidden(torch.zeros(1, 20, dtype=torch.int64), None, 20, None)
    torch._dynamo.reset()
    assert used >= 8 and len(compiled) > used
