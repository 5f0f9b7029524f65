"""Policies that keep whole blocks, through the block-sparse kernel: outputs, counts, and what does not fit it.

On CUDA where there is a device, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.block_sparse.reference import KEY_BLOCK
from model.inference.incremental import make_cache, prefill
from model.policies import block_attention
from model.policies.block_attention import BlockPolicy, count_kept, kernel_blocks
from model.policies.families import FAMILIES, policy_at
from model.policies.flexprefill import FlexPrefill
from model.policies.minference import BlockSparse
from model.policies.policy import Attended, SequenceView, masked_attention, use_policy
from model.policies.quest import Quest
from model.policies.selection import BlockSelection
from model.policies.sparge import SpargeAttention
from model.policies.topk import OracleTopK
from tests.kernels.helpers import DEVICE, EPS, needs_triton
from tests.model.policies.policy_inputs import SLOPES, draw, view_of
from tests.model.test_transformer import make, tiny, tokens

COUNTS = ("kept", "visible", "live_tiles", "total_tiles")
# those of the defaults, then larger blocks
FITTING: list[BlockPolicy] = [
    OracleTopK(2), BlockSparse(2), FlexPrefill(0.5, least_keys=64), SpargeAttention(0.3, similarity=-1.0),
    BlockSparse(1, 128), BlockSparse(1, 192), FlexPrefill(0.5, 0.0, 64, 64),
    SpargeAttention(0.3, similarity=-1.0, query_block=256, key_block=64),
    Quest(3, 64, dense_layers=0), Quest(3, 64),
]  # fmt: skip
LENGTHS = [(300, 300), (150, 278), (140, 204), (1, 333)]  # queries, keys: a whole text, chunks, a token
TRITON = [pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def named(policy: BlockPolicy) -> str:
    return f"{policy.name} {policy.sizes}"


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("not the way that was expected")


def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention goes by the kernel or fails."""
    monkeypatch.setattr(block_attention, "runs_on_triton", lambda q: True)
    monkeypatch.setattr(block_attention, "masked_attention", refuse)


def inputs(n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(DEVICE, dtype) for x in draw(n_queries, n_keys)]


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, view: SequenceView) -> Tensor:
    """Attention over a mask (H, Tq, Tk) in plain PyTorch: products and weights in the inputs' dtype."""
    repeat, n_keys = len(q) // len(k), k.shape[1]
    k, v = (x.repeat_interleave(repeat, 0) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.mT).to(wide) * view.scale
    if view.alibi_slopes is not None:
        query = torch.arange(view.query_start, n_keys, device=q.device)
        scores -= view.alibi_slopes.to(wide)[:, None, None] * (query[:, None] - torch.arange(n_keys, device=q.device))
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return p.to(v.dtype) @ v


def check(policy: BlockPolicy, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
    """Counts are those of masked_attention, errors against float64 at most twice plain PyTorch's."""
    selection = policy.select(q, k, view)
    rows = slice(0, q.shape[1])
    mask = (selection.mask(rows, k.shape[1]) & view.visible(rows, k.shape[1], q.device)).expand(len(q), -1, -1)
    truth = explicit(q.double(), k.double(), v.double(), mask, view)
    theirs, ours = explicit(q, k, v, mask, view), policy.attend(q, k, v, view)
    expected = masked_attention(q, k, v, view, selection)
    for field in COUNTS:
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    # float32: two roundings of the result beside what plain PyTorch loses
    allowed = 2 * (theirs.double() - truth).norm() + (2 * EPS * truth.norm() if q.dtype == torch.float32 else 0)
    error = (ours.out.double() - truth).norm()
    assert ours.out.dtype == q.dtype and error <= allowed, f"{error:.3e} > {allowed:.3e}"
    return ours


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("policy", FITTING, ids=named)
def test_the_kernel_gives_what_masked_attention_gives(
    policy: BlockPolicy, lengths: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four query heads on two of keys and values, with ALiBi; whole texts, chunks on the grid, and one token."""
    if "prefill" not in policy.phases and lengths[0] > 1:
        pytest.skip("a policy of decoding")
    by_kernel(monkeypatch)
    attended = check(policy, *inputs(*lengths), view_of(*lengths, SLOPES.to(DEVICE)))
    assert lengths[0] != 300 or bool((attended.kept < attended.visible).any())


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("policy", FITTING[:4], ids=named)
def test_the_kernel_loses_no_more_in_bfloat16(
    policy: BlockPolicy, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel(monkeypatch)
    check(policy, *inputs(300, 300, torch.bfloat16), view_of(300, 300))


@pytest.mark.parametrize(
    ("policy", "lengths", "options"),
    [
        (BlockSparse(2), (200, 200), dict(window=50)),
        (BlockSparse(2, 16), (200, 200), {}),
        (BlockSparse(2, 32), (1, 200), {}),
        (SpargeAttention(0.3, query_block=128, key_block=32), (200, 200), {}),
        (SpargeAttention(0.3, margin=-2.0), (200, 200), {}),
        (Quest(3, dense_layers=0), (1, 200), {}),
        (BlockSparse(2), (100, 200), {}),
    ],
    ids=[
        "window",
        "blocks of 16",
        "one query, keys of 32",
        "keys of 32",
        "margin",
        "pages of 16",
        "chunk off the grid",
    ],
)
def test_what_does_not_fit_the_kernel_is_masked(
    policy: BlockPolicy, lengths: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.cpu() for x in inputs(*lengths))
    expected = policy.attend(q, k, v, view_of(*lengths, **options))  # on the CPU: masked
    monkeypatch.setattr(block_attention, "runs_on_triton", lambda q: True)
    monkeypatch.setattr(block_attention, "block_attention", refuse)
    assert torch.equal(policy.attend(q, k, v, view_of(*lengths, **options)).out, expected.out)


def test_the_cpu_and_float64_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "block_attention", refuse)
    q, k, v = draw(200, 200)
    assert BlockSparse(2).attend(q, k, v, view_of(200, 200)).out.dtype == torch.float32
    q, k, v = (x.to(DEVICE).double() for x in (q, k, v))
    assert BlockSparse(2).attend(q, k, v, view_of(200, 200)).out.dtype == torch.float64


@settings(max_examples=60)
@example(start=128, n_queries=300, query_block=192, key_block=64, heads=1, seed=0, by_position=True)
@given(
    start=st.sampled_from([0, 64, 128, 192, 320]) | st.integers(0, 300), n_queries=st.integers(1, 300),
    query_block=st.sampled_from([1, 16, 64, 128, 192, 256]), key_block=st.sampled_from([16, 64, 128, 192]),
    heads=st.sampled_from([1, 3]), seed=st.integers(0, 99), by_position=st.booleans(),
)  # fmt: skip
def test_blocks_of_the_kernel_are_those_of_the_selection(
    start: int, n_queries: int, query_block: int, key_block: int, heads: int, seed: int, by_position: bool
) -> None:
    """Or None, where its grid cuts them. And what they keep counts as in masked_attention."""
    n_keys, offset = start + n_queries, start % query_block if by_position else 0
    grid = (heads, -(-(n_queries + offset) // query_block), -(-n_keys // key_block))
    blocks = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.4
    selection = BlockSelection(blocks, query_block, key_block, query_offset=offset)
    found = kernel_blocks(selection, n_queries, n_keys)
    fits = key_block % 64 == 0 and (grid[1] == 1 or (query_block % 64 == 0 and (start - offset) % 64 == 0))
    assert (found is not None) == fits
    if found is None:
        return
    kept, size = found
    position = torch.arange(start, n_keys)
    mask = kept[0][:, position // size - start // size][..., torch.arange(n_keys) // KEY_BLOCK]
    assert torch.equal(mask, selection.mask(slice(0, n_queries), n_keys))

    q, k, v = torch.zeros(heads, n_queries, 1), torch.zeros(1, n_keys, 1), torch.zeros(1, n_keys, 1)
    expected = masked_attention(q, k, v, view_of(n_queries, n_keys), selection)
    for at_once in (block_attention.COUNTS_AT_ONCE, 2 * heads * kept.shape[3]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_attention, "COUNTS_AT_ONCE", at_once)
            counts = count_kept(kept[0], n_queries, n_keys, size)
        for ours, field in zip(counts, COUNTS, strict=True):
            assert torch.equal(ours, getattr(expected, field)), field


@pytest.mark.parametrize("backend", TRITON)
def test_a_model_prefills_by_the_kernel(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks on the grid: the same hidden states and densities as masked attention gives."""
    model, text = make(tiny("softmax", "nape")).to(DEVICE), tokens(300).tolist()
    found = []
    for attend in (None, by_kernel):
        if attend:
            attend(monkeypatch)
        else:
            monkeypatch.setattr(block_attention, "runs_on_triton", lambda q: False)
        with use_policy(model, BlockSparse(2)) as record, torch.no_grad():
            found.append((prefill(model, text, make_cache(model, 1, 300), 128), record))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1][1].density("prefill"), found[0][1].density("prefill"))
    assert found[0][1].density("prefill").mean() < 0.9


def test_whose_time_says_something() -> None:
    """Of the comparison those that the kernel takes and whose selection is cheaper than attention."""
    cuda, config = torch.device("cuda"), tiny("softmax", "nape")
    faster = {name for name in FAMILIES if policy_at(name, 0.5, 4096).faster(cuda, config)}
    assert faster == {"block_sparse", "flexprefill", "sketch_walk"}
    for name in faster:
        policy = policy_at(name, 0.5, 4096)
        assert not policy.faster(torch.device("cpu"), config)
        assert not policy.faster(cuda, replace(config, window=64)) and not policy.faster(
            cuda, replace(config, head_dim=160)
        )
        assert not policy_at(name, 0.5, 512).faster(cuda, config)
    assert SpargeAttention(0.5).faster(cuda, config) and not SpargeAttention(0.5, -2.0).faster(cuda, config)
