"""The public functions of kernels/."""

from typing import Any

import numpy as np
import torch

from kernels import block_sparse_softmax_attention, entmax, entmax_attention
from tests.bad_input.cases import Call


def qkv(**more: int) -> list[torch.Tensor]:
    """Queries, keys and values of two heads, 8 positions, 16 numbers each."""
    sizes = {"batch": 1, "heads": 2, "length": 8, "head_dim": 16} | more
    return [torch.randn(sizes["batch"], sizes["heads"], sizes["length"], sizes["head_dim"]) for _ in range(3)]


def attend(name: str, parts: list[str], raises: type[Exception] = ValueError, **changes: Any) -> Call:
    inputs = dict(zip("qkv", qkv(), strict=True)) | changes
    return Call(name, lambda: entmax_attention(**inputs), parts, raises)


def blocks(name: str, parts: list[str], raises: type[Exception] = ValueError, **changes: Any) -> Call:
    inputs = dict(zip("qkv", qkv(), strict=True)) | changes
    return Call(f"block-sparse, {name}", lambda: block_sparse_softmax_attention(**inputs), parts, raises)


def rows(name: str, parts: list[str], raises: type[Exception] = ValueError, **changes: Any) -> Call:
    inputs = dict(x=torch.zeros(2, 3)) | changes
    return Call(f"entmax, {name}", lambda: entmax(**inputs), parts, raises)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values)


NAN = float("nan")
ARRAY = np.zeros((1, 2, 8, 16), np.float32)
CASES = [
    attend("alpha of 1", ["alpha", "(1, 2]", "1.0"], alpha=1.0),
    attend("alpha of NaN", ["alpha", "(1, 2]", "nan"], alpha=NAN),
    attend("alpha next to 1", ["alpha", "1 + 1e-04", "float32", "1.00001"], alpha=1.00001),
    attend("alpha of a head next to 1", ["alpha", "1 + 1e-04", "1.0000"], alpha=floats(1.5, 1 + 1e-6)),
    attend("alpha in words", ["alpha", "number", "str '1.5'"], TypeError, alpha="1.5"),
    attend("alpha of None", ["alpha", "number", "None"], TypeError, alpha=None),
    attend("alpha as a list", ["alpha", "number", "[1.5, 1.5]"], TypeError, alpha=[1.5, 1.5]),
    attend("alpha of integers", ["alpha", "floating point", "int64"], alpha=torch.tensor([2, 2])),
    attend("alpha of three heads", ["alpha", "(2,)", "(3,)"], alpha=floats(1.5, 1.5, 1.5)),
    attend("unknown backend", ["backend", "cuda"], backend="cuda"),
    attend("backend of None", ["backend", "None"], backend=None),
    attend("window of 0", ["window", "0"], window=0),
    attend("window of a fraction", ["window", "integer", "2.5"], TypeError, window=2.5),
    attend("window of two numbers", ["window", "integer", "[32, 0]"], TypeError, window=[32, 0]),
    attend("window without causal", ["window", "causal=True"], window=4, causal=False),
    attend("causal in words", ["causal", "True or False", "'no'"], TypeError, causal="no"),
    attend("causal of None", ["causal", "True or False", "None"], TypeError, causal=None),
    attend("return_stats of 1", ["return_stats", "True or False", "1"], TypeError, return_stats=1),
    attend("q of None", ["q", "torch.Tensor", "None"], TypeError, q=None),
    attend("q as an array", ["q", "torch.Tensor", "ndarray"], TypeError, q=ARRAY),
    attend("k as a list", ["k", "torch.Tensor", "list"], TypeError, k=[[0.0]]),
    attend("q sparse", ["q", "dense", "sparse"], q=torch.zeros(1, 2, 8, 16).to_sparse()),
    attend("q of three dimensions", ["q", "(batch, heads, tokens, head dim)", "(2, 8, 16)"], q=torch.zeros(2, 8, 16)),
    attend("head dim of 0", ["q", "head dim", "(1, 2, 8, 0)"], **dict(zip("qkv", qkv(head_dim=0), strict=True))),
    attend("q of integers", ["q", "int64"], **{name: torch.zeros(1, 2, 8, 16).long() for name in "qkv"}),
    attend("k of another dtype", ["k", "float64", "float32"], k=torch.zeros(1, 2, 8, 16).double()),
    attend("k on another device", ["k", "one device", "meta"], k=torch.zeros(1, 2, 8, 16, device="meta")),
    attend("v of other lengths", ["k and v", "(1, 2, 7, 16)"], v=torch.zeros(1, 2, 7, 16)),
    attend("three key heads", ["multiple", "2 and 3"], k=torch.zeros(1, 3, 8, 16), v=torch.zeros(1, 3, 8, 16)),
    attend("scale of NaN", ["scale", "positive", "nan"], scale=NAN),
    attend("scale as a tensor", ["scale", "number", "tensor"], TypeError, scale=floats(1.0)),
    attend("slopes as a list", ["alibi_slopes", "torch.Tensor", "[1.0, 0.5]"], TypeError, alibi_slopes=[1.0, 0.5]),
    attend("slopes below 0", ["alibi_slopes", "at least 0", "-0.5"], alibi_slopes=floats(1.0, -0.5)),
    attend("slopes of NaN", ["alibi_slopes", "finite", "nan"], alibi_slopes=floats(1.0, NAN)),
    attend("slopes of integers", ["alibi_slopes", "floating point", "int32"], alibi_slopes=int32(1, 2)),
    attend("slopes that learn", ["alibi_slopes", "require grad"], alibi_slopes=floats(1.0, 0.5).requires_grad_()),
    attend("slopes of one head", ["alibi_slopes", "(2,)", "(1,)"], alibi_slopes=floats(1.0)),
    attend("documents as a list", ["cu_seqlens", "torch.Tensor", "[0, 8]"], TypeError, cu_seqlens=[0, 8]),
    attend("documents of int64", ["cu_seqlens", "int32", "int64"], cu_seqlens=torch.tensor([0, 8])),
    attend("documents that end early", ["cu_seqlens", "T = 8", "[0, 5]"], cu_seqlens=int32(0, 5)),
    attend("documents that fall", ["cu_seqlens", "rise", "[0, 6, 4, 8]"], cu_seqlens=int32(0, 6, 4, 8)),
    attend("documents and key lengths", ["cu_seqlens", "kv_lens"], cu_seqlens=int32(0, 8), kv_lens=int32(8)),
    attend("too many valid keys", ["kv_lens", "Tk = 8", "[9]"], kv_lens=int32(9)),
    attend("valid keys below 0", ["kv_lens", "0 ...", "[-1]"], kv_lens=int32(-1)),
    attend("key lengths of two rows", ["kv_lens", "(1,)", "(2,)"], kv_lens=int32(8, 8)),
    attend("key lengths as a list", ["kv_lens", "torch.Tensor", "[8]"], TypeError, kv_lens=[8]),
    blocks("thresholds as a list", ["thresholds", "torch.Tensor", "[[0.0]]"], TypeError, thresholds=[[0.0]]),
    blocks("thresholds of NaN", ["thresholds", "NaN"], thresholds=floats(0.0, NAN)[:, None]),
    blocks("thresholds of one head", ["thresholds", "(2, P)", "(1, 1)"], thresholds=torch.zeros(1, 1)),
    blocks("blocks as a list", ["blocks", "torch.Tensor", "[True]"], TypeError, blocks=[True]),
    blocks("blocks of floats", ["blocks", "bool", "float32"], blocks=torch.ones(1, 2, 1, 1)),
    blocks(
        "blocks and thresholds",
        ["thresholds and blocks"],
        blocks=torch.ones(1, 2, 1, 1).bool(),
        thresholds=torch.zeros(2, 1),
    ),
    blocks("query_block of 32", ["query_block", "32"], blocks=torch.ones(1, 2, 1, 1).bool(), query_block=32),
    blocks("q of None", ["q", "torch.Tensor", "None"], TypeError, q=None),
    blocks("causal of 0", ["causal", "True or False", "0"], TypeError, causal=0),
    blocks("slopes below 0", ["alibi_slopes", "at least 0", "-1.0"], alibi_slopes=floats(-1.0, 1.0)),
    rows("x as a list", ["x", "torch.Tensor", "[1.0]"], TypeError, x=[1.0]),
    rows("x as an array", ["x", "torch.Tensor", "ndarray"], TypeError, x=ARRAY),
    rows("x of integers", ["x", "int64"], x=torch.zeros(3).long()),
    rows("dim past the last", ["dim", "2"], dim=2),
    rows("dim of a fraction", ["dim", "integer", "0.5"], TypeError, dim=0.5),
    rows("alpha of 3", ["alpha", "(1, 2]", "3"], alpha=3),
    rows("alpha next to 1", ["alpha", "1 + 1e-04", "1.000001"], alpha=1.000001),
    rows("alpha in words", ["alpha", "number", "'1.5'"], TypeError, alpha="1.5"),
    rows("alpha of another shape", ["alpha", "(2, 1)", "(2, 3)"], alpha=torch.full((2, 3), 1.5)),
    rows("unknown backend", ["backend", "reference"], backend="reference"),
]
