"""Sequences of a step by their cost: who computes which, and that the step keeps them all."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.balance import idle_share, share_out
from data.loading import MicroBatchSampler, PackedDataset
from model.config import AttentionConfig, ModelConfig
from model.flops import matmul_parameters, sequence_cost, train_flops
from tests.data.conftest import make_module


def squares(lengths: NDArray[np.int64]) -> float:
    return float(np.square(lengths).sum())


def plain(count: int, ranks: int, micro_batch_size: int) -> NDArray[np.int64]:
    return share_out(np.ones(count), ranks, micro_batch_size)


def test_the_longest_go_first_to_whom_has_least() -> None:
    costs = np.array([1.0, 9.0, 2.0, 3.0, 5.0, 4.0])
    assert share_out(costs, 2, 1).tolist() == [[[1], [3], [0]], [[4], [5], [2]]]
    assert idle_share(costs, share_out(costs, 2, 1)) == pytest.approx(1 - 12 / 13)
    assert idle_share(costs, plain(6, 2, 1)) == pytest.approx(1 - 12 / 16)
    assert idle_share(costs, share_out(costs, 2, 1), each_micro_batch=True) == pytest.approx(1 - 12 / 15)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 2), (2, 1), (4, 2), (8, 2), (16, 1)])
def test_every_sequence_once_and_as_many_on_each_rank(ranks: int, micro_batch_size: int) -> None:
    costs = np.random.default_rng(0).lognormal(sigma=1.5, size=32)
    shares = share_out(costs, ranks, micro_batch_size)
    assert shares.shape == (ranks, 32 // ranks // micro_batch_size, micro_batch_size)
    assert sorted(shares.flatten().tolist()) == list(range(32))
    totals = costs[shares].sum((1, 2))
    assert totals.max() <= max(1.1 * costs.max(), (4 / 3) * costs.sum() / ranks)  # all need company for the largest
    assert (np.diff(costs[shares[:, :, 0]], axis=1) <= 0).all()  # expensive ones first on every rank


def test_sequences_of_one_cost_stay_where_they_are() -> None:
    assert plain(8, 2, 2).tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_steps_keep_their_samples_and_ranks_wait_less(prepared: Path) -> None:
    data = make_module(prepared, micro_batch_size=2, global_batch_size=16, sequence_length=512)
    data.setup()
    packing = data.train_packing()
    dataset = PackedDataset(packing, num_samples=48)

    def steps() -> NDArray[np.int64]:
        """(steps, ranks, micro-batches, 2)"""
        ranks = [list(map(list, MicroBatchSampler(data, dataset, rank, 4))) for rank in range(4)]
        return np.array(ranks).reshape(4, -1, 2, 2).swapaxes(0, 1)

    before = steps()
    data.sequence_cost = squares
    after = steps()
    data.balance_ranks = False
    assert (steps() == before).all()
    costs = np.array([squares(packing.sequence(i).lengths) for i in range(48)])
    idle = []
    for arranged in (before, after):
        assert [sorted(step.flatten().tolist()) for step in arranged] == np.arange(48).reshape(3, 16).tolist()
        idle.append(np.mean([idle_share(costs, step) for step in arranged]))
    assert idle[1] <= idle[0] / 2


def test_a_resumed_run_goes_on_with_the_same_shares(prepared: Path) -> None:
    data = make_module(prepared, micro_batch_size=1, global_batch_size=8, sequence_length=512)
    data.setup()
    data.sequence_cost = squares
    dataset = PackedDataset(data.train_packing(), num_samples=40)
    whole = list(MicroBatchSampler(data, dataset, 1, 2))
    data.consumed_samples = 16
    assert list(MicroBatchSampler(data, dataset, 1, 2)) == whole[8:]


@pytest.mark.parametrize("intra_document", [True, False])
def test_lengths_are_those_of_the_sequence(prepared: Path, intra_document: bool) -> None:
    data = make_module(prepared, intra_document=intra_document)
    data.setup()
    packing = data.train_packing()
    samples = [7, 3, *range(packing.sequences_per_pass - 20, packing.sequences_per_pass + 20)]  # of two epochs
    found = packing.document_lengths(samples)
    assert [x.tolist() for x in found] == [packing.sequence(i).lengths.tolist() for i in samples]


def test_cost_is_that_of_softmax_and_less_for_sparse_attention() -> None:
    softmax, entmax = (ModelConfig(attention=AttentionConfig(kind=kind)) for kind in ("softmax", "entmax"))
    lengths = np.array([30_000, 2_768])
    dense, sparse = sequence_cost(softmax, lengths), sequence_cost(entmax, lengths)
    assert dense == pytest.approx(train_flops(softmax, lengths.tolist()))
    products = 6.0 * matmul_parameters(softmax) * lengths.sum()
    assert sparse - products == pytest.approx(0.6 * (dense - products)) and dense > 1.1 * products
    assert sequence_cost(entmax, lengths, teacher=softmax) == pytest.approx(sparse + dense / 3)  # forward alone
