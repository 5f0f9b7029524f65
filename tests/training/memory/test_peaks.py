"""The estimated peak against peaks of this machine and of GPUs."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import training.step.float8
from benchmarks.train_memory import network_of
from model.config import AttentionConfig, HierarchicalConfig, ModelConfig
from tests.training.memory.helpers import MODELS, MODES, autocast, batch, make, needs_float8_by_row
from training.memory import workspace
from training.memory.estimate import estimate
from training.memory.setup import Setup
from training.module import LanguageModule
from training.step.optim import OptimizerConfig, parameter_groups
from training.throughput import GIB


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
    frozen = [] if module.teacher is None else list(module.teacher.model.parameters())
    with LiveBytes([*module.parameters(), *frozen, data["tokens"], data["labels"]]) as live:
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


LARGE = ModelConfig(
    vocab_size=128, n_layers=2, d_model=128, n_heads=8, n_kv_heads=2, d_ff=320, positions="rope",
    attention=AttentionConfig(kind="softmax"),
)  # fmt: skip
WIDE = replace(LARGE, vocab_size=4096)  # logits are the peak


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("teacher", [MODELS["softmax-rope"], LARGE, WIDE], ids=["as large", "larger", "many words"])
@pytest.mark.parametrize(("mode", "accumulation"), [("none", 1), ("full-tiled", 2)])
def test_estimated_peak_with_a_teacher(
    mode: str, accumulation: int, teacher: ModelConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workspace.BLOCKWISE_BYTES, False, 0)
    network = replace(MODELS["asentmax-nape"], vocab_size=teacher.vocab_size)
    module, setup = make(network, precision, teacher, **MODES[mode])
    found = peak_of_two_steps(module, precision, accumulation)
    expected = estimate(replace(setup, keeps_gradients=accumulation > 1))
    assert expected.total == pytest.approx(found, rel=0.05)
    assert teacher is not WIDE or expected.peak_phase == "loss"


@pytest.mark.parametrize("name", ["nsa-rope", "dsa-rope", "dms-rope", "hierarchical-rope"])
@pytest.mark.parametrize("mode", ["none", "full", "tiled"])
def test_estimated_peak_of_what_is_trained_sparse(mode: str, name: str) -> None:
    """In float32: with bfloat16 a CPU makes masks of numbers in float32 beside it."""
    module, setup = make(MODELS[name], **MODES[mode])
    found = peak_of_two_steps(module, "32-true", 1)
    assert estimate(replace(setup, keeps_gradients=False)).total == pytest.approx(found, rel=0.05)


def test_estimated_peak_where_blocks_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside few weights of tokens at a time: more numbers than those take, with blocks of 4 tokens."""
    for module_name in ("model.visible_attention", "training.memory.hierarchical"):
        monkeypatch.setattr(f"{module_name}.MASK_ELEMENTS", 2**18)
    network = MODELS["hierarchical-rope"]
    sizes = HierarchicalConfig(block=4)
    module, setup = make(replace(network, attention=replace(network.attention, hierarchical=sizes)))
    found = peak_of_two_steps(module, "32-true", 1)
    assert estimate(replace(setup, keeps_gradients=False)).total == pytest.approx(found, rel=0.05)


def like_a_product(a: Tensor, b: Tensor, *_: Any, out_dtype: torch.dtype, **options: Any) -> Tensor:
    """Numbers of its size: a CPU takes 0.1 s for one in FP8."""
    return torch.randn(a.shape[0], b.shape[1], dtype=out_dtype)


@needs_float8_by_row
@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize(
    ("recipe", "mode"), [("tensorwise", "none"), ("rowwise", "full"), ("rowwise_with_gw_hp", "full")]
)
def test_eager_float8_rounds_in_float32(recipe: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workspace.BLOCKWISE_BYTES, False, 0)
    monkeypatch.setattr(training.step.float8, "EMULATED", False)
    monkeypatch.setattr(torch, "_scaled_mm", like_a_product)
    module, setup = make(MODELS["asentmax-nape"], "bf16-mixed", float8=recipe, **MODES[mode])
    for accumulation in (1, 2):
        found = peak_of_two_steps(module, "bf16-mixed", accumulation)
        expected = estimate(replace(setup, keeps_gradients=accumulation > 1))
        assert expected.total == pytest.approx(found, rel=0.05)


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
