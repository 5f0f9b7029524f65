"""What Native Sparse Attention keeps for backward, besides a layer's projections."""

from kernels.selected_blocks.launches import PART_ELEMENTS
from kernels.selected_blocks.readers import READERS
from model.nsa.config import BRANCHES, NSAConfig
from model.visible_attention import MASK_ELEMENTS, SCORES_AT_ONCE
from training.memory.setup import FLOAT32, Setup

INT32, INT64 = 4, 8  # bytes


def branch_activations(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of n tokens: q, keys and values of all branches, phi's values, what each branch gives, gates, masks."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    heads, head_dim = network.n_heads, network.head_size
    token = branch_operands(setup, nsa) / n
    outputs = BRANCHES * w * heads * head_dim
    blocks = network.n_kv_heads * -(-setup.sequence_length // nsa.select_block)  # a byte each: which are selected
    if setup.cuda:
        return n * (token + outputs + BRANCHES * FLOAT32 * heads + INT32 * network.n_kv_heads * _selected(setup, nsa))
    if in_blocks_of_rows(setup):
        return n * (token + outputs + blocks)
    # one call a branch: its output before queries that see nothing are zeroed, log-sum-exp, its mask as numbers
    alike = heads if network.positions == "nape" else 1  # masks are alike in all heads, but for ALiBi and selection
    masks = w * setup.tokens * (heads + alike + alike / nsa.compress_stride)
    return n * (token + 2 * outputs + BRANCHES * FLOAT32 * heads + masks)


def branch_operands(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of what is there before a block of keys is selected: q, keys and values of all branches, gates, phi's
    values."""
    network, w = setup.network, setup.product_bytes
    token = w * network.head_size * (network.n_heads + 2 * network.n_cached_heads) + w * BRANCHES * network.n_heads
    return setup.local_tokens * (token + _compression(setup, nsa) / nsa.compress_stride)


def kept_outputs(setup: Setup) -> float:
    """Bytes of the branches' outputs and log-sum-exps, which "selective" keeps."""
    heads = setup.network.n_heads
    return float(setup.local_tokens * BRANCHES * heads * (setup.product_bytes * setup.network.head_size + FLOAT32))


def branch_workspace(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of gradients in the branches' backward beside those of q and of all keys and values: of the branches'
    outputs, of the tokens of compressed blocks; on CUDA the shares that the kernel of selected blocks sums up, of rows
    and of keys; on a CPU the mask of a block of rows, as numbers, and as it is made of them."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    outputs = BRANCHES * w * network.n_heads * network.head_size
    windows = 2 * w * network.n_kv_heads * network.head_size * nsa.compress_length / nsa.compress_stride
    rows = 0 if setup.cuda or not in_blocks_of_rows(setup) else MASK_ELEMENTS
    shares = _selection_shares(setup, nsa) if setup.cuda else 0.0
    return n * (outputs + windows) + shares + 2.0 * FLOAT32 * rows


def selection_workspace(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of selection on CUDA: of the queries that choose together log-sum-exps, a number for each block, and the
    best of them with their indices; of all queries what is chosen, in parts and as a whole."""
    network, count = setup.network, _selected(setup, nsa)
    blocks = network.n_kv_heads * -(-setup.sequence_length // nsa.select_block)
    rows = max(1, min(SCORES_AT_ONCE["cuda"] // blocks, setup.local_tokens))
    size = rows * (FLOAT32 * (network.n_heads + blocks) + (FLOAT32 + INT64) * network.n_kv_heads * count)
    return float(size + 2 * INT64 * setup.local_tokens * network.n_kv_heads * count)


def in_blocks_of_rows(setup: Setup) -> bool:
    """Whether the path with masks takes the queries in several parts, and computes their weights again in backward."""
    return setup.network.n_heads * setup.tokens**2 > MASK_ELEMENTS


def _selected(setup: Setup, nsa: NSAConfig) -> int:
    """Blocks that a query has, or places for them."""
    return min(nsa.select_count, -(-setup.sequence_length // nsa.select_block))


def _selection_shares(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of the shares of dq, one a row and selected block, and of dk and dv, one a part of a block's readers."""
    network, n, count = setup.network, setup.local_tokens, _selected(setup, nsa)
    rows = min(n * network.n_heads * count * network.head_size, PART_ELEMENTS)
    parts = network.n_kv_heads * (n / nsa.select_block + n * count / READERS)
    return FLOAT32 * (rows + 2 * parts * nsa.select_block * network.head_size)


def _compression(setup: Setup, nsa: NSAConfig) -> float:
    """Bytes of one compressed block: its tokens, as phi's operands and as indices, phi's hidden layer before and after
    the nonlinearity, and what comes out."""
    network, w = setup.network, setup.product_bytes
    hidden = network.head_size if nsa.compress_hidden is None else nsa.compress_hidden
    phi = network.n_kv_heads * w * (nsa.compress_length * network.head_size + 2 * hidden + network.head_size)
    return 2 * phi + INT64 * nsa.compress_length
