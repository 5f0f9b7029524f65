"""What Dynamic Memory Sparsification keeps for backward, and has beside it."""

from model.visible_attention import MASK_ELEMENTS
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


def eviction_workspace(setup: Setup) -> float:
    """Bytes in backward beside gradients of q, k and v, of what a block of rows on a CPU computes again: keys and
    values of each query head, bias, masked bias, scores, weights, and what is masked."""
    if setup.cuda:
        return 0.0
    network = setup.network
    weights = min(network.n_heads * setup.local_tokens * setup.tokens, MASK_ELEMENTS)
    expanded = 2 * setup.local_tokens * network.n_heads * network.head_size * setup.product_bytes
    return float((4 * FLOAT32 + 1) * weights + expanded)
