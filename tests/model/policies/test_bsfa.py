"""Block-Sparse FlashAttention as a policy: what it keeps and counts, its calibration, its file."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.inference.incremental import extend, make_cache, prefill
from model.loading import model_fingerprint
from model.policies.bsfa import BlockSparseFlash, ThresholdCollector, load_policy, predicted_density, use_thresholds
from model.policies.policy import SequenceView, masked_attention, use_policy
from model.policies.thresholds import Calibration, Estimator, save_thresholds
from tests.model.test_transformer import make, tiny, tokens

LENGTH = 700
DOCUMENTS = torch.tensor([0, 300, 300, 301, LENGTH], dtype=torch.int32)
SLOPES = torch.tensor([0.02, 0.01, 0.0, 0.0])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def policy_of(thresholds: Tensor) -> BlockSparseFlash:
    return BlockSparseFlash(1, "test", thresholds)


def view_of(n_queries: int, n_keys: int, slopes: Tensor | None = None) -> SequenceView:
    return SequenceView(0, 2, False, n_keys - n_queries, 0, 8**-0.5, None, slopes, {})


def draw(heads: int, n: int, seed: int) -> Tensor:
    return torch.randn(heads, n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def test_without_thresholds_the_model_is_dense() -> None:
    """Packed documents in one pass, and a prompt in chunks that is continued token by token."""
    model = make(tiny("softmax", "nape"))
    text = tokens(LENGTH)
    with torch.no_grad():
        dense, whole = model.logits(model(text, DOCUMENTS, 399)), model.logits(model(text))[0]
    with use_policy(model, policy_of(torch.full((2, 4, 1), -torch.inf))) as record, torch.no_grad():
        packed = model.logits(model(text, DOCUMENTS, 399))
        cache = make_cache(model, 1, LENGTH)
        found = [prefill(model, text[:, : LENGTH - 2].tolist(), cache, 256)]
        found += [extend(model, text[:, i : i + 1], cache)[0] for i in range(LENGTH - 2, LENGTH)]
    torch.testing.assert_close(packed, dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(torch.cat(found)), whole[-3:], atol=1e-4, rtol=1e-4)
    assert set(record.counts) == {"prefill"}
    assert (record.density("prefill") == 1).all() and (record.tile_density("prefill") == 1).all()


def test_prefill_in_chunks_decides_as_one_pass() -> None:
    model = make(tiny("softmax", "nape"))
    text = tokens(LENGTH)
    collector = ThresholdCollector([1], 2, "mean")
    with use_policy(model, collector), torch.no_grad():
        model(tokens(640))
    policy = policy_of(collector.thresholds()[0])
    with use_policy(model, policy) as record, torch.no_grad():
        whole = model(text)[0, -1]
    with use_policy(model, policy) as in_chunks:
        last = prefill(model, text.tolist(), make_cache(model, 1, LENGTH), 256)[0]
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_chunks.density("prefill"), record.density("prefill"))
    assert record.density("prefill").mean() < 0.8


@settings(max_examples=30)
@given(
    before=st.integers(0, 400), n_queries=st.integers(1, 300), level=st.floats(1.0, 3.5), slopes=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_attends_and_counts_as_the_masked_definition(
    before: int, n_queries: int, level: float, slopes: bool, seed: int
) -> None:
    """Chunks that start anywhere: output, kept pairs and live tiles are those of an explicit mask."""
    n_keys = before + n_queries
    q, k, v = draw(4, n_queries, seed), draw(2, n_keys, seed + 100), draw(2, n_keys, seed + 200)
    view = view_of(n_queries, n_keys, SLOPES if slopes else None)
    policy = policy_of(level + 0.1 * torch.arange(3.0).expand(1, 4, 3))
    ours = policy.attend(q, k, v, view)
    truth = masked_attention(q, k, v, view, policy.select(q, k, view))
    torch.testing.assert_close(ours.out, truth.out, atol=1e-5, rtol=1e-5)
    for field in ("kept", "visible", "live_tiles", "total_tiles"):
        assert torch.equal(getattr(ours, field), getattr(truth, field)), field


@pytest.mark.parametrize("estimator", ["mean", "pooled"])
@pytest.mark.parametrize("length", [640, 700, 1024])
def test_calibrated_on_one_text_it_keeps_exactly_k(length: int, estimator: Estimator) -> None:
    """Of every whole block of queries; the density is then the predicted one (700: the last block, of 60 queries, has
    the threshold of a whole one)."""
    ks = [1, 3, 5]
    q, k, v = draw(4, length, 0), draw(2, length, 1), draw(2, length, 2)
    view = view_of(length, length, SLOPES)
    collector = ThresholdCollector(ks, 1, estimator)
    collector.observe(q, k, view)
    thresholds = collector.thresholds()
    assert thresholds.shape == (3, 1, 4, length // 128)
    for n, one in zip(ks, thresholds, strict=True):
        policy = policy_of(one)
        blocks = policy.select(q, k, view).blocks[:, : length // 128]  # type: ignore[attr-defined]
        for i in range(length // 128):
            assert (blocks[:, i, : 2 * i].sum(-1) == min(n, 2 * i)).all()
            assert blocks[:, i, 2 * i : 2 * i + 2].all()
        attended = policy.attend(q, k, v, view)
        density = attended.kept / attended.visible
        if length % 128 == 0:
            torch.testing.assert_close(density, torch.full((4,), predicted_density(n, length)))


def test_predicted_density_counts_pairs() -> None:
    """256 tokens: 2 blocks of queries, 4 of keys, 128 x 64 pairs in each off-diagonal block."""
    pairs = 256 * 257 / 2
    assert predicted_density(2, 256) == 1
    assert predicted_density(1, 256) == pytest.approx((pairs - 128 * 64) / pairs)


def test_averages_over_texts() -> None:
    found = []
    for seeds in ([0], [5], [0, 5]):
        collector = ThresholdCollector([2], 1, "mean")
        for seed in seeds:
            collector.observe(draw(4, 512, seed), draw(2, 512, seed + 1), view_of(512, 512))
        found.append(collector.thresholds())
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)
    assert (found[0][..., :2] == -torch.inf).all() and found[0][..., 2:].isfinite().all()
    with pytest.raises(ValueError, match="4 and 5 whole blocks of queries: expected all of one length"):
        collector.observe(draw(4, 640, 0), draw(2, 640, 1), view_of(640, 640))


def test_pooled_thresholds_keep_k_blocks_on_average() -> None:
    """Of texts that differ in how large their scores are, where the mean threshold keeps more."""
    texts = [(scale * draw(4, 1024, seed), draw(2, 1024, seed + 1)) for seed, scale in ((0, 0.5), (2, 1.0), (4, 4.0))]
    kept: dict[str, Tensor] = {}
    for estimator in get_args(Estimator):
        collector = ThresholdCollector([3], 1, estimator)
        for q, k in texts:
            collector.observe(q, k, view_of(1024, 1024))
        policy = policy_of(collector.thresholds()[0])
        selections = [policy.select(q, k, view_of(1024, 1024)).blocks for q, k in texts]  # type: ignore[attr-defined]
        kept[estimator] = torch.stack([one[:, i, : 2 * i].sum(-1) for one in selections for i in range(4, 8)])
    assert torch.equal(kept["pooled"].unflatten(0, (3, 4)).sum(0), torch.full((4, 4), 9))
    assert kept["mean"].float().mean() > 3


def test_what_cannot_be_collected_is_an_error() -> None:
    for ks in ([], [0], [2, 2]):
        with pytest.raises(ValueError, match="expected different numbers of blocks"):
            ThresholdCollector(ks, 1, "mean")
    with pytest.raises(ValueError, match="estimator is 'median': expected one of"):
        ThresholdCollector([1], 1, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no text of at least 128 tokens"):
        ThresholdCollector([1], 1, "mean").thresholds()
    view = dataclasses.replace(view_of(200, 200), window=50)
    for policy in (ThresholdCollector([1], 1, "mean"), policy_of(torch.zeros(1, 4, 1))):
        with pytest.raises(ValueError, match="no sliding window, and this model has one of 50 tokens"):
            (policy.observe if isinstance(policy, ThresholdCollector) else policy.select)(
                draw(4, 200, 0), draw(2, 200, 1), view
            )


def test_file_belongs_to_its_model(tmp_path: Path) -> None:
    model, other = make(tiny("softmax")), make(tiny("softmax"), seed=1)
    path = tmp_path / "deep" / "thresholds.safetensors"
    thresholds = torch.randn(2, 2, 4, 5)
    calibration = Calibration(model_fingerprint(model), "runs/x", 7, [4, 8], 640, 16, "pooled", [0.3, 0.5], None)
    save_thresholds(path, thresholds, calibration)
    policy = load_policy(path, 8, model)
    assert torch.equal(policy.thresholds, thresholds[1]) and "k=8" in str(policy)
    with use_thresholds(model, str(path), 4) as record:
        assert record is not None and model.layers()[0].attention.override is not None
    with use_thresholds(model, None, None) as record:
        assert record is None and model.layers()[0].attention.override is None
    with pytest.raises(ValueError, match=r"for k of \[4, 8\], not 5"):
        load_policy(path, 5, model)
    with pytest.raises(ValueError, match=r"belongs to model .* \(runs/x\), this one is"):
        load_policy(path, 4, other)
    with pytest.raises(ValueError, match="give both, or neither"):
        use_thresholds(model, str(path), None)
    with pytest.raises(FileNotFoundError, match="make it first"):
        load_policy(tmp_path / "none", 4, model)
    (tmp_path / "broken").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="holds no thresholds of eval.calibrate"):
        load_policy(tmp_path / "broken", 4, model)
    for broken in (thresholds[:1], thresholds[0], torch.where(thresholds > 1, torch.nan, thresholds)):
        save_thresholds(path, broken, calibration)
        with pytest.raises(ValueError, match=r"thresholds.safetensors has thresholds .*: make it again"):
            load_policy(path, 4, model)
    save_thresholds(path, thresholds, dataclasses.replace(calibration, ks={"4": 1}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"thresholds.safetensors: ks is \{'4': 1\}, expected a list; make it again"):
        load_policy(path, 4, model)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    save_thresholds(path, thresholds, dataclasses.replace(calibration, key_block=128))
    with pytest.raises(ValueError, match=r"format, query_block, key_block \(3, 128, 128\), expected \(3, 128, 64\)"):
        load_policy(path, 4, model)


def test_fingerprint_is_of_weights_and_architecture() -> None:
    model = make(tiny("softmax"))
    before = model_fingerprint(model)
    assert before == model_fingerprint(make(tiny("softmax")))
    assert before != model_fingerprint(make(tiny("ssmax"))) and before != model_fingerprint(make(tiny("softmax"), 1))
    with torch.no_grad():
        model.norm.weight[-1] += 1e-6
    assert before != model_fingerprint(model)
