"""What hierarchical entmax keeps for backward, and has beside it."""

from model.hierarchical.config import HierarchicalConfig
from model.visible_attention import MASK_ELEMENTS, TILE
from training.memory.dsa import operands, rows_at_once
from training.memory.setup import FLOAT32, Setup

INT64 = 8  # bytes
REFERENCE_TEMPORARIES, KERNEL_TEMPORARIES = 17, 8  # of entmax with its scores


def block_choice_activations(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes of n tokens: q, k, v, the running means of keys, log p of all blocks; weights are computed again."""
    network, n = setup.network, setup.local_tokens
    heads, kv_heads, head_dim = network.n_heads, network.n_kv_heads, network.head_size
    places = setup.tokens // sizes.block + -(-setup.tokens // setup.sequence_length)  # documents at their full length
    size = operands(setup)
    size += places * sizes.block * (FLOAT32 * kv_heads * head_dim + INT64)  # means, and which tokens they are of
    size += n * (FLOAT32 * heads * n_blocks(setup, sizes) + INT64)
    if setup.cuda:  # log-sum-exp, FlexAttention's lists of tiles, by queries and by keys
        size += n * (FLOAT32 * heads + 2 * FLOAT32 * heads * setup.tokens / TILE**2)
    return size


def n_blocks(setup: Setup, sizes: HierarchicalConfig) -> int:
    """C: those of one document of the full length."""
    return -(-setup.sequence_length // sizes.block)


def block_choice_workspace(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes in backward beside gradients of q, k and v, of what a block of rows computes again: where blocks are
    weighed (as many numbers of their size as exist at once: counted on a CPU, read off the code for CUDA), or on a CPU
    where tokens are."""
    network, cuda = setup.network, setup.cuda
    blocks, full = n_blocks(setup, sizes), setup.tokens // sizes.block
    rows = rows_at_once(setup, network.n_heads, min(full + blocks, -(-2 * setup.sequence_length // sizes.block)))
    scores = network.n_heads * rows * blocks
    choice = float((KERNEL_TEMPORARIES if cuda else REFERENCE_TEMPORARIES) * FLOAT32 * scores)
    choice += FLOAT32 * network.n_heads * rows * min(full, (rows + setup.sequence_length) // sizes.block)
    return choice if cuda else max(choice, learned_bias_workspace(setup))


def learned_bias_workspace(setup: Setup) -> float:
    """Bytes in backward of a block of rows that a CPU attends with again, under a bias that has a gradient: keys and
    values of each query head; bias, masked bias, scores, weights, and what is masked."""
    network = setup.network
    rows = min(setup.local_tokens, max(16, MASK_ELEMENTS // (network.n_heads * setup.tokens)))
    weights = network.n_heads * rows * min(setup.tokens, -(-rows // setup.sequence_length) * setup.sequence_length)
    expanded = 2 * setup.local_tokens * network.n_heads * network.head_size * setup.product_bytes
    return float((4 * FLOAT32 + 1) * weights + expanded)
