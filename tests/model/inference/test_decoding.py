"""Decoding by fixed steps, and as CUDA graphs, against passes that grow with the rows."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import model.inference.decoding
from eval.generation import generate
from kernels.common.backends import INTERPRETED
from model.config import TRAINED_SPARSE, AttentionKind, Positions
from model.inference.decoding import SOFTMAX_SLOTS, Decoder, FixedStep, step_size
from model.inference.incremental import make_cache, prefill
from model.transformer import Transformer
from tests.kernels import interpreter
from tests.model.test_kv_cache import draw
from tests.model.test_transformer import KINDS, POSITIONS, make, tiny

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def every_model(test: Any) -> Any:
    for name, values in (("window", [None, 11]), ("positions", POSITIONS), ("kind", KINDS)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


class Uncaptured:
    """A GraphedStep that runs its step each time, which the CPU can."""

    def __init__(self, step: FixedStep, tokens: Sequence[int]) -> None:
        self.step = step

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        self.step.load(tokens)
        return self.step.run()[: len(tokens)]


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.inference.decoding, "GraphedStep", Uncaptured)
    monkeypatch.setattr(model.inference.decoding, "STEPS_BEFORE_CAPTURE", 0)
    monkeypatch.setattr(model.inference.decoding, "obstacle_to_graphs", lambda model, dtype: None)


def decode(network: Transformer, lengths: Sequence[int], steps: int, cuda_graphs: bool) -> Tensor:
    """Hidden states of `steps` tokens behind prompts of these lengths, of which the last ends halfway: (n, C)."""
    cache = make_cache(network, len(lengths), max(lengths) + steps)
    prefill(network, draw(*lengths), cache, chunk_tokens=64)
    decoder = Decoder(network, cache, cuda_graphs)
    found = []
    for i, tokens in enumerate(torch.tensor(draw(*[steps] * len(lengths))).T.tolist()):
        active = len(lengths) - (i >= steps // 2)
        found.append(decoder(tokens[:active]))
    assert cache.lengths == [*(n + steps for n in lengths[:-1]), lengths[-1] + steps // 2]
    return torch.cat(found)


@pytest.mark.usefixtures("uncaptured")
@every_model
def test_fixed_steps_equal_growing_ones(
    kind: AttentionKind, positions: Positions, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths, one of which ends, through sizes of 32, 64 and all 76 slots."""
    monkeypatch.setattr(model.inference.decoding, "FEWEST_KEYS", 16)
    network = make(tiny(kind, positions, window=window, qk_norm=True))
    for lengths in ([70, 33, 33, 7, 1], [30, 1, 1]):
        expected = decode(network, lengths, 6, cuda_graphs=False)
        torch.testing.assert_close(decode(network, lengths, 6, cuda_graphs=True), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("uncaptured")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_same(kind: AttentionKind) -> None:
    """Rows end one by one, at an eos or their last token, and move."""
    network = make(tiny(kind, "nape"))
    prompts = draw(9, 40, 1, 17, 17, 60)
    expected = generate(network, prompts, max_new_tokens=8)
    eos = expected[1].tokens[2]
    for options in (dict(), dict(eos=eos), dict(eos=eos, batch_tokens=100)):
        expected = generate(network, prompts, max_new_tokens=8, **options)
        assert generate(network, prompts, max_new_tokens=8, cuda_graphs=True, **options) == expected


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("uncaptured")
def test_fixed_steps_by_the_triton_kernels() -> None:
    interpreter.prepare()
    network = make(tiny("asentmax", "nape", attention=dict(backend="triton")))
    expected = decode(network, [70, 33, 7], 4, cuda_graphs=False)
    torch.testing.assert_close(decode(network, [70, 33, 7], 4, cuda_graphs=True), expected, atol=1e-4, rtol=1e-4)


def test_sizes_are_powers_of_two_as_far_as_there_is_room() -> None:
    cache = make_cache(make(tiny("softmax", "nope")), 6, 1000)
    cache.lengths = [299, 255, 256, 10, 0, 0]
    assert [step_size(cache, rows) for rows in (1, 2, 3, 4, 5, 6)] == [
        (1, 512), (2, 512), (4, 512), (4, 512), (6, 512), (6, 512)
    ]  # fmt: skip
    cache.lengths = [255, 255, 255, 0, 0, 0]
    assert step_size(cache, 2) == (2, 256)
    cache.lengths = [600, 255, 255, 1000, 0, 0]
    assert step_size(cache, 3) == (3, 1000), "a further row must not lose a token"
    cache.lengths = [999, 0, 0, 0, 0, 0]
    assert step_size(cache, 1) == (1, 1000)


@pytest.mark.usefixtures("uncaptured")
def test_graphs_of_memory_that_has_moved_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.inference.decoding, "FEWEST_KEYS", 4)
    network = make(tiny("asentmax", "nape"))
    found = []
    for reserved in (None, 4):
        cache = make_cache(network, 2, 64, reserved)
        prefill(network, draw(4, 2), cache, chunk_tokens=8)
        decoder = Decoder(network, cache, cuda_graphs=True)
        seen, hidden = [], []
        for token in range(16):
            hidden.append(decoder([token, token]))
            seen.append(len(decoder._graphs))
        found.append((torch.cat(hidden), seen))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    # sizes 8, 16, 32 of one cache; of the other 8, 16, 32 too, each in memory of its own
    assert found[0][1] == [1] * 4 + [2] * 8 + [3] * 4 and found[1][1] == [1] * 16


@pytest.mark.usefixtures("uncaptured")
def test_rows_behind_keep_what_they_hold() -> None:
    network = make(tiny("asentmax", "nape"))
    cache = make_cache(network, 4, 50)
    prefill(network, draw(40, 40, 40, 20), cache, chunk_tokens=64)
    held = cache._memory[:, :, 3, :, :20].clone()
    Decoder(network, cache, cuda_graphs=True)([1, 2, 3])
    assert cache.lengths == [41, 41, 41, 20]
    assert torch.equal(cache._memory[:, :, 3, :, :20], held)


@pytest.mark.usefixtures("uncaptured")
def test_a_size_is_captured_when_it_has_come_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.inference.decoding, "STEPS_BEFORE_CAPTURE", 3)
    monkeypatch.setattr(model.inference.decoding, "FEWEST_KEYS", 4)
    network = make(tiny("entmax", "nope"))
    cache = make_cache(network, 2, 40)
    prefill(network, draw(2, 1), cache, chunk_tokens=8)
    decoder = Decoder(network, cache, cuda_graphs=True)
    captured = []
    for _ in range(18):  # from 2 slots on: 2 steps of 4 slots, 4 of 8, 8 of 16, 4 of 32
        decoder([1, 2])
        captured.append([n_keys for _, n_keys in decoder._graphs])
    assert captured == [[]] * 5 + [[8]] * 4 + [[8, 16]] * 8 + [[8, 16, 32]]


@needs_cuda
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_chosen_where_they_are_faster(kind: AttentionKind, backend: str) -> None:
    network = make(tiny(kind, "nape", attention=dict(backend=backend))).cuda()
    entmax = math.inf if backend == "auto" else 0
    expected = {"softmax": SOFTMAX_SLOTS, "ssmax": SOFTMAX_SLOTS, "entmax": entmax, "asentmax": entmax}
    assert Decoder(network, make_cache(network, 1, 8)).most_slots == expected.get(kind, 0)


def test_none_are_chosen_on_a_cpu() -> None:
    network = make(tiny("entmax", "nape"))
    assert not Decoder(network, make_cache(network, 1, 8)).most_slots


@pytest.mark.usefixtures("uncaptured")
@pytest.mark.parametrize(("kind", "cuda_graphs", "captured"), [
    ("softmax", None, [(1, 8), (2, 8), (1, 16)]), ("entmax", None, [(1, 8), (2, 8), (1, 16), (2, 16), (1, 32)]),
    ("softmax", True, [(1, 8), (2, 8), (1, 16), (2, 16), (1, 32)]), ("softmax", False, []),
])  # fmt: skip
def test_softmax_leaves_large_steps_to_the_host(
    kind: AttentionKind, cuda_graphs: bool | None, captured: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16 slots of all rows together, and with the same hidden states either way."""
    monkeypatch.setattr(model.inference.decoding, "SOFTMAX_SLOTS", 16)
    monkeypatch.setattr(model.inference.decoding, "FEWEST_KEYS", 4)
    network, found = make(tiny(kind, "nape")), []
    for given in (cuda_graphs, False):
        cache = make_cache(network, 2, 40)
        prefill(network, draw(5, 4), cache, chunk_tokens=8)
        decoder, seen, hidden = Decoder(network, cache, given), set(), []
        for rows in [1, 2, 1, 1, 1, 2, *[1] * 10]:
            hidden.append(decoder([3] * rows))
            seen |= set(decoder._graphs)
        found.append((torch.cat(hidden), seen))
    assert found[0][1] == set(captured)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("uncaptured")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_does_not_fit_is_an_error(cuda_graphs: bool) -> None:
    network = make(tiny("softmax", "rope"))
    cache = make_cache(network, 1, 3)
    prefill(network, [[1, 2, 3]], cache, chunk_tokens=8)
    decoder = Decoder(network, cache, cuda_graphs)
    with pytest.raises(ValueError, match="1 tokens after 3 make 4, but the cache has room for 3"):
        decoder([4])
    with pytest.raises(ValueError, match="tokens of 2 rows were given to a cache of 1"):
        decoder([4, 5])


@pytest.mark.parametrize("kind", TRAINED_SPARSE)
def test_graphs_are_not_for_trained_sparse_kinds(kind: AttentionKind) -> None:
    network = make(tiny(kind, "nape"))
    with pytest.raises(
        ValueError, match=f"cuda_graphs is true, but attention.kind {kind} decodes kernel by kernel: set it"
    ):
        Decoder(network, make_cache(network, 1, 8), cuda_graphs=True)


def test_graphs_need_a_cuda_device() -> None:
    network = make(tiny("entmax", "nape"))
    with pytest.raises(ValueError, match="cuda_graphs is true, which needs a CUDA device, but the model is on cpu"):
        Decoder(network, make_cache(network, 1, 8), cuda_graphs=True)


def test_graphs_need_kernels_that_do_not_wait_for_the_host() -> None:
    network = make(tiny("entmax", "nape", attention=dict(backend="torch")))
    with pytest.raises(ValueError, match="needs attention.backend auto or triton, but it is 'torch'"):
        Decoder(network, make_cache(network, 1, 8), cuda_graphs=True)
    network = make(tiny("entmax", "nape")).double()
    with pytest.raises(ValueError, match="the Triton backend, but that takes float32, .* got torch.float64"):
        Decoder(network, make_cache(network, 1, 8), cuda_graphs=True)
    assert not Decoder(network, make_cache(network, 1, 8)).most_slots
    network = make(tiny("softmax", "nape"))
    network.layers()[1].attention.override = lambda *_: None
    with pytest.raises(ValueError, match="attends by a policy"):
        Decoder(network, make_cache(network, 1, 8), cuda_graphs=True)


@needs_cuda
@torch.no_grad()
@every_model
def test_graphs_equal_growing_steps(
    kind: AttentionKind, positions: Positions, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 within 1e-3, under autocast (whose casted weights no replay may miss) within 3x what that loses."""
    monkeypatch.setattr(model.inference.decoding, "FEWEST_KEYS", 16)
    monkeypatch.setattr(model.inference.decoding, "STEPS_BEFORE_CAPTURE", 0)
    network = make(tiny(kind, positions, window=window, qk_norm=True)).cuda()
    for lengths in ([70, 33, 33, 7, 1], [30, 1, 1]):
        exact = decode(network, lengths, 6, cuda_graphs=False)
        assert (decode(network, lengths, 6, cuda_graphs=True) - exact).norm() <= 1e-3 * exact.norm()
        with torch.autocast("cuda", torch.bfloat16):
            half, graphed = (decode(network, lengths, 6, cuda_graphs) for cuda_graphs in (False, True))
        assert (graphed - exact).norm() <= 3 * (half - exact).norm()
