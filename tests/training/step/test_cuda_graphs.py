"""Steps replayed as CUDA graphs: the same gradients as without, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.length_generalisation import TaskConfig, TaskSequences
from data.loading import PackedDataset
from model.config import AttentionConfig, ModelConfig
from training.module import LanguageModule
from training.step.cuda_graphs import GraphedLoss, check_graphs
from training.step.optim import OptimizerConfig

VOCAB, LENGTH, BATCH = 35, 34, 4
FINE: dict[str, Any] = dict(device=torch.device("cuda"), world_size=1, accumulation=1, mode="none")


def network(kind: str = "asentmax", **attention: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64, positions="nape",
        attention=AttentionConfig(kind=kind, **attention),  # type: ignore[arg-type]
    )  # fmt: skip


def batch(step: int) -> dict[str, Any]:
    sequences = TaskSequences(TaskConfig("sort", 8, 16), LENGTH, 0, "train")
    return PackedDataset(sequences, 100)[range(BATCH * step, BATCH * (step + 1))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": torch.device("cpu")}, "the run is on cpu"),
        ({"world_size": 2}, "there are 2 ranks"),
        ({"accumulation": 4}, "each has 4 micro-batches: set data.micro_batch_size to"),
        ({"mode": "full"}, "it is 'full'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_graphs(network(), **{**FINE, **change})


def test_moving_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="anneal_steps is 10"):
        check_graphs(network(anneal_from=1.01, anneal_steps=10), **FINE)
    check_graphs(network(), **FINE)


def test_liger_is_refused() -> None:
    with pytest.raises(ValueError, match="'liger', which CUDA graphs cannot capture"):
        LanguageModule(network(), OptimizerConfig(), loss_backend="liger", cuda_graphs=True)


def test_packed_documents_are_refused() -> None:
    module = LanguageModule(network(), OptimizerConfig(), cuda_graphs=True)
    assert isinstance(module.graphed_loss, GraphedLoss)
    with pytest.raises(ValueError, match="this batch packs several"):
        module.graphed_loss(batch(0))  # before on_before_batch_transfer, which makes rows of it


@pytest.mark.parametrize("kind", ["nsa", "dms", "hierarchical"])
def test_trained_sparse_kinds_are_not_captured(kind: str) -> None:
    with pytest.raises(ValueError, match=f"needs attention that can be captured, but attention.kind is '{kind}': set"):
        check_graphs(network(kind), device=torch.device("cuda"), world_size=1, accumulation=1, mode="none")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["softmax", "ssmax", "entmax", "asentmax"])
def test_replayed_steps_equal_eager_ones(kind: str) -> None:
    def train(cuda_graphs: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = LanguageModule(
            network(kind), OptimizerConfig(), loss_backend="chunked", cuda_graphs=cuda_graphs, z_loss=0.01
        ).cuda()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        seen = []
        for step in range(6):
            moved = {
                name: value.cuda() if isinstance(value, Tensor) else value
                for name, value in module.on_before_batch_transfer(batch(step), 0).items()
            }
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output = module.training_step(moved, step)
            output["loss"].backward()
            seen.append(output["loss_sum"])
            optimizer.step()
            optimizer.zero_grad()
        return [*seen, *module.parameters()]

    # the same kernels in the same order; torch's own embedding gradient adds atomically
    for replayed, eager in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-6)
