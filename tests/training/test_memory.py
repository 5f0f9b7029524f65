"""The memory estimate against what training keeps and allocates."""

import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import model.transformer
import training.module
from benchmarks.train_memory import network_of
from model.attention import make_metadata
from model.config import AttentionConfig, ModelConfig
from model.sequence_parallel import SequenceShards
from tests.training.conftest import ROOT
from training.distributed.config import BUCKET_ELEMENTS
from training.memory import command, workspace
from training.memory.activations import block_activations
from training.memory.estimate import estimate
from training.memory.setup import Setup
from training.memory.states import parameter_count
from training.module import LanguageModule
from training.step.activations import KeepOnHost
from training.step.optim import OptimizerConfig, parameter_groups
from training.throughput import GIB

TOKENS, LENGTH = 512, 256
BASE: dict[str, Any] = dict(vocab_size=128, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=160)
MODELS = {
    "asentmax-nape": ModelConfig(**BASE),
    "entmax-nope-fixed-qk_norm": ModelConfig(
        **BASE, positions="nope", qk_norm=True, attention=AttentionConfig(kind="entmax", learn_alpha=False)
    ),
    "softmax-rope": ModelConfig(**BASE, positions="rope", attention=AttentionConfig(kind="softmax")),
    "ssmax-rope-untied": ModelConfig(
        **BASE, positions="rope", tie_embeddings=False, attention=AttentionConfig(kind="ssmax")
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "offload": {"activation_checkpointing": "offload"},
    "tiled": {"mlp_tile_tokens": 100},
    "full-tiled": {"activation_checkpointing": "full", "mlp_tile_tokens": 100},
}


def make(network: ModelConfig, precision: str = "32-true", **options: Any) -> tuple[LanguageModule, Setup]:
    torch.manual_seed(0)
    options = {"loss_chunk_tokens": 128, **options}
    module = LanguageModule(network, OptimizerConfig(), loss_backend="chunked", **options)
    setup = Setup(
        network=network, tokens=TOKENS, sequence_length=LENGTH, cuda=False, precision=precision, **options
    )  # fmt: skip
    return module, setup


def batch(slices: int = 1) -> dict[str, Any]:
    bounds = torch.tensor([0, LENGTH, TOKENS], dtype=torch.int32)
    tokens = torch.randint(128, (1, TOKENS // slices))
    return {"tokens": tokens, "labels": tokens.clone(), "cu_seqlens": bounds, "max_seqlen": LENGTH}


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that are saved for backward, parameters excluded."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(self.pack, lambda x: x)
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


def compile_without_inductor(module: LanguageModule) -> None:
    """Divides forward from backward as for a GPU, without compiling C++."""
    for block in module.model.blocks:
        block.compile(backend="aot_eager_decomp_partition")


def measured_activations(module: LanguageModule, setup: Setup) -> int:
    saved, data = Saved(module), batch(setup.sequence_parallel)

    def recorded(*args: Any, **kwargs: Any) -> Any:  # blocks that are checkpointed hold what all layers share
        metadata = make_metadata(*args, **kwargs)
        for x in (metadata.log_position, *(metadata.rotary or ())):
            saved.pack(x)
        return metadata

    with saved, autocast(setup.precision), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.transformer, "make_metadata", recorded)
        module.training_step(data, 0)
    return saved.bytes + data["tokens"].nbytes + data["labels"].nbytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "offload"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_kept_for_backward(name: str, mode: str, precision: str) -> None:
    module, setup = make(MODELS[name], precision, **MODES[mode])
    found = measured_activations(module, setup)
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("name", "mode"), [("asentmax-nape", "none"), ("asentmax-nape", "tiled")])
def test_activations_that_compiled_blocks_keep(name: str, mode: str, precision: str) -> None:
    module, setup = make(MODELS[name], precision, **MODES[mode])
    compile_without_inductor(module)
    found = measured_activations(module, setup)
    assert estimate(replace(setup, compiled=True)).lasting["activations"].bytes == pytest.approx(found, rel=0.03)


def test_softmax_with_a_bias_on_cpu_keeps_its_weights() -> None:
    module, setup = make(replace(MODELS["softmax-rope"], positions="nape"))
    found = measured_activations(module, setup)
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.1)


def test_offloaded_inputs_are_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, moved = [], []

    class Recorded(KeepOnHost):
        def _pack(self, x: Tensor) -> Any:
            packed = super()._pack(x)
            (kept if isinstance(packed, Tensor) else moved).append(x.untyped_storage())
            return packed

    monkeypatch.setattr(training.module, "KeepOnHost", Recorded)
    module, setup = make(MODELS["asentmax-nape"], **MODES["offload"])
    module.training_step(data := batch(), 0)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    device = {s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in parameters}
    found = estimate(setup)
    labels = data["labels"].nbytes  # the embedding has saved the token ids
    assert found.host["blocks' inputs (pinned)"].bytes == sum(s.nbytes() for s in moved)
    shared = TOKENS * 4  # positions' logarithms, which the blocks hold
    assert found.lasting["activations"].bytes == pytest.approx(sum(device.values()) + labels + shared, rel=0.02)


@pytest.mark.parametrize(
    ("heads", "mode", "compiled"), [((4, 2), "none", False), ((4, 1), "none", False), ((4, 2), "full", True)]
)
def test_activations_of_ranks_that_share_a_sequence(heads: tuple[int, int], mode: str, compiled: bool) -> None:
    """One rank of two, whose partner's part of each exchange is made up."""
    network = replace(MODELS["asentmax-nape"], n_heads=heads[0], n_kv_heads=heads[1])
    module, setup = make(network, **MODES[mode])
    if compiled:
        compile_without_inductor(module)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        module.shards = SequenceShards(distributed.group.WORLD, 0, 2)  # type: ignore[arg-type]
        setup = replace(setup, sequence_parallel=2, ranks=2)
        found = measured_activations(module, setup)
    finally:
        distributed.destroy_process_group()
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.02)


class LiveBytes(TorchDispatchMode):
    """The highest sum of bytes of tensors that exist at one time: `lasting` and what operations make in the context."""

    def __init__(self, lasting: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        for x in lasting:
            self.add(x.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and x.device.type == "cpu":
                self.add(x.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_of_two_steps(module: LanguageModule, precision: str, accumulation: int) -> int:
    optimizer = torch.optim.AdamW(parameter_groups(module.model, OptimizerConfig(), fused=True))
    data = batch()
    with LiveBytes([*module.parameters(), data["tokens"], data["labels"]]) as live:
        for micro_batch in range(2 * accumulation):
            with autocast(precision):
                loss = module.training_step(data, 0)["loss"]
            if micro_batch % accumulation == 0:  # as Lightning: between forward and backward
                optimizer.zero_grad()
            loss.backward()
            if (micro_batch + 1) % accumulation == 0:
                optimizer.step()
    return live.peak


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "offload"])
@pytest.mark.parametrize("name", ["asentmax-nape", "softmax-rope", "ssmax-rope-untied"])
def test_estimated_peak_is_near_the_measured(
    name: str, mode: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workspace.BLOCKWISE_BYTES, False, 0)  # temporaries inside a kernel are not seen here
    module, setup = make(MODELS[name], precision, **MODES[mode])
    for accumulation in (1, 2):
        found = peak_of_two_steps(module, precision, accumulation)
        expected = estimate(replace(setup, keeps_gradients=accumulation > 1))
        assert expected.total == pytest.approx(found, rel=0.05)


def test_states_are_exact() -> None:
    module, setup = make(MODELS["ssmax-rope-untied"])
    optimizer = torch.optim.AdamW(parameter_groups(module.model, OptimizerConfig(), fused=False))
    module.training_step(batch(), 0)["loss"].backward()
    optimizer.step()
    parameters = list(module.parameters())
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    found = estimate(setup).lasting
    assert found["parameters"].bytes == sum(p.nbytes for p in parameters)
    assert found["gradients"].bytes == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert found["optimizer state"].bytes == sum(x.nbytes for x in moments)


def test_zero_divides_states_by_stage() -> None:
    setup = Setup(MODELS["softmax-rope"], 1024, 1024, ranks=8, precision="bf16-mixed")
    count = parameter_count(setup.network)
    one, two, three = (estimate(replace(setup, zero_stage=stage)).lasting for stage in (1, 2, 3))
    assert one["parameters"].bytes == 2 * count and one["gradients"].bytes == 4 * count
    assert one["optimizer state"].bytes == 12 * count / 8
    assert two["gradients"].bytes == 4 * count / 8 + 2 * 4 * BUCKET_ELEMENTS
    assert three["parameters"].bytes == 2 * (count / 8 + count)  # a small model is gathered whole
    offloaded = estimate(replace(setup, zero_stage=1, offload_optimizer=True))
    assert offloaded.lasting["optimizer state"].bytes == 0
    assert offloaded.host["optimizer state"].bytes == 12 * count / 8


def test_what_makes_room_makes_room() -> None:
    """On CUDA: each option lowers the peak of a long context; Triton keeps what its custom operator returns."""
    network = ModelConfig(**{**BASE, "n_layers": 8, "d_ff": 256})
    plain = Setup(network, 65536, 65536, precision="bf16-mixed", loss_backend="liger")
    steps = [
        plain, replace(plain, activation_checkpointing="full"), replace(plain, activation_checkpointing="offload"),
        replace(plain, activation_checkpointing="offload", mlp_tile_tokens=4096),
        replace(plain, activation_checkpointing="offload", mlp_tile_tokens=4096, sequence_parallel=2, ranks=2),
    ]  # fmt: skip
    totals = [estimate(setup).total for setup in steps]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0] / 4
    operands = 65536 * 16 * 2 * (4 + 2 * 2)
    returned = 65536 * (16 * 4 * 4 + 4 * 4) + 4 * 65536**2 / 64**2 / 8 + 8 * 65536
    assert block_activations(plain)["attention"] == operands + returned
    # at 32,768 tokens also a bit for each key and tile of queries and for each query and tile of keys
    shorter = (operands + 65536 * (16 * 4 * 4 + 4 * 4) + 8 * 65536) / 2 + 4 * 32768**2 / 8 * (1 / 64**2 + 2 / 64)
    assert block_activations(replace(plain, tokens=32768, sequence_length=32768))["attention"] == shorter


@pytest.mark.parametrize(("tokens", "measured"), [(131072, 22.00), (786432, 40.84 + 8.20)])
def test_compiled_blocks_with_tiles_as_on_two_h200(tokens: int, measured: float) -> None:
    """GiB of results/training_speed, "Two GPUs that share one sequence"; the longer ended before AdamW's moments."""
    setup = Setup(
        network_of("1b", "softmax"), tokens, tokens, ranks=2, sequence_parallel=2, precision="bf16-mixed",
        loss_backend="liger", activation_checkpointing="offload", mlp_tile_tokens=16384, compiled=True,
    )  # fmt: skip
    assert estimate(setup).total / GIB == pytest.approx(measured, rel=0.1)
    untiled = replace(setup, mlp_tile_tokens=0)  # the feed-forward layer's part is the larger one
    assert estimate(untiled).total == estimate(replace(untiled, compiled=False)).total


FULL, OFFLOAD = MODES["full"], MODES["offload"]
TILES = {"mlp_tile_tokens": 2048}
COMPILED: dict[str, Any] = {"compiled": True, "keeps_gradients": False}
PEAKS: list[tuple[str, int, dict[str, Any], float]] = [
    # softmax: model, tokens, options, GiB on an H200 (results/training_speed)
    ("125m", 8192, {}, 5.63),
    ("125m", 8192, TILES, 4.03),
    ("125m", 8192, FULL, 2.62),
    ("125m", 8192, OFFLOAD, 2.36),
    ("125m", 8192, OFFLOAD | TILES, 2.27),
    ("125m", 32768, {}, 15.88),
    ("125m", 32768, TILES, 9.78),
    ("125m", 32768, FULL, 4.48),
    ("125m", 32768, OFFLOAD, 3.45),
    ("125m", 32768, OFFLOAD | TILES, 2.90),
    ("30m", 8192, COMPILED, 1.70),
    ("1b", 131072, FULL | COMPILED, 47.6),
    ("1b", 262144, FULL | COMPILED, 82.5),
    ("1b", 393216, FULL | COMPILED, 117.5),
    ("1b", 32768, COMPILED, 61.0),
]


@pytest.mark.parametrize(("model", "tokens", "options", "measured"), PEAKS)
def test_peaks_measured_on_a_gpu(model: str, tokens: int, options: dict[str, Any], measured: float) -> None:
    setup = Setup(
        network_of(model, "softmax"), tokens, tokens, precision="bf16-mixed", loss_backend="liger", **options
    )  # fmt: skip
    found = estimate(setup)
    peak = found.total
    if model == "1b":  # benchmarks/train_speed.py gives gradients back before the next step's forward pass
        loss = found.during("loss") - found.lasting["gradients"].bytes
        peak = max(loss, *(found.during(phase) for phase in found.phases if phase != "loss"))
    assert peak / GIB == pytest.approx(measured, rel=0.055)


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
    assert run(monkeypatch, *CONFIGS, "--trainer.num_nodes", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1,102,934,080 parameters, 32,768 tokens a rank and micro-batch (16 ranks, 4 share")
    assert any(line.split()[:3] == ["parameters", "4.11", "GiB"] for line in lines)
    assert any("peak per device" in line for line in lines) and "blocks' inputs (pinned)" in lines[-1]


@pytest.mark.parametrize("mode", ["none", "full", "offload"])
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


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options, part in (
        (("--trainer.devices", 6), "sequence_parallel is 4: expected a divisor of the 6 ranks"),
        (("--trainer.precision", "16-mixed"), "trainer.precision is '16-mixed'"),
        (("--model.network.n_layerz", 6), "model.network.n_layerz"),
    ):
        assert run(monkeypatch, *CONFIGS, *options) == 2
        assert part in capsys.readouterr().err
