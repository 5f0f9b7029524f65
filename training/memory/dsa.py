"""What DeepSeek Sparse Attention keeps for backward, besides a layer's projections."""

from kernels.lightning_indexer.indexer import INDEX_DIM_MAX
from kernels.lightning_indexer.launches import SCORES_AT_ONCE as CHOOSING_SCORES
from kernels.lightning_indexer.tuning import TABLES
from model.block_masks import TILE
from model.dsa.config import DSAConfig
from model.visible_attention import MASK_ELEMENTS, SCORES_AT_ONCE
from training.memory.nsa import in_blocks_of_rows
from training.memory.setup import FLOAT32, Setup

INDEX_ROWS = TABLES[64]["scores"].rows  # the usual tile


def chosen_activations(setup: Setup, dsa: DSAConfig) -> float:
    """Bytes of n tokens: q, k, v, what attention gives, the bits of what is chosen, the indexer's key before its norm,
    and the gradients that its loss has computed."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    heads, head_dim = network.n_heads, network.head_size
    token = operands(setup) / n
    token += w * dsa.index_dim + 2 * FLOAT32  # mean and deviation
    token += FLOAT32 * (dsa.index_heads * dsa.index_dim + dsa.index_dim + dsa.index_heads)
    bits = setup.tokens / 8 if dsa.is_sparse else 0
    if setup.cuda:
        # FlexAttention's lists of them; its output is wo's operand, as our kernel's is
        tiles = 0.0 if dsa.is_sparse else 2 * FLOAT32 * setup.tokens / TILE**2
        return n * (token + FLOAT32 * heads + bits + tiles)
    if in_blocks_of_rows(setup):
        return n * (token + bits)
    alike = heads if network.positions == "nape" else 1  # masks are alike in all heads, but for ALiBi
    return n * (token + w * heads * head_dim + FLOAT32 * heads + w * setup.tokens * alike)


def operands(setup: Setup) -> float:
    """Bytes of q, k and v."""
    network = setup.network
    heads = network.n_heads + 2 * network.n_kv_heads
    return float(setup.local_tokens * setup.product_bytes * network.head_size * heads)


def kept_output(setup: Setup) -> float:
    """Bytes of attention's output and log-sum-exp, which "selective" keeps."""
    heads = setup.network.n_heads
    return float(setup.local_tokens * heads * (setup.product_bytes * setup.network.head_size + FLOAT32))


def index_tables(setup: Setup, dsa: DSAConfig) -> float:
    """Bytes of the indexer's rotary tables, which layers share."""
    return FLOAT32 * setup.local_tokens * dsa.index_dim / 2 if setup.network.positions == "rope" else 0.0


def chosen_workspace(setup: Setup) -> float:
    """Bytes in attention's backward beside the gradients of q, k and v: where the CPU's path takes queries in several
    parts, the mask of one, as numbers, and as it is made of them; on CUDA the kernel's copies of k and v."""
    network = setup.network
    if setup.cuda:
        copies = 2.0 * setup.local_tokens * setup.product_bytes * network.head_size * network.n_kv_heads
        return copies if network.attention.dsa is not None and network.attention.dsa.is_sparse else 0.0
    return 2.0 * FLOAT32 * MASK_ELEMENTS if in_blocks_of_rows(setup) else 0.0


def rows_at_once(setup: Setup, scores: int, width: int) -> int:
    """Of visible_attention.blocks_of_rows. width: keys, or blocks of them, that it expects of such a block."""
    at_once = SCORES_AT_ONCE["cuda" if setup.cuda else "cpu"]
    return max(1, min(at_once // (scores * width), setup.sequence_length, setup.local_tokens))


def index_workspace(setup: Setup, dsa: DSAConfig) -> float:
    """Bytes of the indexer's kernels: scores of the queries that choose together, or the loss's log-sum-exps. Without
    kernels one block of rows of the loss: either attention's scores and their softmax, or what leads from scores of the
    indexer to gradients of its products; the mask, and what ALiBi adds."""
    heads, index_heads = setup.network.n_heads, dsa.index_heads
    if setup.cuda and dsa.index_dim <= INDEX_DIM_MAX:
        width = min(setup.tokens, setup.sequence_length + INDEX_ROWS)
        rows = min(max(1, CHOOSING_SCORES // (width * INDEX_ROWS)) * INDEX_ROWS, setup.tokens)
        return FLOAT32 * max(rows * width * dsa.is_sparse, setup.local_tokens * (heads + 2))
    rows = rows_at_once(setup, max(heads, index_heads), min(setup.tokens, 2 * setup.sequence_length))
    # a CPU takes the keys of the rows' documents, here of their full length
    pairs = rows * min(setup.tokens, setup.sequence_length + (rows if setup.cuda else 0))
    alibi = heads if setup.network.positions == "nape" else 0
    return FLOAT32 * pairs * (max(2 * heads, 4 + 2.25 * index_heads) + 0.25 + alibi)
