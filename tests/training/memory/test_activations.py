"""What the forward pass keeps for backward, against what training keeps."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import kernels.alpha_entmax.results
import model.transformer
import training.module
import training.step.float8
import training.step.recomputation
from kernels.block_bias.tuning import TABLES as BLOCK_BIAS_TABLES
from model.attention import kept_bits, make_metadata
from model.hierarchical.config import HierarchicalConfig
from model.nsa.blocks import packed_blocks
from model.nsa.selection import block_scores, select_blocks
from model.sequence_parallel import SequenceShards
from tests.kernels.helpers import needs_triton
from tests.training.memory.helpers import LENGTH, MODELS, MODES, NSA, TOKENS, autocast, batch, make, needs_float8_by_row
from training.memory.activations import block_activations, kept_of_attention
from training.memory.dsa import index_workspace
from training.memory.estimate import estimate
from training.memory.hierarchical import (
    QUERY_TILE,
    biased_attention_workspace,
    block_choice_activations,
    block_choice_workspace,
)
from training.memory.nsa import branch_activations, branch_workspace, selection_workspace
from training.memory.setup import Setup
from training.module import LanguageModule
from training.step.activations import KeepOnHost
from training.step.recomputation import _contexts

FLOAT8_MODES = {**MODES, "tiled": {"mlp_tile_tokens": 96}}  # 16 divides its tiles


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


def compile_without_inductor(module: LanguageModule) -> None:
    """Divides forward from backward as for a GPU, without compiling C++."""
    torch._dynamo.reset()  # or blocks stay eager past so many tests
    for block in module.model.blocks:
        block.compile(backend="aot_eager_decomp_partition")


def kept_results(patch: pytest.MonkeyPatch) -> list[dict[Any, Any]]:
    """Gets, for each eager block that is checkpointed, the results of operators that it keeps by itself."""
    storages: list[dict[Any, Any]] = []

    def recorded(kept: Any) -> Any:
        contexts = _contexts(kept)
        storages.append(contexts[0].results)
        return contexts

    patch.setattr(training.step.recomputation, "_contexts", recorded)
    return storages


def measured_activations(module: LanguageModule, setup: Setup) -> int:
    saved, data = Saved(module), batch(setup.sequence_parallel)

    def recorded(*args: Any, **kwargs: Any) -> Any:  # blocks that are checkpointed hold what all layers share
        metadata = make_metadata(*args, **kwargs)
        index_tables = getattr(metadata.sparse, "rotary", None)
        for x in (metadata.log_position, *(metadata.rotary or ()), *(index_tables or ())):
            saved.pack(x)
        return metadata

    with saved, autocast(setup.precision), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.transformer, "make_metadata", recorded)
        kept = kept_results(patch)
        module.training_step(data, 0)
    for x in tree_leaves(list(map(dict, kept))):
        if isinstance(x, Tensor):
            saved.pack(x)
    return saved.bytes + data["tokens"].nbytes + data["labels"].nbytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "offload"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_kept_for_backward(name: str, mode: str, precision: str) -> None:
    module, setup = make(MODELS[name], precision, **MODES[mode])
    found = measured_activations(module, setup)
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("asentmax-nape", mode) for mode in ("none", "tiled", "selective")),
        *((f"{kind}-rope", "none") for kind in ("nsa", "dsa", "dms", "hierarchical")),
    ],
)
def test_activations_that_compiled_blocks_keep(name: str, mode: str, precision: str) -> None:
    module, setup = make(MODELS[name], precision, **MODES[mode])
    compile_without_inductor(module)
    found = measured_activations(module, setup)
    assert estimate(replace(setup, compiled=True)).lasting["activations"].bytes == pytest.approx(found, rel=0.03)


@pytest.mark.usefixtures("emulated_float8")
class TestFloat8:
    @pytest.mark.parametrize(("recipe", "mode"), [("tensorwise", "none"), ("rowwise", "full"), ("rowwise", "tiled")])
    @pytest.mark.parametrize("name", ["asentmax-nape", "softmax-rope"])
    def test_eager_blocks(self, name: str, recipe: Any, mode: str) -> None:
        module, setup = make(MODELS[name], "bf16-mixed", float8=recipe, **FLOAT8_MODES[mode])
        found = measured_activations(module, setup)
        assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.02)

    @needs_float8_by_row
    @pytest.mark.parametrize(
        ("name", "recipe", "mode", "bound"),
        [
            ("asentmax-nape", "tensorwise", "none", 0.01),
            ("asentmax-nape", "rowwise", "tiled", 0.03),
            ("asentmax-nape", "rowwise_with_gw_hp", "none", 0.01),
            ("entmax-nope-fixed-qk_norm", "rowwise", "none", 0.05),  # the second norm's output is computed again
        ],
    )
    def test_compiled_blocks(
        self, name: str, recipe: Any, mode: str, bound: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training.step.float8, "EMULATED", False)
        module, setup = make(MODELS[name], "bf16-mixed", float8=recipe, **FLOAT8_MODES[mode])
        compile_without_inductor(module)
        found = measured_activations(module, setup)
        assert estimate(replace(setup, compiled=True)).lasting["activations"].bytes == pytest.approx(found, rel=bound)


class TestKeptOfAttention:
    pytestmark = needs_triton

    @pytest.fixture(params=["full", "selective"])
    def trained(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[LanguageModule, Setup]:
        """With the Triton kernels, which the estimate expects on CUDA alone, and single keys' bits."""
        monkeypatch.setattr(kernels.alpha_entmax.results, "SHORTEST_KEY_LIST", 0)
        network = MODELS["asentmax-nape"]
        network = replace(network, n_layers=1, attention=replace(network.attention, backend="triton"))
        return make(network, activation_checkpointing=request.param)

    def test_by_triton(self, trained: tuple[LanguageModule, Setup], monkeypatch: pytest.MonkeyPatch) -> None:
        module, setup = trained
        kept = kept_results(monkeypatch)
        module.training_step(batch(), 0)
        found = sum(x.nbytes for x in tree_leaves(list(map(dict, kept))))
        assert kept_of_attention(replace(setup, cuda=True)) == pytest.approx(found, rel=0.02) and found > 0

    @needs_float8_by_row
    @pytest.mark.usefixtures("emulated_float8")
    def test_by_triton_compiled_in_float8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels.alpha_entmax.results, "SHORTEST_KEY_LIST", 0)
        monkeypatch.setattr(training.step.float8, "EMULATED", False)
        network = replace(MODELS["asentmax-nape"], n_layers=1)
        network = replace(network, attention=replace(network.attention, backend="triton"))
        module, setup = make(network, "bf16-mixed", float8="rowwise")
        compile_without_inductor(module)
        found = measured_activations(module, setup)
        ours, cuda = replace(setup, compiled=True), replace(setup, compiled=True, cuda=True)
        blocks = sum(block_activations(cuda).values()) - sum(block_activations(ours).values())
        assert estimate(ours).lasting["activations"].bytes + blocks == pytest.approx(found, rel=0.02)

    def test_by_triton_compiled(self, trained: tuple[LanguageModule, Setup]) -> None:
        module, setup = trained
        compile_without_inductor(module)
        found, setup = measured_activations(module, setup), replace(setup, compiled=True)
        others = estimate(setup).lasting["activations"].bytes - kept_of_attention(setup)
        assert others + kept_of_attention(replace(setup, cuda=True)) == pytest.approx(found, rel=0.015)


def test_softmax_with_a_bias_on_cpu_keeps_its_weights() -> None:
    module, setup = make(replace(MODELS["softmax-rope"], positions="nape"))
    found = measured_activations(module, setup)
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("name", "chosen"), [("nsa-nape", 2 * 32), ("dsa-nape", TOKENS // 8), ("dsa-rope", TOKENS // 8)]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_blocks_of_rows_keep_no_masks(precision: str, name: str, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is chosen, `chosen` bytes a query, which no graph of autograd shows."""
    for module_name in ("model.visible_attention", "training.memory.nsa"):
        monkeypatch.setattr(f"{module_name}.MASK_ELEMENTS", 2**16)
    module, setup = make(MODELS[name], precision)
    found = measured_activations(module, setup) + 3 * TOKENS * chosen
    assert estimate(setup).lasting["activations"].bytes == pytest.approx(found, rel=0.02)


def test_the_indexer_on_cuda() -> None:
    """Scores of the queries that choose together, up to a bound, or in warm-up log-sum-exps of all heads."""
    setup = replace(make(MODELS["dsa-rope"])[1], cuda=True)
    dsa = setup.network.attention.dsa
    assert dsa is not None
    assert index_workspace(setup, dsa) == 4 * TOKENS * (setup.sequence_length + 64)  # a tile's queries
    assert index_workspace(setup, replace(dsa, stage="warmup")) == 4 * TOKENS * (setup.network.n_heads + 2)
    long = replace(setup, tokens=2**17, sequence_length=2**17)
    assert 0.9 * 2**28 < index_workspace(long, dsa) <= 2**28
    assert index_workspace(long, replace(dsa, index_dim=256)) > 2**28


def test_selected_blocks_on_cuda() -> None:
    """Their first keys are kept, 4 bytes each; backward holds shares of dq, up to a bound, and of dk and dv."""
    setup = make(MODELS["nsa-rope"])[1]
    kept = (
        branch_activations(replace(setup, cuda=True), NSA),
        branch_activations(replace(setup, cuda=True), replace(NSA, select_count=3)),
    )
    assert kept[0] - kept[1] == TOKENS * 2 * 4
    rows = TOKENS * 4 * 4 * 16 * 4  # heads, blocks, head dim, bytes
    parts = 2 * (TOKENS / 8 + TOKENS * 4 / 1024)
    keys = 2 * parts * 8 * 16 * 4
    without = branch_workspace(setup, NSA)
    assert branch_workspace(replace(setup, cuda=True), NSA) - without == pytest.approx(rows + keys)
    long = replace(setup, cuda=True, tokens=2**22, sequence_length=2**22)
    shares = 2**30 + 2 * 2 * (2**22 / 8 + 2**22 * 4 / 1024) * 8 * 16 * 4
    assert branch_workspace(long, NSA) - branch_workspace(setup, NSA) * 2**22 / TOKENS == pytest.approx(shares)


def test_selecting_blocks_on_cuda() -> None:
    """By the kernel's reference, which has its result in memory: importance, and the best with their indices."""
    setup = replace(make(MODELS["nsa-rope"])[1], cuda=True)
    blocks = packed_blocks(NSA, TOKENS, torch.tensor([0, LENGTH, TOKENS]), LENGTH, torch.device("cpu"))
    q, k = torch.randn(1, 4, TOKENS, 16), torch.randn(1, 2, len(blocks.first_key), 16)
    written = block_scores(q, k, blocks, slice(0, TOKENS), None).topk(NSA.select_count)
    chosen = select_blocks(q, k, blocks, None)
    importance = 2 * TOKENS * blocks.n_select * 4
    lse = 4 * TOKENS * 4
    expected = importance + lse + written.values.nbytes + written.indices.nbytes + 2 * chosen.nbytes
    assert selection_workspace(setup, NSA) == expected
    assert {"selection"} == estimate(setup).phases.keys() - estimate(replace(setup, cuda=False)).phases.keys()
    long = replace(setup, tokens=2**20, sequence_length=2**20)
    held = selection_workspace(long, NSA) - 2 * 2**20 * chosen[0, :, 0].nbytes
    assert 2**27 <= held < 1.01 * 2**27  # no more than SCORES_AT_ONCE numbers


def test_blocks_with_a_bias_on_cuda() -> None:
    """log p and the log-sum-exp are kept, 4 bytes each; backward of attention has the gradient of log p, and lists."""
    assert {launch.rows for launch in BLOCK_BIAS_TABLES[64].values()} == {QUERY_TILE}
    setup, sizes = replace(make(MODELS["hierarchical-rope"])[1], cuda=True), HierarchicalConfig(block=8)
    kept = [block_choice_activations(setup, replace(sizes, block=block)) for block in (8, 4)]
    assert kept[1] - kept[0] == TOKENS * 4 * 4 * 32  # heads, bytes, blocks more
    assert kept[0] == TOKENS * 16 * 4 * (4 + 2 * 2) + TOKENS * 4 * 4 * (32 + 1)
    lists = 4 * (8 * 32 * 5 + 8 * 8 * 4)  # of 8 tiles of queries or keys
    assert biased_attention_workspace(setup, 32) == TOKENS * 4 * 4 * (32 + 1) + lists
    assert block_choice_workspace(setup, sizes) >= biased_attention_workspace(setup, 32)


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
    ("heads", "mode", "compiled"),
    [((4, 2), "none", False), ((4, 1), "none", False), ((4, 2), "full", True), ((4, 2), "selective", True)],
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


@pytest.mark.parametrize(
    ("n_tokens", "n_documents", "follows"),
    [(4095, 1, False), (4096, 1, True), (8192, 2, True), (8192, 3, False), (2**17, 1, True), (2**17 + 1, 1, False)],
)
def test_lengths_that_keep_bits_of_single_keys(n_tokens: int, n_documents: int, follows: bool) -> None:
    """A mean document of 4,096 tokens or more, and inputs of at most 131,072; others keep a bit a tile."""
    of_tiles = 32 * math.ceil(n_tokens / 64) * math.ceil(n_tokens / (32 * 64))
    assert (kept_bits(n_tokens, n_documents) > of_tiles) == follows
