"""Designs of the block-sparse Triton kernel, each in every case: gate by list or by branch, loads by pointers or TMA.

On CUDA where there is a device, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import block_sparse_softmax_attention
from kernels.block_sparse import operator as block_sparse_triton
from kernels.block_sparse import tuning
from kernels.block_sparse.tuning import TABLES, BlockSparseLaunch
from kernels.common.tuning import shared_memory
from tests.kernels.block_sparse.test_attention import BACKENDS, SHAPES, Shape, check, run
from tests.kernels.helpers import DEVICE

# of the Triton kernel: gate by list or by branch, loads by pointers or by tensor descriptors
DESIGNS = {"list": (False, False), "list TMA": (False, True), "branch": (True, False), "branch TMA": (True, True)}


def use_design(monkeypatch: pytest.MonkeyPatch, fused: bool, descriptors: bool) -> list[bool]:
    """Makes launches take this design. Returns a list that gets, for each launch, whether TMA could read its inputs."""
    seen = []

    def launch(*arguments: Any) -> BlockSparseLaunch:
        seen.append(arguments[-1])
        return replace(tuning.block_sparse_launch(*arguments), fused=fused, descriptors=descriptors)

    monkeypatch.setattr(block_sparse_triton, "block_sparse_launch", launch)
    return seen


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_designs_of_the_kernel_keep_and_lose_the_same(
    shape: Shape, design: tuple[bool, bool], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = use_design(monkeypatch, *design)
    check(shape, torch.bfloat16, backend)
    assert seen == [True]


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_limits_of_the_designs(design: tuple[bool, bool], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf keeps all, also without counting; inf keeps the diagonal and reads no other values."""
    use_design(monkeypatch, *design)
    for causal in (True, False):
        q, k, v = Shape(300, 300, heads=4, kv_heads=2).tensors(torch.bfloat16)
        options: dict[str, Any] = dict(causal=causal, backend=backend)
        dense = block_sparse_softmax_attention(q, k, v, thresholds=None, **options)
        endless = torch.full((4, 3), -torch.inf, device=DEVICE)
        everything, stats = run(q, k, v, thresholds=endless, **options)
        torch.testing.assert_close(everything, dense)
        uncounted = block_sparse_softmax_attention(q, k, v, thresholds=endless, **options)
        torch.testing.assert_close(everything, uncounted)
        assert bool((stats.density == 1).all())
        v[:, :, :128] = torch.nan
        diagonal, stats = run(q, k, v, thresholds=-endless, **options)
        assert torch.equal(stats.kept[0, 0], stats.kept.new_tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]))
        assert bool(diagonal[:, :, :128].isnan().all()) and bool(diagonal[:, :, 128:].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_what_tma_cannot_read_goes_by_pointers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses and strides off 16 bytes, and one head expanded to several."""
    seen = use_design(monkeypatch, False, False)
    q, k, v = Shape(150, 333, kv_heads=2).tensors(
        torch.float32 if DEVICE == "cpu" else torch.bfloat16
    )  # 16 bits are copied there
    expected = run(q, k, v, thresholds=None, backend=backend)[0]
    wide = torch.zeros(1, 2, 333, 18, dtype=k.dtype, device=DEVICE)
    wide[..., :16] = k
    shifted = torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v)
    for one in ((q, wide[..., :16], v), (q, k, shifted)):
        torch.testing.assert_close(run(*one, thresholds=None, backend=backend)[0], expected)
    run(q, k[:, :1].expand_as(k), v, thresholds=None, backend=backend)
    assert seen == [True, False, False, False]


@pytest.mark.parametrize("head_dim", TABLES)
@pytest.mark.parametrize("design", ["gated", "ungated", "given_64", "given_128"])
@pytest.mark.parametrize(("readable", "generation"), [(True, 9), (False, 9), (True, 8)])
def test_launches_use_tma_where_it_is(
    head_dim: int, design: str, readable: bool, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    shared_memory.cache_clear()
    choose = tuning.block_sparse_launch.__wrapped__  # not its cache, which is of real devices
    launch = choose(design, head_dim, torch.bfloat16, torch.device("cuda"), readable)
    shared_memory.cache_clear()
    table = TABLES[head_dim]
    assert launch.descriptors == (table[design].descriptors and readable and generation == 9)
    assert launch.fused == table[design].fused
    assert generation == 9 or launch.registers is None
