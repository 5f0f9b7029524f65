"""What hierarchical entmax keeps for backward, and has beside it."""

from model.hierarchical.config import HierarchicalConfig
from model.visible_attention import MASK_ELEMENTS, SCORES_AT_ONCE, TILE
from training.memory.dsa import operands
from training.memory.setup import FLOAT32, Setup

INT64 = 8  # bytes
REFERENCE_TEMPORARIES, KERNEL_TEMPORARIES = 17, 8  # of entmax with its scores


def block_choice_activations(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes of n tokens: q, k, v, the running means of keys, log p of all blocks; weights are computed again."""
    network, n = setup.network, setup.local_tokens
    heads, kv_heads, head_dim = network.n_heads, network.n_kv_heads, network.head_size
    blocks = n_blocks(setup, sizes)
    size = operands(setup)
    size += blocks * sizes.block * (FLOAT32 * kv_heads * head_dim + INT64)  # means, and which tokens they are of
    size += n * (FLOAT32 * heads * blocks + INT64)
    if setup.cuda:  # log-sum-exp, FlexAttention's lists of tiles, by queries and by keys
        size += n * (FLOAT32 * heads + 2 * FLOAT32 * heads * setup.tokens / TILE**2)
    return size


def n_blocks(setup: Setup, sizes: HierarchicalConfig) -> int:
    """C, with as many documents as fit at their full length."""
    return setup.tokens // sizes.block + -(-setup.tokens // setup.sequence_length)


def block_choice_workspace(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes in backward beside gradients of q, k and v, of what a block of rows computes again: where blocks are
    weighed (as many numbers of their size as exist at once: counted on a CPU, read off the code for CUDA), or on a CPU
    keys and values of each query head, and where tokens are: bias, masked bias, scores, weights, and what is masked."""
    network, cuda = setup.network, setup.cuda
    at_once = SCORES_AT_ONCE["cuda" if cuda else "cpu"]
    scores = min(network.n_heads * setup.local_tokens * n_blocks(setup, sizes), at_once)
    choice = float((KERNEL_TEMPORARIES if cuda else REFERENCE_TEMPORARIES) * FLOAT32 * scores)
    if cuda:
        return choice
    weights = min(network.n_heads * setup.local_tokens * setup.tokens, MASK_ELEMENTS)
    expanded = 2 * setup.local_tokens * network.n_heads * network.head_size * setup.product_bytes
    return max(choice, float((4 * FLOAT32 + 1) * weights + expanded))
