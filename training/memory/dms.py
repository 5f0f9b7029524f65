"""What Dynamic Memory Sparsification keeps for backward."""

from training.memory.dsa import operands
from training.memory.setup import FLOAT32, Setup


def eviction_activations(setup: Setup) -> float:
    """Bytes of n tokens: q, k, v; the layer's input, which logits are made of in float32 and products are not; of each
    KV head y, its sigmoid and its logarithm, which query heads have too; weights are computed again."""
    network, n = setup.network, setup.local_tokens
    size = operands(setup) + n * FLOAT32 * (3 * network.n_kv_heads + network.n_heads)
    if setup.product_bytes < FLOAT32:
        size += n * FLOAT32 * network.d_model
    if setup.cuda:  # log-sum-exp; FlexAttention's lists of tiles are the same in all layers
        size += n * FLOAT32 * network.n_heads
    return size
