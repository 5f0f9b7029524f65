"""Names of weights: ours and those that Llama, its relatives and longsplash.hub have in transformers."""

import re

from model.config import ModelConfig

OUTSIDE = {"embedding.": "model.embed_tokens.", "norm.": "model.norm.", "head.": "lm_head."}
INSIDE = {
    "attention_norm.": "input_layernorm.",
    "feed_forward_norm.": "post_attention_layernorm.",
    "attention.wq.": "self_attn.q_proj.",
    "attention.wk.": "self_attn.k_proj.",
    "attention.wv.": "self_attn.v_proj.",
    "attention.wo.": "self_attn.o_proj.",
    "attention.q_norm.": "self_attn.q_norm.",
    "attention.k_norm.": "self_attn.k_norm.",
    "attention.alpha.": "self_attn.entmax_alpha.",
    "attention.temperature.": "self_attn.temperature.",
    "feed_forward.w_gate.": "mlp.gate_proj.",
    "feed_forward.w_up.": "mlp.up_proj.",
    "feed_forward.w_down.": "mlp.down_proj.",
}
BLOCK, LAYER = "blocks.", "model.layers."


def hub_name(name: str) -> str:
    """Of one of our parameters. Raises KeyError for one that transformers' models do not have."""
    return _renamed(name, BLOCK, LAYER, OUTSIDE, INSIDE)


def our_name(name: str) -> str:
    """Of a parameter in transformers. Raises KeyError for one that ours do not have."""
    outside, inside = ({theirs: ours for ours, theirs in names.items()} for names in (OUTSIDE, INSIDE))
    return _renamed(name, LAYER, BLOCK, outside, inside)


def _renamed(name: str, old: str, new: str, outside: dict[str, str], inside: dict[str, str]) -> str:
    layer = re.match(re.escape(old) + r"(\d+)\.", name)
    start, rest, names = (f"{new}{layer[1]}.", name[layer.end() :], inside) if layer else ("", name, outside)
    for prefix, other in names.items():
        if rest.startswith(prefix):
            return start + other + rest.removeprefix(prefix)
    raise KeyError(name)


def is_alias(name: str, network: ModelConfig) -> bool:
    """Whether a parameter of transformers is the embedding under another name."""
    return network.tie_embeddings and name == "lm_head.weight"
