"""DeepSeek Sparse Attention written out: loops over queries, keys and heads of one document, in float64."""

from math import cos, exp, frexp, ldexp, log, sin

import torch
from torch import Tensor

from model.config import AttentionConfig, DSAConfig, ModelConfig
from model.dsa.attention import DeepSeekSparseAttention
from model.transformer import Transformer
from tests.model.sparse_inputs import with_large_weights

SIZES = DSAConfig(index_heads=3, index_dim=8, select_tokens=9)
WARMUP = DSAConfig(index_heads=3, index_dim=8, select_tokens=9, stage="warmup")


def network(sizes: DSAConfig = SIZES, positions: str = "nope", **options) -> ModelConfig:
    widths = dict(vocab_size=61, n_layers=1, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32)
    return ModelConfig(**{**widths, **options}, positions=positions, attention=AttentionConfig(kind="dsa", dsa=sizes))  # type: ignore[arg-type]


def module(config: ModelConfig, seed: int = 0) -> DeepSeekSparseAttention:
    """A layer's, in float64 and in eval mode, with weights large enough that it chooses clearly."""
    torch.manual_seed(seed)
    found = Transformer(config).double().eval().layers()[0].attention.sparse
    assert isinstance(found, DeepSeekSparseAttention)
    with_large_weights(found)
    return found


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """The first half of the channels rotated: pair i is channels i and i + (half of it)."""
    x, half = x.clone(), len(x) // 2
    for i in range(half // 2):
        angle = float(torch.tensor(position * base ** (-2 * i / half)))
        a, b = float(x[i]), float(x[i + half // 2])
        x[i], x[i + half // 2] = a * cos(angle) - b * sin(angle), b * cos(angle) + a * sin(angle)
    return x


@torch.no_grad()
def scores(sparse: DeepSeekSparseAttention, x: Tensor, base: float | None = None) -> Tensor:
    """I, (T, T) with -inf for what is not visible. x: (T, C). base: of rope, None for no positions."""
    indexer, sizes, n = sparse.indexer, sparse.config, len(x)
    keys, queries = [], []
    for t in range(n):
        k = indexer.wk.weight @ x[t]
        k = (k - k.mean()) / (k.var(unbiased=False) + indexer.k_norm.eps) ** 0.5
        k = k * indexer.k_norm.weight + indexer.k_norm.bias
        q = list((indexer.wq.weight @ x[t]).split(sizes.index_dim))
        if base is not None:
            k, q = turned(k, t, base), [turned(one, t, base) for one in q]
        keys.append(k)
        queries.append(q)
    found = torch.full((n, n), -torch.inf, dtype=torch.float64)
    for t in range(n):
        w = indexer.head_weight.weight @ x[t] * sizes.index_heads**-0.5 * sizes.index_dim**-0.5
        for s in range(t + 1):
            found[t, s] = sum(float(w[j]) * max(0.0, float(queries[t][j] @ keys[s])) for j in range(sizes.index_heads))
    return found


def rounded(x: float) -> float:
    """To 12 bits."""
    mantissa, exponent = frexp(x)
    return ldexp(round(mantissa * 2**12), exponent - 12)


def chosen(index: Tensor, t: int, count: int) -> list[int]:
    """Keys of query t in order: the highest scores in 12 bits, of equal ones the later key."""
    return sorted(sorted(range(t + 1), key=lambda s: (rounded(float(index[t, s])), s))[-count:])


def weights(q: Tensor, k: Tensor, t: int, keys: list[int], slope: float) -> Tensor:
    """Softmax weights of one head. q: (T, D)."""
    each = [float(q[t] @ k[s]) * q.shape[1] ** -0.5 - slope * (t - s) for s in keys]
    powers = torch.tensor([exp(one - max(each)) for one in each], dtype=torch.float64)
    return powers / powers.sum()


def attended(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: int, slopes: Tensor | None) -> tuple[Tensor, float]:
    """Output (H, T, D), and sum over queries of KL(p || softmax(I)) on the chosen keys. q, k, v: one row."""
    out, loss, per_group = torch.zeros_like(q), 0.0, len(q) // len(k)
    for t in range(q.shape[1]):
        keys = chosen(index, t, count)
        each = [
            weights(q[h], k[h // per_group], t, keys, 0.0 if slopes is None else float(slopes[h]))
            for h in range(len(q))
        ]
        for h, one in enumerate(each):
            out[h, t] = one @ v[h // per_group, keys]
        p = sum(each) / float(sum(one.sum() for one in each))
        ours = torch.tensor([exp(float(index[t, s])) for s in keys], dtype=torch.float64)
        ours /= ours.sum()
        loss += sum(float(a) * log(float(a) / float(b)) for a, b in zip(p, ours, strict=True))
    return out, loss
