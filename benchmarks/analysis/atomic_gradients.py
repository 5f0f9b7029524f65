"""What adding dq atomically would cost a pass over keys, beside the product that it would save elsewhere.

    python -m benchmarks.analysis.atomic_gradients

The pass has the loops of a causal backward over keys, 16 heads of 64 in bfloat16, with two of its products (scores, dk)
in place of four. A row is of one size of tiles; columns: without dq; with the product of dq alone, summed up where it
is; with it added to float32 dq by atomics (red), or by the tensor copy engine (tma). Needs a CUDA device.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import sys
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from common.arguments import PlainParser
from common.errors import UsageError, run_command

HEADS, HEAD_DIM = 16, 64
MODES = ("none", "product", "red", "tma")
NONE, PRODUCT, RED, TMA = range(4)
TILES = ((64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8))  # queries, keys, warps


@triton.jit
def backward_over_keys(
    p_q, p_k, p_dk, p_dq, dq_rows, n_tokens, MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    i_key_block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, D)[None, :]
    keys = (head * n_tokens + i_key_block * BN + tl.arange(0, BN))[:, None] * D + dim
    k = tl.load(p_k + keys)
    dk = tl.zeros([BN, D], tl.float32)
    for i_block in range(i_key_block * BN // BM, n_tokens // BM):
        first = head * n_tokens + i_block * BM
        rows = (first + tl.arange(0, BM))[:, None] * D + dim
        q = tl.load(p_q + rows)
        ds = tl.dot(q, tl.trans(k)).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk)
        if MODE > 0:
            dq = tl.dot(ds, k)
            if MODE == 1:
                dk += tl.sum(dq)
            elif MODE == 2:
                tl.atomic_add(p_dq + rows, dq, sem="relaxed")
            else:
                dq_rows.atomic_add([first, 0], dq)
    tl.store(p_dk + keys, dk)


def launch(q: Tensor, k: Tensor, dk: Tensor, dq: Tensor, mode: int, tile: tuple[int, int, int]) -> None:
    """Writes dk and adds to dq, float32 (H, T, D), of q and k (H, T, D) in 16 bits and ds = q k^T below the diagonal's
    tiles. mode: a number of MODES. tile: one of TILES."""
    n_queries, n_keys, warps = tile
    heads, n_tokens, head_dim = q.shape
    rows = TensorDescriptor.from_tensor(dq.view(-1, head_dim), [n_queries, head_dim])
    grid = (n_tokens // n_keys, heads)
    backward_over_keys[grid](q, k, dk, dq, rows, n_tokens, mode, n_queries, n_keys, head_dim, num_warps=warps)


def main(arguments: list[str]) -> int:
    parser = PlainParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])

    def work(given: list[str]) -> list[str]:
        options = parser.parse_args(given)
        if not torch.cuda.is_available():
            raise UsageError("no CUDA device was found: this times kernels on one")
        lines = [
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; milliseconds"
        ]
        for n_tokens in options.lengths:
            if n_tokens % 128 or n_tokens < 128:
                raise UsageError(f"--lengths is {n_tokens}: expected multiples of 128")
            q, k = (torch.randn(HEADS, n_tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            dk, dq = (torch.zeros_like(q, dtype=torch.float32) for _ in range(2))
            for tile in TILES:
                calls = [partial(launch, q, k, dk, dq, mode, tile) for mode in range(len(MODES))]
                found = [triton.testing.do_bench(call) for call in calls]
                times = ", ".join(f"{name} {ms:.2f}" for name, ms in zip(MODES, found, strict=True))
                lines.append(f"{n_tokens} tokens, tiles of {tile[0]} x {tile[1]}, {tile[2]} warps: {times}")
        return lines

    return run_command(work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
