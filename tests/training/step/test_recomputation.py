"""What checkpointed blocks keep of attention, and compute once."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.alpha_entmax.launches
import model.visible_attention
from model.config import (
    TRAINED_SPARSE,
    AttentionConfig,
    DMSConfig,
    DSAConfig,
    HierarchicalConfig,
    ModelConfig,
    NSAConfig,
)
from model.kept_operators import ATTENTION
from tests.kernels.helpers import DEVICE, needs_cuda, needs_triton
from training.module import LanguageModule
from training.step.optim import OptimizerConfig

LENGTH, LAYERS = 130, 2
MODES = ("full", "offload", "selective")
COMPILERS = [
    "eager",
    "aot_eager_decomp_partition",  # divides forward from backward as Inductor does
    pytest.param("inductor", marks=needs_cuda),
]


def make_module(mode: str, compiler: str, attention: AttentionConfig, **options: Any) -> LanguageModule:
    torch.manual_seed(0)
    network = ModelConfig(
        vocab_size=50, n_layers=LAYERS, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, attention=attention,
        **{"positions": "nope", **options},
    )  # fmt: skip
    module = LanguageModule(network, OptimizerConfig(), loss_backend="chunked", activation_checkpointing=mode)  # type: ignore[arg-type]
    module.to(DEVICE)
    if compiler != "eager":
        torch._dynamo.reset()
        for block in module.model.blocks:
            block.compile(backend=compiler)
    return module


def gradients(module: nn.Module, documents: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (1, LENGTH), generator=generator).to(DEVICE)
    bounds = torch.tensor([0, 30, LENGTH], dtype=torch.int32, device=DEVICE) if documents else None
    batch = {"tokens": tokens, "labels": tokens.roll(-1), "cu_seqlens": bounds, "max_seqlen": LENGTH, "sample_ids": []}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        loss = module.training_step(batch, 0)["loss"]  # type: ignore[operator]
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    """error: relative, of norms."""
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        assert difference <= error * gradient.norm(), f"{name}: {difference / gradient.norm():.1e}"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of each pass of entmax's forward."""
    counts: Counter[str] = Counter()
    forward = kernels.alpha_entmax.launches._Forward

    def counted(name: str) -> Any:
        run = getattr(forward, name)

        def launch(*args: Any) -> None:
            counts[name] += 1
            run(*args)

        return launch

    for name in ("scan", "refine", "sum"):
        monkeypatch.setattr(forward, name, counted(name))
    return counts


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("mode", MODES)
class TestThresholds:
    pytestmark = needs_triton

    def test_are_found_once(self, mode: str, compiler: str, passes: Counter[str]) -> None:
        """Once a block and step; the sum, which starts from them, a second time where its output is not kept."""
        attention = AttentionConfig(kind="asentmax", backend="triton")
        expected = gradients(make_module("none", compiler, attention), documents=True)
        assert passes == {"scan": LAYERS, "refine": LAYERS, "sum": LAYERS}
        passes.clear()
        found = gradients(make_module(mode, compiler, attention), documents=True)
        assert passes == {"scan": LAYERS, "refine": LAYERS, "sum": LAYERS * (1 if mode == "selective" else 2)}
        # to the bit, but for Inductor, which rounds to bfloat16 elsewhere in a graph that computes a block again
        assert_near(found, expected, 1e-2 if compiler == "inductor" else 0)


@pytest.mark.parametrize("rows", ["at once", "in blocks"])
@pytest.mark.parametrize("compiler", COMPILERS[:2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TRAINED_SPARSE)
def test_what_is_trained_sparse(
    kind: str, mode: str, compiler: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows are recomputed by themselves, within blocks that are; the indexer's loss is added once, and
    what is evicted by noise is so again."""
    if rows == "in blocks":
        monkeypatch.setattr("model.visible_attention.MASK_ELEMENTS", 2 * LENGTH * 40)
        monkeypatch.setitem(model.visible_attention.SCORES_AT_ONCE, "cpu", 1000)
    sizes = {
        "nsa": NSAConfig(8, 4, None, 8, 4, 2, 20),
        "dsa": DSAConfig(2, 8, 12),
        "dms": DMSConfig(window=9, offset=-0.5),
        "hierarchical": HierarchicalConfig(block=8, adaptive_temperature=True),
    }[kind]
    attention = AttentionConfig(kind=kind, **{kind: sizes})  # type: ignore[arg-type]
    expected = gradients(make_module("none", "eager", attention, positions="nape"), documents=True)
    found = gradients(make_module(mode, compiler, attention, positions="nape"), documents=True)
    assert_near(found, expected, 1e-5)  # float32 sums in another order


class Counted(TorchDispatchMode):
    """How often operators of these run, also in compiled blocks, and as what another operator runs."""

    supports_higher_order_operators = True

    def __init__(self, operators: Collection[Any]) -> None:
        super().__init__()
        self.operators, self.count = operators, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(x is operator for operator in self.operators for x in (function, *args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "entmax"])
def test_selective_computes_attention_once(kind: str, documents: bool, compiler: str) -> None:
    """By all other operators too: entmax's in PyTorch, softmax's of this device."""
    attention = AttentionConfig(kind=kind, backend="torch")  # type: ignore[arg-type]
    counts, found = {}, {}
    for mode in ("none", "selective", "full"):
        module = make_module(mode, compiler, attention)
        gradients(module, documents)  # compiles
        module.zero_grad()
        with Counted(ATTENTION) as counted:
            found[mode] = gradients(module, documents)
        counts[mode] = counted.count
    assert counts["full"] == 2 * counts["none"] and counts["selective"] == counts["none"] >= LAYERS
    # compiled, sums of gradients may come in another order
    error = {"eager": 0, "inductor": 1e-2}.get(compiler, 1e-5)
    assert_near(found["selective"], found["none"], error)
    assert_near(found["full"], found["none"], error)


@needs_cuda
def test_selective_computes_compiled_flex_attention_once() -> None:
    """By the names of its kernels: it is no operator that a profiler sees."""
    counts = {}
    for mode in ("none", "selective", "full"):
        module = make_module(mode, "inductor", AttentionConfig(kind="softmax"), positions="nape")
        gradients(module, documents=True)  # compiles
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            gradients(module, documents=True)
        names = [event.key for event in found.key_averages() for _ in range(event.count)]
        flex = [name for name in names if "flex_attention" in name]
        counts[mode] = sum("backward" not in name for name in flex)
    assert counts == {"none": LAYERS, "selective": LAYERS, "full": 2 * LAYERS}


def test_compiled_blocks_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    logger.addHandler(caplog.handler)
    torch._logging._internal.warning_once.cache_clear()
    try:
        gradients(make_module("full", "aot_eager_decomp_partition", AttentionConfig(kind="entmax")), documents=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
