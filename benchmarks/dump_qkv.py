"""Writes q, k, v, alpha and slopes of attention layers of a trained checkpoint, for benchmarks.kernels --qkv.

    python -m benchmarks.dump_qkv runs/smoke/asentmax --data prepared/stdlib --length 32768 --output qkv.pt

The model reads held-out documents one after another as a single sequence of `--length` tokens, in bfloat16 autocast.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.arguments import PlainParser, a_count, a_path
from common.errors import user_errors
from data.store import TokenStore
from model.attention import AttentionMetadata, AttentionOverride
from model.kv_cache import Extension
from model.layers import HeadAlpha
from model.loading import load_model
from model.override import override_attention
from model.transformer import Transformer


def read_tokens(store: TokenStore, n_tokens: int) -> Tensor:
    """int64 (1, n_tokens): the first documents of a split, joined. Raises ValueError if it holds fewer."""
    parts: list[np.ndarray] = []
    for index in range(store.num_documents):
        parts.append(store.document(index))
        if sum(map(len, parts)) >= n_tokens:
            return torch.from_numpy(np.concatenate(parts)[:n_tokens].astype(np.int64))[None]
    raise ValueError(f"{store.folder} holds {store.num_tokens} tokens, fewer than --length {n_tokens}")


@torch.no_grad()
def capture(network: Transformer, tokens: Tensor, layers: Sequence[int]) -> list[dict[str, Any]]:
    """The inputs of entmax_attention in these layers, on the CPU: q (1, H, T, D), k and v (1, G, T, D), alpha float32
    (H,), alibi_slopes float32 (H,) or None. layers: negative ones count from the last."""
    config = network.config
    if not config.attention.is_entmax:
        raise ValueError(f"the checkpoint's attention is {config.attention.kind!r}, expected an entmax kind")
    if config.window is not None:
        raise ValueError(f"the checkpoint has a window of {config.window} tokens, which the benchmark does not know")
    for layer in layers:
        if not -config.n_layers <= layer < config.n_layers:
            raise ValueError(f"--layer is {layer}, the checkpoint has {config.n_layers} layers")
    wanted = {layer % config.n_layers for layer in layers}
    found: dict[int, dict[str, Any]] = {}

    def observer(layer: int, heads: HeadAlpha | None) -> AttentionOverride:
        def keep(q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, _extension: Extension | None) -> None:
            if layer in wanted and heads is not None:
                alpha = heads(q.device, metadata.alpha_progress)
                kept = dict(q=q, k=k, v=v, alpha=alpha, alibi_slopes=metadata.alibi_slopes)
                found[layer] = {name: None if x is None else x.detach().cpu() for name, x in kept.items()}

        return keep

    observers = [observer(layer, block.attention.alpha) for layer, block in enumerate(network.layers())]
    with override_attention(network, observers), torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        network(tokens)
    return [found[layer % config.n_layers] for layer in layers]


def main() -> None:
    parser = PlainParser(prog="python -m benchmarks.dump_qkv", description=__doc__)
    parser.add_argument("checkpoint", type=a_path, help="a run folder or one of its checkpoints")
    parser.add_argument("--data", type=a_path, required=True, help="a prepared corpus; its held-out split is read")
    parser.add_argument("--length", type=a_count, default=32768, help="tokens")
    parser.add_argument("--layer", default="-1", help="a layer's number, negative from the last, or all")
    parser.add_argument("--output", type=a_path, default=Path("qkv.pt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    loaded = load_model(options.checkpoint, options.device)
    store = TokenStore(options.data / "heldout")
    if store.fingerprint_of_tokenizer != loaded.tokenizer_fingerprint:
        parser.error(f"{options.data} was prepared with another tokenizer than the checkpoint's")
    every = options.layer == "all"
    if not every and not options.layer.lstrip("-").isdecimal():
        parser.error(f"--layer is {options.layer!r}, expected a layer's number or all")
    layers = list(range(loaded.model.config.n_layers)) if every else [int(options.layer)]
    found = capture(loaded.model, read_tokens(store, options.length).to(options.device), layers)
    content: dict[str, Any] = dict(layers=found) if every else {**found[0], "layer": layers[0]}
    content |= dict(step=loaded.step, training_length=loaded.training_length)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, options.output)
    shapes = f"q {tuple(found[0]['q'].shape)}, k {tuple(found[0]['k'].shape)}"
    print(f"{options.output}: {len(found)} layer{'s' * every}, {shapes}, step {loaded.step}")


if __name__ == "__main__":
    with user_errors():
        main()
