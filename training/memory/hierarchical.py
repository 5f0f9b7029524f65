"""What hierarchical entmax keeps for backward, and has beside it."""

from kernels.block_bias.tuning import TABLES
from model.hierarchical.config import HierarchicalConfig
from model.visible_attention import MASK_ELEMENTS, SCORES_AT_ONCE
from training.memory.dsa import operands, rows_at_once
from training.memory.setup import FLOAT32, Setup

INT64, INT32 = 8, 4  # bytes
QUERY_TILE = TABLES[64]["queries"].rows  # the usual tile, of queries and of keys
REFERENCE_TEMPORARIES, KERNEL_TEMPORARIES = 17, 8  # of entmax with its scores


def block_choice_activations(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes of n tokens: q, k, v, log p of all blocks, on a CPU the running means of keys; weights are computed
    again."""
    network, n = setup.network, setup.local_tokens
    heads, kv_heads, head_dim = network.n_heads, network.n_kv_heads, network.head_size
    size = operands(setup) + n * FLOAT32 * heads * n_blocks(setup, sizes)
    if setup.cuda:  # log-sum-exp
        return size + n * FLOAT32 * heads
    places = setup.tokens // sizes.block + -(-setup.tokens // setup.sequence_length)  # documents at their full length
    size += places * sizes.block * (FLOAT32 * kv_heads * head_dim + INT64)  # means, and which tokens they are of
    return size + n * INT64


def n_blocks(setup: Setup, sizes: HierarchicalConfig) -> int:
    """C: those of one document of the full length."""
    return -(-setup.sequence_length // sizes.block)


def block_choice_workspace(setup: Setup, sizes: HierarchicalConfig) -> float:
    """Bytes in backward beside gradients of q, k and v, of what a block of rows computes again: where blocks are
    weighed (as many numbers of their size as exist at once: counted on a CPU, read off the code for CUDA), or where
    tokens are."""
    network, blocks = setup.network, n_blocks(setup, sizes)
    if setup.cuda:
        rows = max(1, min(SCORES_AT_ONCE["cuda"] // (network.n_heads * blocks), setup.local_tokens))
        choice = float(KERNEL_TEMPORARIES * FLOAT32 * network.n_heads * rows * blocks)
        # running means and their gradients; each query's share of these
        choice += FLOAT32 * network.head_size * (2 * setup.tokens * network.n_kv_heads + rows * network.n_heads)
        return max(choice, biased_attention_workspace(setup, blocks))
    full = setup.tokens // sizes.block
    rows = rows_at_once(setup, network.n_heads, min(full + blocks, -(-2 * setup.sequence_length // sizes.block)))
    choice = float(REFERENCE_TEMPORARIES * FLOAT32 * network.n_heads * rows * blocks)
    choice += FLOAT32 * network.n_heads * rows * min(full, (rows + setup.sequence_length) // sizes.block)
    return max(choice, learned_bias_workspace(setup))


def biased_attention_workspace(setup: Setup, blocks: int) -> float:
    """Bytes of the kernels' backward: the gradient of log p, and for each tile of queries which blocks it reads, a byte
    and a number each, and for each tile of keys which tiles of queries read it; delta."""
    heads, tiles = setup.network.n_heads, -(-setup.local_tokens // QUERY_TILE)
    lists = (1 + INT32) * tiles * blocks + INT32 * tiles * -(-setup.tokens // QUERY_TILE)
    return float(heads * (FLOAT32 * setup.local_tokens * (blocks + 1) + lists))


def learned_bias_workspace(setup: Setup) -> float:
    """Bytes in backward of a block of rows that a CPU attends with again, under a bias that has a gradient: keys and
    values of each query head; bias, masked bias, scores, weights, and what is masked."""
    network = setup.network
    rows = min(setup.local_tokens, max(16, MASK_ELEMENTS // (network.n_heads * setup.tokens)))
    weights = network.n_heads * rows * min(setup.tokens, -(-rows // setup.sequence_length) * setup.sequence_length)
    expanded = 2 * setup.local_tokens * network.n_heads * network.head_size * setup.product_bytes
    return float((4 * FLOAT32 + 1) * weights + expanded)
