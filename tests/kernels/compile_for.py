"""Compiles every Triton kernel for a GPU, on a machine without one; nothing is launched.

    TRITON_INTERPRET=0 python -m tests.kernels.compile_for 9.0 64-bfloat16 64-float32 rows

The compute capability, and for what: head dim and dtype of attention, or the row-wise op. Prints a line a compilation:
what it is for, the kernel's name, its shared memory in bytes, and how often it moves a product to another layout, which
in a loop costs more than the product.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernels.alpha_entmax.attention
import kernels.alpha_entmax.backward_launches
import kernels.alpha_entmax.decode
import kernels.alpha_entmax.launches
import kernels.alpha_entmax.results
import kernels.alpha_entmax.rowwise
import kernels.block_bias.attention
import kernels.block_bias.launches
import kernels.block_importance.attention
import kernels.block_importance.launches
import kernels.block_means.attention
import kernels.block_means.launches
import kernels.block_sparse.attention
import kernels.block_sparse.operator
import kernels.lightning_indexer.chosen_launches
import kernels.lightning_indexer.launches
import kernels.selected_blocks.attention
import kernels.selected_blocks.launches
from kernels import (
    block_bias_attention,
    block_importance_scores,
    block_mean_scores,
    block_sparse_softmax_attention,
    entmax,
    entmax_attention,
    selected_block_attention,
)
from kernels.block_sparse.reference import QUERY_BLOCKS
from kernels.lightning_indexer.indexer import chosen_attention, indexer_loss, select_keys

LAUNCHING = {
    kernels.alpha_entmax.launches: ("scan_launch", "pass_launch", "program_count", "dot_precision"),
    kernels.alpha_entmax.backward_launches: ("program_count",),
    kernels.alpha_entmax.decode: ("decode_launch", "program_count"),
    kernels.block_bias.launches: ("block_bias_launch", "dot_precision"),
    kernels.block_importance.launches: ("importance_launch", "dot_precision"),
    kernels.block_means.launches: ("dot_precision",),
    kernels.block_sparse.operator: ("block_sparse_launch", "program_count", "dot_precision"),
    kernels.selected_blocks.launches: ("selected_launch", "dot_precision"),
    kernels.lightning_indexer.chosen_launches: ("indexer_launch",),
    kernels.lightning_indexer.launches: ("indexer_launch", "dot_precision"),
}
CHOOSING = (
    kernels.alpha_entmax.attention,
    kernels.block_bias.attention,
    kernels.block_importance.attention,
    kernels.block_means.attention,
    kernels.block_sparse.attention,
    kernels.alpha_entmax.rowwise,
    kernels.selected_blocks.attention,
)
MOVED = re.compile(r"convert_layout .*: tensor<\d{2,}x\d{2,}xf32, #mma\d*> ->")
CUDA = torch.device("cuda", 0)
doing: list[str] = []


# bytes of shared memory that one program can have: A100, RTX 30, RTX 40, H100, RTX 50
SHARED_MEMORY = {"8.0": 163 * 1024, "8.6": 99 * 1024, "8.9": 99 * 1024, "9.0": 227 * 1024, "12.0": 99 * 1024}


class Driver:
    """What Triton asks before it compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


class Properties:
    multi_processor_count = 132
    shared_memory_per_block_optin = 0


def on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with CUDA in place of the device that it is asked for."""
    return lambda *given, **named: function(*(CUDA if isinstance(x, torch.device) else x for x in given), **named)


def pretend(capability: str) -> None:
    """CPU tensors take the launches that they would take on that GPU, and launching is compiling."""
    major, minor = map(int, capability.split("."))
    Properties.shared_memory_per_block_optin = SHARED_MEMORY[capability]
    driver.set_active(Driver((major, minor)))
    torch.cuda.get_device_capability = lambda device=None: (major, minor)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: Properties  # type: ignore[assignment]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        moved = sum(bool(MOVED.search(line)) for line in compiled.asm["ttgir"].splitlines())
        print(doing[-1], self.fn.__name__, compiled.metadata.shared, moved, flush=True)
        return compiled

    JITFunction.run = compile_only
    for module, names in LAUNCHING.items():
        for name in names:
            setattr(module, name, on_cuda(getattr(module, name)))
    kernels.alpha_entmax.results.SHORTEST_KEY_LIST = 0  # what long inputs take
    for module in CHOOSING:
        module.choose_backend = lambda *_: "triton"


def attend(head_dim: int, dtype: torch.dtype) -> None:
    """Training, decoding, block-sparse softmax, selected blocks and what they are selected by, the lightning indexer, a
    bias for each block and scores of blocks, with position bias."""

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, 2, tokens, head_dim).to(dtype).requires_grad_()

    q, k, v = draw(128), draw(128), draw(128)
    alpha, slopes = torch.tensor([1.3, 1.4]).requires_grad_(), torch.tensor([1.0, 0.5])
    out = entmax_attention(q, k, v, alpha=alpha, alibi_slopes=slopes, backend="triton")
    assert isinstance(out, Tensor)
    out.sum().backward()
    with torch.no_grad():
        lengths = torch.tensor([100], dtype=torch.int32)
        entmax_attention(draw(1), k, v, alpha=alpha, kv_lens=lengths, alibi_slopes=slopes, backend="triton")
        if head_dim > kernels.block_sparse.tuning.widest_head_dim(dtype, Properties.shared_memory_per_block_optin):
            return
        block_sparse_softmax_attention(q, k, v, thresholds=torch.zeros(2, 1), alibi_slopes=slopes, backend="triton")
        block_sparse_softmax_attention(q, k, v, backend="triton")
        for size in QUERY_BLOCKS:
            grid = torch.ones(1, 1, 128 // size, 2, dtype=torch.bool)
            block_sparse_softmax_attention(q, k, v, blocks=grid, query_block=size, backend="triton")
    own = torch.arange(128)[None]
    first = (own // 64 * 64)[:, None, :, None].int()
    for few in (128, 0):  # a query at a time, a block at a time
        kernels.selected_blocks.tuning.FEW_QUERIES = few
        selected = (q.detach().requires_grad_(), k[:, :1], v[:, :1], first, own)
        out = selected_block_attention(*selected, block_size=64, alibi_slopes=slopes, backend="triton")
        out.sum().backward()
    block_importance_scores(
        q, k[:, :1, :16], 0 * own, own, compress_length=16, compress_stride=8, block_size=32, n_blocks=4,
        select_local=2, alibi_slopes=slopes, backend="triton",
    )  # fmt: skip
    index_dim = min(head_dim, kernels.lightning_indexer.indexer.INDEX_DIM_MAX)
    index = torch.randn(1, 4, 128, index_dim).to(dtype), torch.randn(1, 128, index_dim).to(dtype)
    weights, rows = torch.randn(1, 4, 128).to(dtype), (own - own, own)
    chosen = select_keys(*index, weights, *rows, count=10)
    chosen_attention(q, k[:, :1], v[:, :1], *rows, chosen, alibi_slopes=slopes).sum().backward()
    indexer_loss(*index, weights, q.detach(), k[:, :1].detach(), *rows, chosen=chosen, alibi_slopes=slopes)
    for size, last in ((64, 128), (16, 128), (64, 16)):  # the last queries, all or as few as share a small tile
        rows = own[:, -last:]
        bias, leaf = torch.zeros(1, 2, last, 128 // size), q.detach()[:, :, -last:].requires_grad_()
        out = block_bias_attention(
            leaf, k[:, :1], v[:, :1], bias, 0 * rows, rows, block_size=size, alibi_slopes=slopes, backend="triton"
        )  # fmt: skip
        out.sum().backward()
    start = own[0].int() // 64 * 64
    leaf, keys = q.detach().requires_grad_(), k[:, :1].detach().requires_grad_()
    scores = block_mean_scores(
        leaf, keys, 0 * own, own, start, start[::64] + 63, block_size=64, n_blocks=2, alibi_slopes=slopes,
        backend="triton",
    )  # fmt: skip
    scores.sum().backward()


if __name__ == "__main__":
    pretend(sys.argv[1])
    for what in sys.argv[2:]:
        doing.append(what)
        if what == "rows":
            scores = torch.randn(4, 100, requires_grad=True)
            entmax(scores, alpha=torch.tensor(1.3, requires_grad=True)).sum().backward()
        else:
            head_dim, dtype = what.split("-")
            attend(int(head_dim), getattr(torch, dtype))
