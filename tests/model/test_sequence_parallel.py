"""Ranks that share a sequence against one process: outputs and every parameter's gradient, with real processes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed

from model.config import AttentionConfig, ModelConfig
from model.sequence_parallel import SequenceShards, check_heads
from model.transformer import Transformer
from training.step.activations import KeepOnHost, tile_feed_forward
from training.step.recomputation import checkpoint_blocks

TOKENS = 64
DOCUMENTS = torch.tensor([0, 13, 13, 14, 45, TOKENS], dtype=torch.int32)  # one crosses the border of two slices
KINDS = ("softmax", "ssmax", "entmax", "asentmax")
HEADS = {2: ((4, 2), (2, 1), (8, 4)), 4: ((8, 2), (8, 8), (4, 1))}  # ranks -> query and KV heads
Case = dict[str, Any]


def cases(size: int) -> dict[str, Case]:
    """Name -> options of a case for `size` ranks. Two ranks: everything; four: what differs with more ranks."""
    found = {}
    kinds, positions = (KINDS, ("rope", "nape", "nope")) if size == 2 else (("asentmax",), ("nape",))
    numbers = itertools.count()
    for kind, position, window in itertools.product(kinds, positions, (None, 11)):
        heads = HEADS[size][next(numbers) % 3]
        found[f"{kind}-{position}-window={window}-heads={heads}"] = dict(
            kind=kind, positions=position, window=window, heads=heads
        )
    for heads in HEADS[size]:
        found[f"heads={heads}"] = dict(heads=heads)
    for option in (
        "fixed_alpha",
        "annealed",
        "checkpointed",
        "offloaded",
        "tiled",
        "compiled",
        "compiled_checkpointed",
    ):
        found[option] = {option: True}
    for kind in ("softmax", "asentmax"):
        found[f"{kind}-one_document"] = dict(kind=kind, one_document=True)
    return found if size == 2 else {name: case for name, case in found.items() if "heads" in case}


def make(case: Case) -> Transformer:
    torch.manual_seed(0)
    kind, (heads, kv_heads) = case.get("kind", "asentmax"), case.get("heads", (4, 2))
    steps = 10 if "annealed" in case else 0
    attention = AttentionConfig(kind=kind, learn_alpha="fixed_alpha" not in case, alpha=1.4, anneal_steps=steps)
    model = Transformer(
        ModelConfig(
            vocab_size=31,
            n_layers=2,
            d_model=4 * heads,
            n_heads=heads,
            n_kv_heads=kv_heads,
            d_ff=24,
            head_dim=8,
            positions=case.get("positions", "nape"),
            window=case.get("window"),
            attention=attention,
        )  # fmt: skip
    ).double()
    with torch.no_grad():  # larger than at initialisation, and different for each head
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.set_step(4)
    return model


def transform(model: Transformer, case: Case) -> None:
    if case.keys() & {"checkpointed", "offloaded", "compiled_checkpointed"}:
        checkpoint_blocks(model.blocks, "full")
    if "tiled" in case:
        tile_feed_forward(model.layers(), 10)
    if case.keys() & {"compiled", "compiled_checkpointed"}:
        for block in model.blocks:
            block.compile(backend="aot_eager")  # traced as for a GPU, without compiling C++


def forward_backward(model: Transformer, shards: SequenceShards | None, case: Case) -> Tensor:
    """Hidden states of this rank's tokens; leaves gradients of the sum of all ranks' losses on this rank's share."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 31, (1, TOKENS), generator=generator)
    weight = torch.randn(1, TOKENS, model.config.d_model, generator=generator, dtype=torch.float64)
    if shards is not None:
        tokens, weight = shards.local_tokens(tokens, 1), shards.local_tokens(weight, 1)
    model.zero_grad()
    documents = None if "one_document" in case else DOCUMENTS
    offload = "offloaded" in case and shards is not None
    with KeepOnHost(tuple(weight.shape)) if offload else torch.enable_grad():
        hidden = model(tokens, documents, TOKENS, shards)
    (hidden * weight).sum().backward()
    return hidden.detach()


def compare(case: Case, shards: SequenceShards) -> dict[str, float]:
    """Largest difference from one process, relative to the largest value, of the output and of each gradient."""
    whole, parts = make(case), make(case)
    transform(parts, case)
    expected = shards.local_tokens(forward_backward(whole, None, case), 1)
    found = forward_backward(parts, shards, case)
    errors = {"output": float((found - expected).abs().max() / expected.abs().max())}
    for (name, p), (_, q) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.abs().max() > 0, name
        distributed.all_reduce(q.grad)
        errors[name] = float((q.grad - p.grad).abs().max() / p.grad.abs().max())
    return errors


def work(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    shards = SequenceShards(distributed.group.WORLD, rank, size)
    results = {name: compare(case, shards) for name, case in cases(size).items()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, float]]]]:
    """Ranks -> of each rank: case -> errors."""
    found = {}
    for size in HEADS:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        mp.spawn(work, (size, folder), nprocs=size)
        found[size] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return found


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in HEADS for name in cases(size)])
def test_ranks_together_equal_one_process(errors: Any, size: int, name: str) -> None:
    for rank, results in enumerate(errors[size]):
        for tensor, error in results[name].items():
            assert error < 1e-6, f"rank {rank}, {tensor}: {error:.1e}"  # positions and temperatures are in float32


def test_rows_beside_each_other_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"one row of packed documents, got tokens \(2, 8\)"):
        make({})(torch.zeros(2, 8, dtype=torch.int64), shards=SequenceShards(None, 0, 2))  # type: ignore[arg-type]


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_heads is 4: expected a multiple of parallel.sequence_parallel = 3"):
        check_heads(ModelConfig(n_heads=4, n_kv_heads=2), 3)
    with pytest.raises(ValueError, match="n_kv_heads is 3: expected a multiple or a divisor"):
        check_heads(ModelConfig(n_heads=12, n_kv_heads=3, d_model=48), 2)
    for heads, kv_heads, size in ((4, 2, 4), (4, 4, 2), (4, 1, 4), (4, 2, 1)):
        check_heads(ModelConfig(n_heads=heads, n_kv_heads=kv_heads), size)
