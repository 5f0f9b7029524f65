"""Entmax attention with the arguments of transformers' attention interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import entmax_attention
from longsplash.attention_mask import EntmaxMask, Visibility

# arguments of other attention functions that change what is computed -> how to do without
REFUSED = {
    "softcap": "capped scores (softcap): set attn_logit_softcapping=None in the config, or",
    "s_aux": "attention sinks (s_aux):",
    "sinks": "attention sinks (sinks):",
    "position_bias": "position biases (position_bias):",
    "cache": "paged caches (continuous batching): take generate, or",
    "block_indices": "chosen blocks of keys (block_indices):",
    "indices": "chosen keys (indices):",
}


def attention_function(alpha: float, backend: str) -> Callable[..., tuple[Tensor, None]]:
    """For AttentionInterface. alpha: of modules that add_alpha gave none."""

    def entmax_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, Tq, D), key and value (B, G, Tk, D) -> (B, Tq, H, D), and no weights."""
        _refuse(dropout, kwargs)
        visibility = _visibility(module, key, attention_mask, is_causal, kwargs)
        visibility = _with_documents(visibility, query, kwargs)
        head_alpha = getattr(module, "entmax_alpha", None)
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        dtype, width = value.dtype, value.shape[3]  # of the projection; normalised queries may be float32
        query, key = query.to(dtype), key.to(dtype)
        if width != query.shape[3]:  # latent attention
            value = nn.functional.pad(value, (0, query.shape[3] - width))
        out = _attend(
            query,
            key,
            value,
            visibility,
            alpha=alpha if head_alpha is None else head_alpha(),
            scale=scaling,
            alibi_slopes=kwargs.get("alibi_slopes"),  # of longsplash.hub
            backend=backend,
        )
        return out[..., :width].transpose(1, 2).contiguous(), None

    return entmax_attention_forward


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"entmax attention has no dropout, got {dropout}: set attention_dropout=0 in the config")
    if kwargs.get("output_attentions"):
        raise ValueError("entmax attention returns no weights, got output_attentions=True: leave it out")
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"entmax attention has no {what} take attn_implementation='eager' for this model")


def _visibility(
    module: nn.Module, key: Tensor, mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]
) -> Visibility:
    """Of the mask, or where a model makes none of the arguments."""
    n_keys = key.shape[2]
    if mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = kwargs.get("sliding_window")
        if window is not None and not causal:
            raise ValueError(f"entmax attention has no bidirectional windows, got sliding_window={window}")
        return Visibility(causal, n_keys, window, unpadded=True)
    visibility = mask.visibility if isinstance(mask, EntmaxMask) else None
    if visibility is None:
        raise ValueError(
            "entmax attention takes the 2-d attention_mask (batch, tokens) that the model got, from which transformers "
            f"makes its own, got a {mask.dim()}-d {mask.dtype} mask {tuple(mask.shape)} in {type(module).__name__}"
        )
    if visibility.n_keys != n_keys:
        raise ValueError(f"the mask must have as many keys as attention, got {visibility.n_keys} and {n_keys} keys")
    return visibility


def _with_documents(visibility: Visibility, query: Tensor, kwargs: dict[str, Any]) -> Visibility:
    """With the documents that the call gives by cu_seq_lens_q. Refuses those that only position_ids show, where
    transformers looks for none: with a cache it takes them as one."""
    batch, _, n_queries, _ = query.shape
    cu_seqlens, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    whole = n_queries == visibility.n_keys and visibility.unpadded and visibility.causal
    if cu_seqlens is not None:
        if batch != 1 or not whole:
            raise ValueError(
                f"cu_seq_lens_q needs one row, no attention_mask and no tokens in the cache, got {batch} rows of "
                f"{n_queries} queries and {visibility.n_keys} keys"
            )
        return Visibility(True, visibility.n_keys, visibility.window, cu_seqlens=cu_seqlens.int())
    if not whole or visibility.cu_seqlens is not None or n_queries < 2 or torch.compiler.is_compiling():
        return visibility
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != n_queries:
        return visibility
    if bool((positions.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids that begin anew mean packed documents, which transformers keeps apart without a cache only: "
            "pass use_cache=False and no attention_mask, or cu_seq_lens_q"
        )
    return visibility


def _attend(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, **options: Any) -> Tensor:
    """(B, H, Tq, D)."""
    if visibility.cu_seqlens is not None:
        batch, heads, n_queries, head_dim = query.shape
        query, key, value = (x.transpose(0, 1).reshape(1, x.shape[1], -1, head_dim) for x in (query, key, value))
        out = _entmax(query, key, value, window=visibility.window, cu_seqlens=visibility.cu_seqlens, **options)
        return out.reshape(heads, batch, n_queries, head_dim).transpose(0, 1)
    key, value = _placed(key, visibility.keys_from), _placed(value, visibility.keys_from)
    query = _placed(query, visibility.queries_from)
    lens = visibility.kv_lens
    out = _entmax(query, key, value, causal=visibility.causal, window=visibility.window, kv_lens=lens, **options)
    return _placed(out, visibility.outputs_from)


def _entmax(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    out = entmax_attention(query, key, value, **options)
    assert isinstance(out, Tensor)  # without statistics
    return out


def _placed(x: Tensor, source: Tensor | None) -> Tensor:
    """x (B, H, T, D) with the token that `source` (B, T) names at each place."""
    return x if source is None else x.gather(2, source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
