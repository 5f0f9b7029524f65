"""The lightning indexer (DeepSeek-V3.2-Exp, equation 1): what it scores, and which tokens it chooses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from kernels.block_sparse.attention import BACKENDS
from kernels.common.backends import choose_backend
from kernels.lightning_indexer.indexer import select_keys, unsupported
from model.block_masks import TILE, block_mask_of_tiles
from model.config import ModelConfig
from model.dsa.tokens import Tokens
from model.rotary import rotate
from model.visible_attention import View, blocks_of_rows, reached

SCORE_BITS = 12  # of scores that are compared


class IndexInputs(NamedTuple):
    """What scores are made of: q (B, index_heads, n, index_dim), k (B, keys, index_dim), one for all heads, and weights
    (B, index_heads, n)."""

    q: Tensor
    k: Tensor
    weights: Tensor


class LightningIndexer(nn.Module):
    """Projections of the layer's input, which they take detached: the language model's loss does not reach them, nor
    theirs the model.

    As released, index queries and the key are rotated in the first half of their channels, in halves and not in pairs
    of neighbours, here where positions are rotary and the layer rotates; else the indexer knows of no positions. The
    released queries come from a low-rank latent of MLA, which these models do not have: here from the input.
    """

    def __init__(self, config: ModelConfig, rotates: bool) -> None:
        super().__init__()
        assert config.attention.dsa is not None
        heads, dim = config.attention.dsa.index_heads, config.attention.dsa.index_dim
        self.dim, self.rotates, self.scale = dim, rotates, heads**-0.5 * dim**-0.5
        self.wq = nn.Linear(config.d_model, heads * dim, bias=False)
        self.wk = nn.Linear(config.d_model, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, config.norm_eps)
        self.head_weight = nn.Linear(config.d_model, heads, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> IndexInputs:
        """x: (B, n, C). rotary: cos and sin of `rotary_tables`, for index_dim / 4 pairs. dtype: of the key, which a
        cache holds. k: of the n tokens."""
        x = x.detach()
        q = self.wq(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)  # [B, heads, n, dim]
        k = self.k_norm(self.wk(x))[:, None]
        if rotary is not None and self.rotates:
            q, k = (torch.cat((rotate(y[..., : self.dim // 2], *rotary), y[..., self.dim // 2 :]), -1) for y in (q, k))
        weights = self.head_weight(x).transpose(1, 2) * self.scale
        return IndexInputs(q, k[:, 0].to(dtype), weights)


def wide(index: IndexInputs) -> IndexInputs:
    """Detached, in float32 (float64 for such): bfloat16 would make ties of scores that differ."""
    return IndexInputs(*(x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in index))


def head_scores(index: IndexInputs, rows: slice, keys: slice) -> Tensor:
    """ReLU(q_j . k) of `wide` inputs, (B, index_heads, rows, keys)."""
    return (index.q[:, :, rows] @ index.k[:, None, keys].mT).relu_()


def index_scores(index: IndexInputs, rows: slice, keys: slice) -> Tensor:
    """I[t, s] = sum_j w[t, j] ReLU(q_j[t] . k[s]) of `wide` inputs, (B, rows, keys)."""
    return head_scores(index, rows, keys).mul_(index.weights[:, :, rows, None]).sum(1)


@torch.no_grad()
def select_tokens(index: IndexInputs, tokens: Tokens, count: int, backend: str = "auto") -> Tensor:
    """The `count` visible keys of the highest scores, of equal ones the later, NaN being highest; all that are visible
    where these are fewer. Returns bits, uint8 (B, n, keys / 8, rounded up): key j is bit j % 8 of byte j // 8. Without
    gradient, since choosing has none.

    ReLU makes many scores 0, and without positions the same token has the same score wherever it stands, but for the
    rounding of products, which chunks of a prompt change: so scores are compared with SCORE_BITS bits.

    Args:
        backend: as in `index_loss`.
    """
    if choose_backend(backend, BACKENDS, index.q, unsupported(index.q)) == "triton":
        seen = tokens.first_key, tokens.own_key
        return select_keys(*index, *seen, count=count, reach=tokens.reach, score_bits=SCORE_BITS)
    with torch.autocast(index.q.device.type, enabled=False):
        index = wide(index)
        batch, heads, n, _ = index.q.shape
        bits = torch.zeros(batch, n, -(-tokens.n_keys // 8), dtype=torch.uint8, device=index.q.device)
        for rows in blocks_of_rows(n, tokens.n_keys, tokens.reach, batch * heads, index.q.device):
            keys = reached(rows, tokens.n_keys, tokens.reach)
            keys = slice(keys.start // 8 * 8, keys.stop)  # whole bytes
            bits[:, rows, keys.start // 8 : -(-keys.stop // 8)] = _bits(_choose(index, tokens, rows, keys, count))
    return bits


def _choose(index: IndexInputs, tokens: Tokens, rows: slice, keys: slice, count: int) -> Tensor:
    """bool (B, rows, keys). keys: among which are all that the rows see."""
    device, batch = index.q.device, index.q.shape[0]
    i, j = (torch.arange(one.start, one.stop, device=device) for one in (rows, keys))
    b = torch.arange(batch, device=device)
    visible = tokens.visible_keys()(b[:, None, None], b, i[:, None], j).expand(batch, -1, -1)  # [B, rows, keys]
    if count >= keys.stop - keys.start:
        return visible
    scores = coarse(index_scores(index, rows, keys)).masked_fill_(~visible, -torch.inf)
    least = scores.topk(count).values[..., -1:]
    nan, least_nan = scores.isnan(), least.isnan()
    above = (scores > least) | (nan & ~least_nan)
    tied = ((scores == least) | (nan & least_nan)) & visible  # hidden keys have -inf, as visible ones may have
    later = tied.flip(-1).cumsum(-1).flip(-1)  # ties from here on
    return above | (tied & (later <= count - above.sum(-1, keepdim=True)))


def coarse(x: Tensor) -> Tensor:
    """x rounded to SCORE_BITS bits (Veltkamp's splitting), but for what that overflows with."""
    high = x * (2.0 ** (1 - SCORE_BITS) / torch.finfo(x.dtype).eps + 1)
    return torch.where(high.isfinite(), high - (high - x), x)


def _bits(chosen: Tensor) -> Tensor:
    """bool (B, rows, keys) -> uint8 (B, rows, keys / 8)."""
    eights = pad(chosen, (0, -chosen.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, device=chosen.device)).sum(-1).to(torch.uint8)


def chosen_block_mask(chosen: Tensor, view: View, n_keys: int) -> BlockMask:
    """The tiles that hold a key which any query of the tile has chosen, for FlexAttention."""
    n, width = chosen.shape[1:]
    padded = pad(chosen, (0, -width % (TILE // 8), 0, -n % TILE))
    live = padded.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE // 8)).ne(0).any(4).any(2)
    return block_mask_of_tiles(live[:, None], view.visible, n, n_keys)
