"""The lightning indexer by Triton kernels: public functions and their checks. Their definition in PyTorch, which is the
CPU path, is model/dsa."""

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import check_tensors, checked_scale
from kernels.block_sparse.attention import unsupported as unsupported_attention
from kernels.common.arguments import check_integer, check_positions, check_seen, check_tensor, readable
from kernels.common.derivatives import refuse_transforms
from kernels.lightning_indexer.chosen_launches import attention_operator
from kernels.lightning_indexer.operator import loss_operator, select_operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32_MAX = 2**31 - 1
INDEX_DIM_MAX = 128  # of one head, in one tile


def unsupported_loss(q: Tensor, index_q: Tensor) -> str | None:
    """What the kernels of the loss cannot do for attention's and the indexer's queries; None where they can."""
    return unsupported(index_q) or unsupported_attention(q)


def unsupported(index_q: Tensor) -> str | None:
    """What the kernels cannot do for the indexer's queries; None where they can."""
    if index_q.dtype not in DTYPES or index_q.shape[3] > INDEX_DIM_MAX:
        return (
            f"takes an indexer of float32, bfloat16 or float16 and up to {INDEX_DIM_MAX} channels a head, got "
            f"{index_q.dtype} and {index_q.shape[3]}"
        )
    return None


def indexer_loss(
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    *,
    chosen: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What the indexer of DeepSeek Sparse Attention learns from (DeepSeek-V3.2-Exp, equations 3 and 4):

        sum_t KL(p_t || softmax(I_t)),    I[t, s] = sum_j weights[j, t] ReLU(index_q[j, t] . index_k[s])

    over the keys that query t sees, p_t being attention's softmax weights of these keys, averaged over the heads. In
    nats, float32 (), differentiable once, and with respect to the first three arguments alone: the gradient is computed
    with the loss. Neither has scores in memory, but log-sum-exps, 4 bytes a query and head. The same inputs give the
    same bits.

    Args:
        index_q: (B, J, n, E), index_k: (B, keys, E), one for all J heads, weights: (B, J, n); float32, bfloat16 or
            float16, not necessarily one of them, E up to 128. bfloat16 and float16 are multiplied exactly and summed in
            float32, float32 by dot_precision, so that scores are as good as float32's.
        q: (B, H, n, D), k: (B, G, keys, D), attention's, as in `entmax_attention`.
        first_key, own_key: int32 or int64 (B or 1, n), of equal shapes, the keys from and up to which each query sees.
            Neither falls from one query to the next, since the pass over keys looks for queries by bisection.
        chosen: uint8 (B, n, at least keys / 8), which keys are seen of those: key j where bit j % 8 of byte j // 8 is
            set. None: all.
        alibi_slopes: (H,) non-negative; adds -slope * (own_key - key) to attention's scaled scores.
        scale: positive, multiplies q k; None is D ** -0.5.

    Raises: TypeError or ValueError naming the argument, its value and what was expected; values of tensors are read on
    the CPU only.
    """
    _check_index(index_q, index_k, weights)
    _check_attention(q, k, index_q, index_k)
    _check_rows(first_key, own_key, index_q, index_k.shape[1])
    if chosen is not None:
        _check_bits(chosen, q.shape[0], q.shape[2], k.shape[2], q.device)
    scale = checked_scale(q, scale, alibi_slopes)
    if (lacking := unsupported_loss(q, index_q)) is not None:
        raise ValueError(f"indexer_loss {lacking}; use model.dsa.loss with backend='torch'")
    refuse_transforms("indexer_loss", "use model.dsa.loss with backend='torch'", index_q, index_k, weights)
    with torch.autocast(q.device.type, enabled=False):
        loss, *_ = loss_operator(
            index_q, index_k, weights, q.detach(), k.detach(), first_key, own_key, chosen, alibi_slopes, scale
        )
    return loss


def chosen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    chosen: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys that it has chosen (DeepSeek-V3.2-Exp, equation 2), which all heads
    share. Forward and backward, once; the same inputs give the same bits.

    Args:
        q, k, v: as in `entmax_attention`, not float64.
        first_key, own_key, chosen, alibi_slopes, scale: as in `indexer_loss`.

    Returns: (B, H, n, D) in q's dtype. A row that sees no key is 0, and so are its gradients. A row is NaN that sees a
        key or value which is not finite, or whose scores overflow to infinity or all to -infinity, as in torch's
        softmax; keys and values that it does not see change nothing, in gradients neither.

    Raises: as `indexer_loss`.
    """
    check_tensors(q, k, v)
    _check_rows(first_key, own_key, q, k.shape[2])
    _check_bits(chosen, q.shape[0], q.shape[2], k.shape[2], q.device)
    scale = checked_scale(q, scale, alibi_slopes)
    if (lacking := unsupported_attention(q)) is not None:
        raise ValueError(f"chosen_attention {lacking}; use model.visible_attention.attend_masked")
    refuse_transforms("chosen_attention", "use model.visible_attention.attend_masked", q, k, v)
    out, _ = attention_operator(q, k, v, first_key, own_key, chosen, alibi_slopes, scale)
    return out


@torch.no_grad()
def select_keys(
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    first_key: Tensor,
    own_key: Tensor,
    *,
    count: int,
    reach: int | None = None,
    score_bits: int = 12,
) -> Tensor:
    """The `count` keys of the highest I (as in `indexer_loss`) of those that each query sees, of equal ones the later;
    all that it sees where these are fewer (DeepSeek-V3.2-Exp, equation 2). NaN is highest, as in torch.topk. Without
    gradient, since choosing has none. Scores of some queries are in memory at once, at most 256 MiB.

    Args:
        index_q, index_k, weights, first_key, own_key: as in `indexer_loss`.
        reach: keys from first_key to own_key at most, where query i is key i; None where these differ. It bounds how
            much memory a query's scores take; what a query sees beyond it is not promised to be found.
        score_bits: to which scores, float32, are rounded before they are compared, 8 to 23, ties to even.

    Returns: uint8 (B, n, keys / 8, rounded up): key j is bit j % 8 of byte j // 8.

    Raises: as `indexer_loss`.
    """
    _check_index(index_q, index_k, weights)
    _check_rows(first_key, own_key, index_q, index_k.shape[1])
    for name, value, least, most in (("count", count, 1, INT32_MAX), ("score_bits", score_bits, 8, 23)):
        check_integer(name, value)
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in {least} ... {most}, got {value}")
    if reach is not None:
        check_integer("reach", reach)
        if reach < 0:
            raise ValueError(f"reach must be None or at least 0, got {reach}")
    if (lacking := unsupported(index_q)) is not None:
        raise ValueError(f"select_keys {lacking}; use model.dsa.indexer with backend='torch'")
    with torch.autocast(index_q.device.type, enabled=False):
        found: Tensor = select_operator(index_q, index_k, weights, first_key, own_key, count, reach, score_bits)
    return found


def _check_index(index_q: Tensor, index_k: Tensor, weights: Tensor) -> None:
    check_tensor("index_q", index_q)
    if index_q.dim() != 4 or 0 in (index_q.shape[1], index_q.shape[3]):
        raise ValueError(f"index_q must be (batch, heads, queries, channels), got {tuple(index_q.shape)}")
    batch, heads, n_queries, dim = index_q.shape
    for name, x, shape in (("index_k", index_k, (batch, "keys", dim)), ("weights", weights, (batch, heads, n_queries))):
        check_tensor(name, x)
        if x.dim() != 3 or any(a != b for a, b in zip(x.shape, shape, strict=True) if b != "keys"):
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be ({expected}) beside index_q, got {tuple(x.shape)}")
        if x.device != index_q.device or not x.is_floating_point():
            raise ValueError(f"{name} must be floating point on {index_q.device}, got {x.dtype} on {x.device}")


def _check_attention(q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor) -> None:
    batch, _, n_queries, _ = index_q.shape
    for name, x, tokens in (("q", q, n_queries), ("k", k, index_k.shape[1])):
        check_tensor(name, x)
        if x.dim() != 4 or (x.shape[0], x.shape[2]) != (batch, tokens) or x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} must be ({batch}, heads, {tokens}, D) beside the index, got {tuple(x.shape)}")
        if x.device != index_q.device or x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} on {index_q.device}, got {x.dtype} on {x.device}")
    if 0 in (q.shape[1], q.shape[3], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")


def _check_rows(first_key: Tensor, own_key: Tensor, index_q: Tensor, n_keys: int) -> None:
    batch, _, n_queries, _ = index_q.shape
    for name, x in (("first_key", first_key), ("own_key", own_key)):
        check_positions(name, x, batch, n_queries, index_q.device)
        if x.shape != first_key.shape:
            raise ValueError(f"{name} must be {tuple(first_key.shape)}, as first_key, got {tuple(x.shape)}")
        if readable(x) and bool((x.diff() < 0).any()):
            at = int((x.diff() < 0).flatten().nonzero()[0]) % (n_queries - 1)
            raise ValueError(
                f"{name} must not fall from one query to the next, got {int(x[:, at].max())} and "
                f"{int(x[:, at + 1].min())} at queries {at} and {at + 1}; sort the queries"
            )
    check_seen(first_key, own_key, n_keys)


def _check_bits(chosen: Tensor, batch: int, n_queries: int, n_keys: int, device: torch.device) -> None:
    check_tensor("chosen", chosen)
    if chosen.dtype != torch.uint8 or chosen.device != device:
        raise ValueError(f"chosen must be torch.uint8 on {device}, got {chosen.dtype} on {chosen.device}")
    if chosen.dim() != 3 or chosen.shape[:2] != (batch, n_queries) or chosen.shape[2] * 8 < n_keys:
        raise ValueError(
            f"chosen must be ({batch}, {n_queries}, at least {-(-n_keys // 8)}), a bit for each of {n_keys} keys, got "
            f"{tuple(chosen.shape)}"
        )
