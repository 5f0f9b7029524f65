"""Native Sparse Attention written out: loops over heads, queries and keys of one document, in float64."""

from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import AttentionConfig, ModelConfig, NSAConfig
from model.nsa.attention import BlockCompression, NativeSparseAttention
from model.transformer import Transformer
from tests.model.sparse_inputs import with_large_weights

# blocks of 8 tokens are selected from, of 6 compressed, every 2: overlaps of 1 2 3 3 2 1 strides
SIZES = NSAConfig(compress_length=6, compress_stride=2, select_block=8, select_count=4, select_local=2, window=11)


def network(sizes: NSAConfig = SIZES, positions: str = "nope", **options) -> ModelConfig:
    widths = dict(vocab_size=61, n_layers=1, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32)
    return ModelConfig(**{**widths, **options}, positions=positions, attention=AttentionConfig(kind="nsa", nsa=sizes))  # type: ignore[arg-type]


def module(config: ModelConfig, seed: int = 0) -> NativeSparseAttention:
    """A layer's, in float64, with weights large enough that it chooses clearly."""
    torch.manual_seed(seed)
    found = Transformer(config).double().layers()[0].attention.sparse
    assert isinstance(found, NativeSparseAttention)
    with_large_weights(found)
    return found


def compressed(x: Tensor, phi: BlockCompression, sizes: NSAConfig) -> Tensor:
    """x: (T, D) -> (blocks, D)."""
    found = []
    for start in range(0, len(x) - sizes.compress_length + 1, sizes.compress_stride):
        tokens = [x[start + i] + phi.place.weight[i] for i in range(sizes.compress_length)]
        found.append(phi.w_out.weight @ F.silu(phi.w_in.weight @ torch.cat(tokens)))
    return torch.stack(found) if found else x[:0]


def softmax_over(q: Tensor, k: Tensor, keys: list[int], places: list[int], t: int, slope: float) -> Tensor:
    """Weights of `keys`; places: their positions."""
    scores = [float(q @ k[j]) * len(q) ** -0.5 - slope * (t - place) for j, place in zip(keys, places, strict=True)]
    weights = [exp(score - max(scores)) for score in scores]
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def chosen_blocks(weights: list[Tensor], t: int, sizes: NSAConfig) -> set[int]:
    """weights: of each head of a group, of the first compressed blocks."""
    own = t // sizes.select_block
    scores = [0.0] * (own + 1)
    for one in weights:
        for i, weight in enumerate(one.tolist()):
            for token in range(i * sizes.compress_stride, i * sizes.compress_stride + sizes.compress_length):
                scores[token // sizes.select_block] += weight
    always = {0, *range(max(0, own - sizes.select_local + 1), own + 1)}
    others = sorted(set(range(own + 1)) - always, key=lambda j: -scores[j])
    return always | set(others[: sizes.select_count - len(always)])


@torch.no_grad()
def branches(sparse: NativeSparseAttention, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> list[Tensor]:
    """What compression, selection and window give. q: (H, T, D), k and v: (3 G, T, D) -> three of (H, T, D)."""
    sizes, groups = sparse.sizes, sparse.n_kv_heads
    n_tokens, per_group = q.shape[1], q.shape[0] // groups
    out = [torch.zeros_like(q) for _ in range(3)]
    for group in range(groups):
        keys, values = ([x[branch * groups + group] for branch in range(3)] for x in (k, v))
        keys[0], values[0] = (
            compressed(keys[0], sparse.compress_k, sizes),
            compressed(values[0], sparse.compress_v, sizes),
        )
        ends = [i * sizes.compress_stride + sizes.compress_length - 1 for i in range(len(keys[0]))]
        for t in range(n_tokens):
            seen = [i for i, end in enumerate(ends) if end <= t]
            window = list(range(max(0, t - sizes.window + 1), t + 1))
            members = range(group * per_group, (group + 1) * per_group)
            slope = {h: 0.0 if slopes is None else float(slopes[h]) for h in members}
            rated = {
                h: softmax_over(q[h, t], keys[0], seen, [ends[i] for i in seen], t, slope[h]) for h in members if seen
            }
            blocks = chosen_blocks(list(rated.values()), t, sizes)
            selected = [j for j in range(t + 1) if j // sizes.select_block in blocks]
            for h in members:
                if seen:
                    out[0][h, t] = rated[h] @ values[0][seen]
                out[1][h, t] = softmax_over(q[h, t], keys[1], selected, selected, t, slope[h]) @ values[1][selected]
                out[2][h, t] = softmax_over(q[h, t], keys[2], window, window, t, slope[h]) @ values[2][window]
    return out
