"""What a phase of the step has beside states and what forward keeps."""

from kernels.alpha_entmax.blockwise import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS
from training.memory.activations import feed_forward_activations, norm_activations, uses_triton
from training.memory.dsa import chosen_workspace
from training.memory.hierarchical import block_choice_workspace, learned_bias_workspace
from training.memory.nsa import branch_workspace
from training.memory.setup import FLOAT8, FLOAT32, Setup
from training.memory.states import block_matrices
from training.memory.teacher import teacher_head, teacher_hidden

# scores and temporaries of the PyTorch entmax; CUDA, CPU
BLOCKWISE_BYTES = {True: 6 * FLOAT32 * DEVICE_BLOCK_ELEMENTS, False: 6 * FLOAT32 * BLOCK_ELEMENTS["cpu"]}


def loss_workspace(setup: Setup) -> float:
    """Bytes of step/loss.py or Liger's fused loss: hidden states and their gradient, the head's weights in w bytes and
    their gradient in float32, logits of one chunk. With a teacher its hidden states and head too."""
    n, width, vocab, w = setup.local_tokens, setup.network.d_model, setup.network.vocab_size, setup.product_bytes
    hidden = n * width * (setup.residual_bytes + w)
    head = vocab * width * (FLOAT32 + (w if setup.casts else 0))
    if setup.loss_backend == "liger":
        copy = n * width * w if setup.casts else 0
        chunk = min(n, _next_power_of_2(-(-n // -(-vocab // width))))
        return hidden + copy + head + chunk * vocab * w
    chunk = min(n, setup.loss_chunk_tokens)
    if setup.teacher is not None:
        # logits, log-probabilities of both at the temperature, and the teacher's probabilities, in float32
        head += teacher_head(setup, setup.teacher)
        return hidden + teacher_hidden(setup, setup.teacher) + head + chunk * vocab * 4 * FLOAT32
    # logits and their log-softmax in float32, then the residual in w bytes beside one of them
    return hidden + head + chunk * vocab * (2 * FLOAT32 if w == FLOAT32 else 2 * FLOAT32 + w)


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def backward_workspace(setup: Setup) -> float:
    """What a block's backward has beside its activations: the residual stream's gradient, and either gradients inside
    the feed-forward layer, or those of a matrix and of attention's operands, when the feed-forward layer's activations
    are gone already."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, inner_width, heads, head_dim = network.d_model, network.feed_forward_size, network.n_heads, network.head_size
    tile = setup.mlp_tile_tokens if setup.tiled else n
    matrix = width * inner_width * (FLOAT32 + (w if setup.casts else 0))
    # gradients of gate and up, or w_down's weight, its operand's gradient and its output's
    inner = max(2 * w * tile * inner_width, w * tile * (inner_width + width) + matrix)
    if setup.float8 != "none" and not setup.compiled:  # w_down's operand in float32, clamped, and in FP8
        rounding = (2 * FLOAT32 + FLOAT8) * tile * inner_width
        inner = max(inner, rounding + setup.operands_in_float8 * w * tile * (inner_width + width))
    if setup.tiled:  # what the tile has computed again; the gradients of all tiles' inputs
        inner += tile * feed_forward_activations(setup) + n * setup.residual_bytes * width
    kv_heads = max(network.n_cached_heads, setup.sequence_parallel)
    scaled = network.attention.scales_queries  # queries are float32 before they are scaled
    attention = float(n * head_dim * (heads * (2 * w + 2 * FLOAT32 * scaled) + 2 * kv_heads * w))
    if network.attention.is_entmax and not uses_triton(setup):
        attention += BLOCKWISE_BYTES[setup.cuda] + setup.casts * 2 * FLOAT32 * n * head_dim * kv_heads
    if network.attention.nsa is not None:
        attention += branch_workspace(setup, network.attention.nsa)
    if network.attention.dsa is not None:
        attention += chosen_workspace(setup)
    if network.attention.dms is not None and not setup.cuda:
        attention += learned_bias_workspace(setup)
    if network.attention.hierarchical is not None:
        attention += block_choice_workspace(setup, network.attention.hierarchical)
    freed = setup.residual_bytes * width if setup.tiled else feed_forward_activations(setup)
    attention -= n * (norm_activations(setup, width) + freed)
    return n * setup.residual_bytes * width + max(inner, attention + matrix)


def compiled_backward(setup: Setup) -> float:
    """Bytes that exist at once when a compiled block that is recomputed has come to attention in its backward, read off
    the code that Inductor makes: it computes the block again as one graph with its gradient, and frees values later
    than the eager block does, which has few by then where the feed-forward layer is tiled."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, queries = network.d_model, network.n_heads * network.head_size
    keys = max(network.n_cached_heads, setup.sequence_parallel) * network.head_size
    # the block's input, the gradient that came, the one that goes, and the second norm's in float32; the first norm's
    # output, wo's output and its gradient
    size = (3 * setup.residual_bytes + FLOAT32 + 3 * w) * width
    size += w * (5 * queries + 4 * keys)  # attention's output, wo's operand, two gradients; q, k, v; dk, dv
    if network.attention.scales_queries:
        size += 2 * FLOAT32 * queries  # before they are scaled, and their gradient
    if network.attention.is_softmax and network.positions != "nape":
        size += (FLOAT32 + 2 * w) * queries  # FlashAttention: dq in float32; dk, dv for each query head
    return float(n * size + FLOAT32 * sum(block_matrices(network)))
