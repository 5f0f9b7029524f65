"""The Triton kernels as an operator: tracing, recomputation, CUDA graphs, errors, compile time, memory."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import kernels.alpha_entmax.attention
import kernels.alpha_entmax.backward_launches
import kernels.alpha_entmax.launches
import kernels.common.backends
from kernels import entmax_attention
from kernels.alpha_entmax.attention import unsupported_by_triton
from kernels.alpha_entmax.operator import sum_operator, thresholds_operator
from tests.kernels.conftest import SLOPES
from tests.kernels.helpers import (
    DEVICE,
    MIXED,
    NAMES,
    compute,
    draw,
    draw_qkv,
    int32,
    needs_cuda,
    needs_triton,
    operators,
    per_head,
)
from tests.kernels.operators import check_cuda_graph

pytestmark = needs_triton
ROOT = Path(__file__).parents[3]


# Tracing and recomputation


@pytest.mark.parametrize("stats", [False, True])
def test_registered_operators_are_sound(stats: bool) -> None:
    """Among other things: the sum changes none of the thresholds that it is given."""
    q, k, v, _ = draw_qkv(4, 2, 9, 9)
    alpha, slopes = per_head(MIXED), torch.tensor(SLOPES, device=DEVICE)
    shared = (0.25, "general")
    given = (*shared, True, int32(0, 4, 9), None, slopes, None, True, stats, True)
    torch.library.opcheck(thresholds_operator, inputs := (q.detach(), k.detach(), alpha.detach(), *given))
    found = thresholds_operator(*inputs)
    torch.library.opcheck(sum_operator, (q, k, v, alpha, *found, *shared, slopes, True, stats))


def _attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    slopes = torch.tensor(SLOPES, device=DEVICE)
    return entmax_attention(
        q * 1.5, k, v, alpha=alpha, cu_seqlens=int32(0, 30, 70), alibi_slopes=slopes, backend="triton"
    )


def _same_gradients(attend: Any, inputs: tuple[Tensor, ...]) -> None:
    q, k, v, weight = inputs
    alpha = per_head(MIXED)
    results = []
    for f in (_attend, attend):
        out = f(q, k, v, alpha)
        results.append((out, *torch.autograd.grad(out, (q, k, v, alpha), weight)))
    for name, x, y in zip(NAMES, *results, strict=True):
        assert torch.equal(x, y), name


def test_compiled_equals_eager() -> None:
    _same_gradients(torch.compile(_attend, fullgraph=True, backend="aot_eager"), draw_qkv(4, 2, 70, 70))


@needs_cuda
def test_inductor_equals_eager() -> None:
    """q is scaled outside the operator by one rounding in either."""
    _same_gradients(torch.compile(_attend, fullgraph=True), draw_qkv(4, 2, 70, 70))


def test_checkpointed_equals_plain() -> None:
    _same_gradients(lambda *args: checkpoint(_attend, *args, use_reentrant=False), draw_qkv(4, 2, 70, 70))


@needs_cuda
def test_cuda_graph_equals_eager() -> None:
    q, k, v, weight = draw_qkv(4, 2, 700, 700, 64, dtype=torch.bfloat16)
    alpha = per_head(MIXED)
    slopes, bounds = torch.tensor(SLOPES, device=DEVICE), int32(0, 300, 700)

    def step() -> tuple[Tensor, ...]:
        out = entmax_attention(q, k, v, alpha=alpha, cu_seqlens=bounds, alibi_slopes=slopes, backend="triton")
        return out.detach(), *torch.autograd.grad(out, (q, k, v, alpha), weight)

    def redraw(seed: int) -> None:
        for i, x in enumerate((q, k, v, weight)):
            x.copy_(draw(*x.shape, seed=seed + i, dtype=x.dtype))

    check_cuda_graph(step, redraw)


# Errors


def _small(dtype: torch.dtype = torch.float32, head_dim: int = 16) -> dict[str, Tensor]:
    q, k, v, _ = (x.detach() for x in draw_qkv(2, 1, 3, 3, head_dim, dtype=dtype))
    return dict(q=q, k=k, v=v)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [(dict(dtype=torch.float64), "torch.float64 and 16"), (dict(head_dim=257), "torch.float32 and 257")],
    ids=str,
)
def test_unsupported_inputs_are_named(inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entmax_attention(**_small(**inputs), backend="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(kernels.common.backends, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; set TRITON_INTERPRET=1"):
        entmax_attention(**{name: x.cpu() for name, x in _small().items()}, backend="triton")


def test_differentiating_what_kept_nothing() -> None:
    q, k, v, _ = draw_qkv(1, 1, 3, 3)
    out = operators(q, k, v, per_head(1.5, 1))[0].out
    with pytest.raises(RuntimeError, match="gradient=False"):
        out.sum().backward()


# Cost on CUDA


FIRST_CALL = """
import time, torch
from kernels import entmax_attention
from kernels.alpha_entmax.attention import unsupported_by_triton
q, k, v = (torch.randn(1, 2, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
alpha = torch.full((2,), 1.5, device="cuda", requires_grad=True)
torch.cuda.synchronize()
start = time.perf_counter()
entmax_attention(q, k, v, alpha=alpha, backend="triton").sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@needs_cuda
def test_first_call_compiles_in_half_a_minute(tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_CALL]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert float(printed) < 30


@needs_cuda
def test_a_new_length_compiles_nothing() -> None:
    names = ("key_intervals", "entmax_scan", "entmax_refine", "entmax_sum")
    names += ("entmax_backward_queries", "count_columns", "plan_columns", "entmax_backward_keys", "add_parts")
    launches = (kernels.alpha_entmax.launches, kernels.alpha_entmax.backward_launches)
    modules = [kernels.common.tiles, *launches]
    functions = [getattr(next(m for m in modules if hasattr(m, name)), name) for name in names]

    def compiled() -> int:
        return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())

    def step(n_queries: int, n_keys: int) -> None:
        compute(draw_qkv(4, 2, n_queries, n_keys, 64, dtype=torch.bfloat16), per_head(1.5), "triton")

    step(512, 512)
    before = compiled()
    assert before >= len(functions)
    start = time.perf_counter()
    for sizes in ((777, 777), (1000, 1000), (1, 64), (1, 1), (2048, 2048), (100, 5000)):
        step(*sizes)
    assert compiled() == before, f"compiled for {time.perf_counter() - start:.1f} s"


@needs_cuda
def test_memory_is_at_most_that_of_flash_attention() -> None:
    q, k, v, weight = draw_qkv(8, 8, 8192, 8192, 64, dtype=torch.bfloat16)

    def peak(attend: Any) -> int:
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = attend()
            torch.autograd.grad(out, (q, k, v), weight)
            del out
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def flash() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    assert peak(lambda: entmax_attention(q, k, v, backend="triton")) <= peak(flash)


def test_auto_says_once_why_it_is_slow(monkeypatch) -> None:
    """And promises no launch that does not fit into the GPU's shared memory."""
    cuda, q = torch.device("cuda", 0), SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(kernels.alpha_entmax.attention, "shared_memory", lambda device: 99 * 1024)
    fits = [(torch.bfloat16, 256), (torch.float16, 64), (torch.float32, 128)]
    assert all(unsupported_by_triton(*kind, cuda) is None for kind in fits)
    reason = unsupported_by_triton(torch.float32, 256, cuda)
    assert reason and "head dims up to 128 on a GPU with 99 KiB" in reason
    block_sparse = kernels.block_sparse.tuning.widest_head_dim
    assert "up to 128 on a GPU" in str(unsupported_by_triton(torch.bfloat16, 256, cuda, block_sparse))
    assert "up to 64 on a GPU" in str(unsupported_by_triton(torch.float32, 128, cuda, block_sparse))
    monkeypatch.setattr(kernels.alpha_entmax.attention, "shared_memory", lambda device: 163 * 1024)
    assert all(unsupported_by_triton(*kind, cuda, block_sparse) is None for kind in fits)
    monkeypatch.setattr(kernels.alpha_entmax.attention, "shared_memory", lambda device: 99 * 1024)
    choices = kernels.alpha_entmax.attention.BACKENDS
    with pytest.warns(RuntimeWarning, match="slow PyTorch path on CUDA: the Triton one takes") as seen:
        assert [kernels.common.backends.choose_backend("auto", choices, q, reason) for _ in range(3)] == ["torch"] * 3
    assert len(seen) == 1
    monkeypatch.setattr(kernels.alpha_entmax.attention, "shared_memory", lambda device: 227 * 1024)
    assert unsupported_by_triton(torch.float32, 256, cuda) is None
