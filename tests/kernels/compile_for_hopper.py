"""Compiles every Triton kernel for a Hopper GPU, on a machine without one; nothing is launched.

    TRITON_INTERPRET=0 python -m tests.kernels.compile_for_hopper

Prints a line a compilation: the kernel's name and its shared memory in bytes.
"""

from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernels.attention
import kernels.block_sparse_softmax
import kernels.block_sparse_triton
import kernels.entmax_decode
import kernels.entmax_triton
import kernels.rowwise
from kernels import block_sparse_softmax_attention, entmax, entmax_attention

LAUNCHING = (kernels.entmax_triton, kernels.entmax_decode, kernels.block_sparse_triton)
CHOOSING = (kernels.attention, kernels.block_sparse_softmax, kernels.rowwise)
CUDA = torch.device("cuda", 0)


class Hopper:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


class Properties:
    multi_processor_count = 132


def pretend() -> None:
    """CPU tensors take the launches that they would take on an H100, and launching is compiling."""
    driver.set_active(Hopper())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: Properties  # type: ignore[assignment]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        print(self.fn.__name__, compiled.metadata.shared)
        return compiled

    JITFunction.run = compile_only
    for module in LAUNCHING:
        launch_for, program_count = module.launch_for, module.program_count
        module.launch_for = lambda kernel, head_dim, dtype, device, f=launch_for, **more: f(
            kernel, head_dim, dtype, CUDA, **more
        )
        module.program_count = lambda launch, device, n_tasks, f=program_count: f(launch, CUDA, n_tasks)
    for module in CHOOSING:
        module.choose_backend = lambda *_: "triton"


def attend(head_dim: int, dtype: torch.dtype) -> None:
    """Training, decoding and block-sparse softmax, with position bias."""

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
        block_sparse_softmax_attention(q, k, v, thresholds=torch.zeros(2, 1), alibi_slopes=slopes, backend="triton")


if __name__ == "__main__":
    pretend()
    for head_dim in (64, 128):
        attend(head_dim, torch.bfloat16)
    attend(64, torch.float32)
    scores = torch.randn(4, 100, requires_grad=True)
    entmax(scores, alpha=torch.tensor(1.3, requires_grad=True)).sum().backward()
