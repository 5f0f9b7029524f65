"""The public functions of kernels/."""

import torch

from kernels.attention import entmax_attention
from tests.bad_input.cases import Call


def qkv(**more: int) -> list[torch.Tensor]:
    """Queries, keys and values of two heads, 8 positions, 16 numbers each."""
    sizes = {"batch": 1, "heads": 2, "length": 8, "head_dim": 16} | more
    return [torch.randn(sizes["batch"], sizes["heads"], sizes["length"], sizes["head_dim"]) for _ in range(3)]


CASES = [
    Call("alpha of 1", lambda: entmax_attention(*qkv(), alpha=1.0), ["alpha", "1.0"]),
    Call("unknown backend", lambda: entmax_attention(*qkv(), backend="cuda"), ["backend", "cuda"]),
    Call("window of 0", lambda: entmax_attention(*qkv(), window=0), ["window", "0"]),
]
