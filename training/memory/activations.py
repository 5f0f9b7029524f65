"""What the forward pass keeps for backward."""

from model.attention import kept_bits
from training.memory.dms import eviction_activations
from training.memory.dsa import chosen_activations, index_tables, kept_output
from training.memory.hierarchical import block_choice_activations
from training.memory.nsa import branch_activations, kept_outputs
from training.memory.setup import FLOAT8, FLOAT32, Setup
from training.memory.states import block_matrices


def block_activations(setup: Setup) -> dict[str, float]:
    """Bytes that one block keeps for backward, by part, for n tokens. A compiled block that is recomputed counts as an
    eager one: one graph computes it again with its gradient (`workspace.compiled_backward`)."""
    if setup.compiled and setup.activation_checkpointing == "none":
        return _compiled_block(setup)
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    norm = norm_activations(setup, network.d_model)
    attention_weights, feed_forward_weights = block_matrices(network, setup.float8)
    feed_forward = setup.residual_bytes * network.d_model if setup.tiled else feed_forward_activations(setup)
    # wq, wk, wv; what the kind reads besides: beta and gamma; gates; the indexer's three; dms's elsewhere
    attention = network.attention
    readers = 3 + 2 * attention.has_adaptive_temperature + {"nsa": 1, "dsa": 3}.get(attention.kind, 0)
    parts = {
        "norms": 2 * n * norm,
        "attention's input": n * _product_input(setup, readers),
        "queries, temperatures": n * _scaling(setup),
        "attention": _attention(setup),
        "attention's output": n * w * network.n_heads * network.head_size,  # wo's operand
        "feed-forward": n * feed_forward,
        "cast weights": setup.casts * w * (attention_weights + (0 if setup.tiled else feed_forward_weights)),
    }
    return {name: float(size) for name, size in parts.items()}


def _compiled_block(setup: Setup) -> dict[str, float]:
    """As block_activations, where torch.compile divides forward from backward: that computes norms' outputs, the second
    norm's input and what leads to queries again, so operands have one copy for all readers."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, heads, head_dim = network.d_model, network.n_heads, network.head_size
    attention_weights, feed_forward_weights = block_matrices(network, setup.float8)
    queries = 0
    if network.attention.scales_queries:  # rotated queries are float32, others what wq gives
        queries += heads * (head_dim * (FLOAT32 if network.positions == "rope" else w) + FLOAT32)
    if network.attention.has_adaptive_temperature:
        queries += 2 * w * (heads - network.n_alibi_heads)  # beta(x), gamma(x)
    if network.qk_norm:
        queries += (heads + network.n_kv_heads) * (w * head_dim + FLOAT32)
    out = w * heads * head_dim
    parts = {
        "norms": n * (setup.residual_bytes * width + w * width + 2 * FLOAT32),  # the block's input, wo's output
        # the indexer, which is not compiled, casts it three times
        "attention's input": n * w * width * (1 + 3 * setup.casts * (network.attention.dsa is not None)),
        "queries, temperatures": n * queries,
        "attention": _attention(setup) + (n * out if network.attention.is_softmax else 0),  # in FlashAttention's layout
        "attention's output": n * out,
        # the norm's output, gate, up and their product; tiles compute the norm again
        "feed-forward": 0 if setup.tiled else n * w * (width + 3 * network.feed_forward_size),
        "cast weights": setup.casts * w * (attention_weights + (0 if setup.tiled else feed_forward_weights)),
    }
    if setup.operands_in_float8:
        parts |= _operands_in_float8(setup)
    if setup.float8 != "none" and setup.tiled:
        parts["cast weights"] += FLOAT8 * (block_matrices(network)[1] - feed_forward_weights)  # what tiles share
    return {name: float(size) for name, size in parts.items()}


def _operands_in_float8(setup: Setup) -> dict[str, float]:
    """Parts of a compiled block in which the operands of weights' gradients are FP8: what is rounded to it is kept so,
    or computed again, where nothing else reads it."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, out = network.d_model, network.n_heads * network.head_size
    temperatures_read = network.attention.has_adaptive_temperature
    # in its backward, the output that wo rounds; where ranks exchange it, `_attention` has it
    kernel_reads = network.attention.is_entmax and uses_triton(setup) and setup.sequence_parallel == 1
    return {
        "attention's input": n * w * width * temperatures_read,
        "attention's output": n * out * (FLOAT8 + w * kernel_reads),
        "feed-forward": n
        * (FLOAT8 * width + (0 if setup.tiled else 2 * w * network.feed_forward_size)),  # without the product
    }


def norm_activations(setup: Setup, width: int, *, mixed: bool = False) -> int:
    """RMSNorm a token: its input, 1 / rms in float32. Where it is a composite of simpler operations, on CPUs and for
    operands of mixed dtypes, it computes in float32 and keeps x / rms too."""
    fused = setup.cuda and not mixed
    return (setup.residual_bytes if fused else 2 * FLOAT32) * width + FLOAT32


def _product_input(setup: Setup, readers: int) -> int:
    """The operand of `readers` matrix products a token: shared, or under autocast a copy for each (w C)."""
    return setup.network.d_model * (readers * setup.product_bytes if setup.casts else setup.residual_bytes)


def feed_forward_activations(setup: Setup) -> int:
    """A token's copies of the norm's output, gate, up, silu(gate) and their product; tiles share the norm's output."""
    return _product_input(setup, 2) + 4 * setup.product_bytes * setup.network.feed_forward_size


def _scaling(setup: Setup) -> int:
    """A token's unscaled queries in float32, temperatures (asentmax: five values on the way), and qk_norm's inputs."""
    network = setup.network
    heads, kv_heads, head_dim = network.n_heads, network.n_cached_heads, network.head_size
    size = 0
    if network.attention.scales_queries:
        size += FLOAT32 * heads * (head_dim + 1)
    if network.attention.has_adaptive_temperature:
        size += 5 * FLOAT32 * (heads - network.n_alibi_heads)
    if network.qk_norm:
        size += (heads + kv_heads) * norm_activations(setup, head_dim, mixed=setup.casts)
    return size


def _attention(setup: Setup) -> float:
    """What the attention operation keeps: q, k, v, and its own results."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    heads, head_dim = network.n_heads, network.head_size
    if network.attention.nsa is not None:
        return branch_activations(setup, network.attention.nsa)
    if network.attention.dsa is not None:
        return chosen_activations(setup, network.attention.dsa)
    if network.attention.dms is not None:
        return eviction_activations(setup)
    if network.attention.hierarchical is not None:
        return block_choice_activations(setup, network.attention.hierarchical)
    kv_heads = max(network.n_kv_heads, setup.sequence_parallel)  # KV heads that several ranks need are repeated
    size = float(n * w * head_dim * (heads + 2 * kv_heads))
    if setup.cuda and setup.sequence_parallel > 1:
        size += n * w * heads * head_dim  # the kernel's output, before ranks exchange it into wo's operand
    if network.attention.is_entmax:
        if uses_triton(setup):
            return size + n * FLOAT32 * heads + _where_weight_is(setup)  # the threshold; the output is wo's operand
        return size + 3 * n * FLOAT32 * heads  # maximum, threshold, normaliser
    size += n * FLOAT32 * heads  # log-sum-exp
    if setup.cuda:
        return size  # FlashAttention's output, and FlexAttention's, is wo's operand
    size += n * w * heads * head_dim  # the output, in another layout than wo's operand
    if network.positions == "nape" or network.window:
        size += n * w * heads * setup.sequence_length  # with a bias, the CPU keeps the weights of whole documents
    return size


def _where_weight_is(setup: Setup) -> float:
    """Bits of tiles and of single keys; each row's first and last key."""
    n, tokens = setup.local_tokens, setup.tokens
    return setup.network.n_heads * n * kept_bits(tokens, tokens // setup.sequence_length) / tokens / 8 + 8 * tokens


def kept_of_attention(setup: Setup) -> float:
    """Bytes of attention that a block keeps where the rest of it is recomputed. Of entmax by Triton, a token and head:
    its threshold before the last step, and that step's slope and length (12 bytes), and where weight is; with
    "selective" the output (w D) and its threshold or log-sum-exp (4; the PyTorch entmax's three numbers 12) too."""
    network, n, mode = setup.network, setup.local_tokens, setup.activation_checkpointing
    heads, selective = network.n_heads, mode == "selective"
    size = 0.0
    if network.attention.is_entmax and uses_triton(setup):
        # a compiled block keeps what its backward reads: the output makes the start of the last step needless
        size = _where_weight_is(setup) + (0 if selective and setup.compiled else 3 * n * FLOAT32 * heads)
    if network.attention.nsa is not None:
        return kept_outputs(setup) if selective else 0.0
    if network.attention.dsa is not None:
        return kept_output(setup) if selective else 0.0
    if network.attention.hierarchical is not None or network.attention.dms is not None:
        # no single operation on CPUs, where the bias learns
        return kept_output(setup) if selective and setup.cuda else 0.0
    biased = not network.attention.is_entmax and (network.positions == "nape" or network.window is not None)
    if not selective or (biased and not setup.cuda):  # that is no single operation on CPUs
        return size
    numbers = 3 if network.attention.is_entmax and not uses_triton(setup) else 1
    return size + attention_output(setup) + numbers * n * FLOAT32 * heads


def attention_output(setup: Setup) -> float:
    return float(setup.local_tokens * setup.product_bytes * setup.network.n_heads * setup.network.head_size)


def uses_triton(setup: Setup) -> bool:
    return setup.cuda and setup.network.attention.backend in ("auto", "triton")


def outside_blocks(setup: Setup) -> float:
    """The last norm, token ids, labels, and what layers share: rotary tables or positions' logarithms."""
    network, n = setup.network, setup.local_tokens
    shared = FLOAT32 + (FLOAT32 * network.head_size if network.positions == "rope" else 0)
    tables = 0.0 if network.attention.dsa is None else index_tables(setup, network.attention.dsa)
    return n * (norm_activations(setup, network.d_model) + 2 * 8 + shared) + tables
