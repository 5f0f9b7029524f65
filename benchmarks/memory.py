"""Peak memory of one forward and backward pass of entmax_attention beyond inputs, output and gradients.

    python -m benchmarks.memory 8192 16384

On CPU each length runs in a process of its own (the peak resident set never falls), after a warm-up at a small length.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import subprocess
import sys

import torch

from common.arguments import PlainParser, a_count
from common.errors import user_errors
from kernels import entmax_attention
from kernels.common.visibility import TILE

WARM_UP = 4 * TILE


def run(length: int, heads: int, head_dim: int, device: str) -> int:
    """One pass; returns the bytes of q, k, v, their gradients, the output and its gradient."""
    q, k, v = (torch.randn(1, heads, length, head_dim, device=device, requires_grad=True) for _ in range(3))
    alpha = torch.full((heads,), 1.5, device=device, requires_grad=True)
    out = entmax_attention(q, k, v, alpha=alpha)
    out.backward(torch.randn_like(out))
    return 8 * q.numel() * q.element_size()


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def extra_bytes(length: int, heads: int, head_dim: int, device: str) -> int:
    """Bytes at the peak beyond what stands before the pass and what `run` returns."""
    run(WARM_UP, heads, head_dim, device)
    before = peak_bytes(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    return -before - run(length, heads, head_dim, device) + peak_bytes(device)


def main() -> None:
    parser = PlainParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("lengths", type=a_count, nargs="+")
    parser.add_argument("--heads", type=a_count, default=4)
    parser.add_argument("--head_dim", type=a_count, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape = (options.heads, options.head_dim, options.device)
    if len(options.lengths) == 1:
        print(f"{options.lengths[0]} tokens: {extra_bytes(options.lengths[0], *shape) / 2**20:.1f} MiB extra")
        return
    for length in options.lengths:
        arguments = ["--heads", str(shape[0]), "--head_dim", str(shape[1]), "--device", shape[2]]
        subprocess.run([sys.executable, "-m", "benchmarks.memory", str(length), *arguments], check=True)


if __name__ == "__main__":
    with user_errors():
        main()
