"""An estimate of peak memory per device for the same configs and options as train.py, part by part.

    python -m training.memory --config configs/models/1b.yaml --config configs/attention/asentmax.yaml \
        --config configs/data/source_tree.yaml --config configs/stages/extend_128k.yaml \
        --config configs/cluster/ulysses.yaml

It needs no GPU and no data: parameters are counted on the meta device, the rest follows from shapes. Sizes: P
parameters, W ranks, S ranks that share a sequence, N tokens of a micro-batch, n = N / S of a rank, L layers, C width, F
width of the feed-forward layer, H query heads, G key/value heads, D head dim, V vocabulary. r and w: bytes of the
residual stream and of matrix products (4 and 4 in float32; 4 and 2 under autocast; 2 and 2 where ZeRO keeps weights in
bfloat16). What CUDA itself takes (context, libraries, NCCL; 1 to 2 GiB) and the allocator's fragmentation are not in
it.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

from dataclasses import dataclass, field

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.checks import check_number
from common.errors import user_errors
from data.datamodule import check_sizes
from model.attention import kept_bits
from model.config import ModelConfig, config_from_dict
from model.transformer import Block, Transformer
from training.cli import TrainingCLI
from training.distributed.config import BUCKET_ELEMENTS, ParallelConfig
from training.distributed.sequence_parallel import check_sequence_parallel
from training.options import PRECISIONS, check_trainer_options, count_processes
from training.throughput import GIB

FLOAT32 = 4
BLOCKWISE_BYTES = {True: 6 * 2**27, False: 6 * 2**20}  # scores and temporaries of the PyTorch entmax; CUDA, CPU


@dataclass(frozen=True)
class Setup:
    """What decides the memory of one device.

    Args:
        network: architecture.
        tokens: N, of one micro-batch.
        sequence_length: upper bound of a document's length.
        ranks: W, over all nodes.
        sequence_parallel, zero_stage, offload_optimizer: as in parallel.*.
        precision: of the Trainer: 32-true or bf16-mixed.
        activation_checkpointing, mlp_tile_tokens, loss_chunk_tokens: as in model.*.
        loss_backend: resolved: chunked or liger.
        keeps_gradients: gradients exist while a backward pass begins: with accumulation, or where an engine keeps them.
        cuda: with the kernels that run on CUDA, else those on CPU.
        compiled: as model.compile. What blocks keep is estimated as without it, which is more than they do.
    """

    network: ModelConfig
    tokens: int
    sequence_length: int
    ranks: int = 1
    sequence_parallel: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    precision: str = "32-true"
    activation_checkpointing: str = "none"
    mlp_tile_tokens: int = 0
    loss_chunk_tokens: int = 2048
    loss_backend: str = "chunked"
    cuda: bool = True
    keeps_gradients: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision is {self.precision!r}: the estimate knows 32-true and bf16-mixed")

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.sequence_parallel

    @property
    def product_bytes(self) -> int:
        """w."""
        return 2 if self.precision == "bf16-mixed" else 4

    @property
    def residual_bytes(self) -> int:
        """r."""
        return self.product_bytes if self.zero_stage else 4

    @property
    def casts(self) -> bool:
        """Whether products cast their float32 operands, and keep the copies."""
        return self.residual_bytes != self.product_bytes

    @property
    def tiled(self) -> bool:
        return 0 < self.mlp_tile_tokens < self.local_tokens


@dataclass(frozen=True)
class Part:
    """Bytes, and where they come from."""

    bytes: float
    formula: str


@dataclass
class Estimate:
    """Parts that stay for the whole run or until backward, what each phase adds to their sum (less than nothing where
    it has freed more of them than it needs), and what is on the host."""

    lasting: dict[str, Part] = field(default_factory=dict)
    phases: dict[str, Part] = field(default_factory=dict)
    host: dict[str, Part] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    def during(self, phase: str) -> float:
        """All that is there in a phase."""
        return sum(part.bytes for part in self.lasting.values()) + self.phases[phase].bytes

    @property
    def total(self) -> float:
        return self.during(self.peak_phase)


def estimate(setup: Setup) -> Estimate:
    """The estimate for one rank."""
    result = Estimate()
    _add_states(setup, result)
    kept = block_activations(setup)
    block, block_input = sum(kept.values()), setup.local_tokens * setup.residual_bytes * setup.network.d_model
    layers, mode = setup.network.n_layers, setup.activation_checkpointing
    per_layer = {"none": block, "full": block_input, "offload": 0}[mode]
    outside = outside_blocks(setup)
    if mode == "offload":
        # the last norm's operands too: x, and from the CPU's composite of operations x again and x / rms
        moved = 1 if setup.cuda else 3
        outside -= (moved if setup.cuda else moved - 1) * block_input
        result.host["blocks' inputs (pinned)"] = Part((layers + moved) * block_input, "(L + 1) n C r")
    formula = {"none": "L x one block", "full": "L n C r", "offload": "on the host"}[mode]
    result.lasting["activations"] = Part(
        layers * per_layer + outside, f"{formula}, and n x (last norm, positions, token ids)"
    )
    gradients = result.lasting["gradients"].bytes
    # a block that is recomputed: its input is there already, or comes back from the host
    again = {"none": 0, "full": block - block_input, "offload": block}[mode] + backward_workspace(setup)
    if setup.compiled and mode != "none":
        again = max(again, compiled_backward(setup) - (block_input if mode == "full" else 0))
    embedding = block_input + FLOAT32 * setup.network.vocab_size * setup.network.d_model
    result.phases = {
        # in the last micro-batch of a step the gradients of the others are there; in the first, those of the last step
        "loss": Part(loss_workspace(setup), "chunk of logits, head in w bytes, gradients of hidden states and head"),
        "backward, last block": Part(
            again - (0 if setup.keeps_gradients else gradients), "its activations where recomputed, and their gradients"
        ),
        "backward, first block": Part(
            again - (layers - 1) * per_layer - FLOAT32 * sum(block_matrices(setup.network)),
            "as above; other blocks' activations are gone, its own gradients to come",
        ),
        "backward, embedding": Part(embedding - layers * per_layer, "n C r + 4 V C"),
    }
    return result


def parameter_count(network: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(network).parameters())


def block_matrices(network: ModelConfig) -> tuple[int, int]:
    """Elements of one block's matrices: attention with temperature, feed-forward."""
    with torch.device("meta"):
        block = Block(network)
    counts = [sum(p.numel() for p in m.parameters() if p.dim() == 2) for m in (block.attention, block.feed_forward)]
    return counts[0], counts[1]


def _add_states(setup: Setup, result: Estimate) -> None:
    """Parameters, gradients and AdamW's moments: 4 P, 4 P, 8 P bytes without ZeRO; with it as in arXiv 1910.02054."""
    count, ranks, stage = parameter_count(setup.network), setup.ranks, setup.zero_stage
    width = setup.product_bytes if stage else FLOAT32
    parameters, gradients = Part(width * count, f"{width} P"), Part(FLOAT32 * count, "4 P")
    moments = Part(8 * count, "8 P")
    if stage:
        moments = Part(12 * count / ranks, "(8 + 4) P / W, with the float32 weights")
    if stage >= 2:
        buckets = 2 * FLOAT32 * BUCKET_ELEMENTS
        gradients = Part(FLOAT32 * count / ranks + buckets, "4 P / W and two buckets")
    if stage == 3:
        largest = max(sum(block_matrices(setup.network)), setup.network.vocab_size * setup.network.d_model)
        gathered = min(count, largest + BUCKET_ELEMENTS)
        parameters = Part(width * (count / ranks + gathered), f"{width} P / W and what is gathered at a time")
    if setup.offload_optimizer:
        result.host["optimizer state"], moments = moments, Part(0, "on the host")
    result.lasting |= {"parameters": parameters, "gradients": gradients, "optimizer state": moments}


def block_activations(setup: Setup) -> dict[str, float]:
    """Bytes that one block keeps for backward, by part, for n tokens."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    norm = _norm(setup, network.d_model)
    attention_weights, feed_forward_weights = block_matrices(network)
    readers = 3 + 2 * (network.attention.kind == "asentmax")  # wq, wk, wv; beta and gamma
    parts = {
        "norms": 2 * n * norm,
        "attention's input": n * _product_input(setup, readers),
        "queries, temperatures": n * _scaling(setup),
        "attention": _attention(setup),
        "attention's output": n * w * network.n_heads * network.head_size,  # wo's operand
        # the tiles share the norm's output; or its readers' copies, gate, up, silu(gate) and their product
        "feed-forward": n * setup.residual_bytes * network.d_model if setup.tiled else n * _feed_forward(setup),
        "cast weights": setup.casts * w * (attention_weights + (0 if setup.tiled else feed_forward_weights)),
    }
    return {name: float(size) for name, size in parts.items()}


def _norm(setup: Setup, width: int, *, mixed: bool = False) -> int:
    """RMSNorm a token: its input, 1 / rms in float32. Where it is a composite of simpler operations, on CPUs and for
    operands of mixed dtypes, it computes in float32 and keeps x / rms too."""
    fused = setup.cuda and not mixed
    return (setup.residual_bytes if fused else 2 * FLOAT32) * width + FLOAT32


def _product_input(setup: Setup, readers: int) -> int:
    """The operand of `readers` matrix products a token: shared, or under autocast a copy for each (w C)."""
    return setup.network.d_model * (readers * setup.product_bytes if setup.casts else setup.residual_bytes)


def _feed_forward(setup: Setup) -> int:
    return _product_input(setup, 2) + 4 * setup.product_bytes * setup.network.d_ff


def _scaling(setup: Setup) -> int:
    """A token's unscaled queries in float32, temperatures (asentmax: five values on the way), and qk_norm's inputs."""
    network = setup.network
    heads, kv_heads, head_dim = network.n_heads, network.n_kv_heads, network.head_size
    size = 0
    if network.attention.kind in ("ssmax", "asentmax"):
        size += FLOAT32 * heads * (head_dim + 1)
    if network.attention.kind == "asentmax":
        size += 5 * FLOAT32 * (heads - network.n_alibi_heads)
    if network.qk_norm:
        size += (heads + kv_heads) * _norm(setup, head_dim, mixed=setup.casts)
    return size


def _attention(setup: Setup) -> float:
    """What the attention operation keeps: q, k, v, and its own results."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    heads, head_dim = network.n_heads, network.head_size
    kv_heads = max(network.n_kv_heads, setup.sequence_parallel)  # KV heads that several ranks need are repeated
    size = float(n * w * head_dim * (heads + 2 * kv_heads))
    if network.attention.is_entmax:
        if uses_triton(setup):
            size += n * FLOAT32 * heads  # the threshold; the output is wo's operand
            size += heads * n * kept_bits(setup.tokens, setup.tokens // setup.sequence_length) / setup.tokens / 8
            return size + 8 * setup.tokens  # each row's first and last key
        return size + 3 * n * FLOAT32 * heads  # maximum, threshold, normaliser
    size += n * FLOAT32 * heads  # log-sum-exp
    if setup.cuda and network.positions != "nape":
        return size  # varlen_attn's output is wo's operand
    size += n * w * heads * head_dim  # the output, in another layout than wo's operand
    if not setup.cuda and (network.positions == "nape" or network.window):
        size += n * w * heads * setup.sequence_length  # with a bias, the CPU keeps the weights of whole documents
    return size


def uses_triton(setup: Setup) -> bool:
    return setup.cuda and setup.network.attention.backend in ("auto", "triton")


def outside_blocks(setup: Setup) -> float:
    """The last norm, token ids, labels, and what layers share: rotary tables or positions' logarithms."""
    network, n = setup.network, setup.local_tokens
    shared = FLOAT32 + (FLOAT32 * network.head_size if network.positions == "rope" else 0)
    return n * (_norm(setup, network.d_model) + 2 * 8 + shared)


def loss_workspace(setup: Setup) -> float:
    """Bytes of step/loss.py or Liger's fused loss: hidden states and their gradient, the head's weights in w bytes and
    their gradient in float32, logits of one chunk."""
    n, width, vocab, w = setup.local_tokens, setup.network.d_model, setup.network.vocab_size, setup.product_bytes
    hidden = n * width * (setup.residual_bytes + w)
    head = vocab * width * (FLOAT32 + (w if setup.casts else 0))
    if setup.loss_backend == "liger":
        copy = n * width * w if setup.casts else 0
        chunk = min(n, _next_power_of_2(-(-n // -(-vocab // width))))
        return hidden + copy + head + chunk * vocab * w
    chunk = min(n, setup.loss_chunk_tokens)
    # logits and their log-softmax in float32, then the residual in w bytes beside one of them
    return hidden + head + chunk * vocab * (2 * FLOAT32 if w == FLOAT32 else 2 * FLOAT32 + w)


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def backward_workspace(setup: Setup) -> float:
    """What a block's backward has beside its activations: the residual stream's gradient, one matrix's gradient, and
    either gradients of two inner values of the feed-forward layer (and a tile that is computed again), or gradients of
    attention's operands, when the feed-forward layer's activations are gone already."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, inner_width, heads, head_dim = network.d_model, network.d_ff, network.n_heads, network.head_size
    tile = setup.mlp_tile_tokens if setup.tiled else n
    inner = tile * (2 * w * inner_width + w * width + (_feed_forward(setup) if setup.tiled else 0))
    kv_heads = max(network.n_kv_heads, setup.sequence_parallel)
    scaled = network.attention.kind in ("ssmax", "asentmax")  # queries are float32 before they are scaled
    attention = float(n * head_dim * (heads * (2 * w + 2 * FLOAT32 * scaled) + 2 * kv_heads * w))
    if network.attention.is_entmax and not uses_triton(setup):
        attention += BLOCKWISE_BYTES[setup.cuda] + setup.casts * 2 * FLOAT32 * n * head_dim * kv_heads
    attention -= n * (_norm(setup, width) + (setup.residual_bytes * width if setup.tiled else _feed_forward(setup)))
    matrix = width * inner_width * (FLOAT32 + (w if setup.casts else 0))
    return n * setup.residual_bytes * width + max(inner, attention) + matrix


def compiled_backward(setup: Setup) -> float:
    """Bytes that exist at once when a compiled block that is recomputed has come to attention in its backward, read off
    the code that Inductor makes: it computes the block again as one graph with its gradient, and frees values later
    than the eager block does, which has few by then where the feed-forward layer is tiled."""
    network, n, w = setup.network, setup.local_tokens, setup.product_bytes
    width, queries = network.d_model, network.n_heads * network.head_size
    keys = max(network.n_kv_heads, setup.sequence_parallel) * network.head_size
    # the block's input, the gradient that came, the one that goes, and the second norm's in float32; the first norm's
    # output, wo's output and its gradient
    size = (3 * setup.residual_bytes + FLOAT32 + 3 * w) * width
    size += w * (5 * queries + 4 * keys)  # attention's output, wo's operand, two gradients; q, k, v; dk, dv
    if network.attention.kind in ("ssmax", "asentmax"):
        size += 2 * FLOAT32 * queries  # before they are scaled, and their gradient
    if not network.attention.is_entmax and network.positions != "nape":
        size += (FLOAT32 + 2 * w) * queries  # FlashAttention: dq in float32; dk, dv for each query head
    return float(n * size + FLOAT32 * sum(block_matrices(network)))


def report(setup: Setup, found: Estimate) -> str:
    """A table of the estimate."""
    shared = f", {setup.sequence_parallel} share a sequence" * (setup.sequence_parallel > 1)
    lines = [
        f"{parameter_count(setup.network):,} parameters, {setup.local_tokens:,} tokens a rank and micro-batch "
        f"({setup.ranks} ranks{shared}), {setup.precision}, ZeRO stage {setup.zero_stage}, activation checkpointing "
        f"{setup.activation_checkpointing}, loss backend {setup.loss_backend}",
        "",
    ]

    def row(name: str, size: float, text: str) -> str:
        return f"  {name:<28}{size / GIB:>9.2f} GiB   {text}"

    lines += [row(name, part.bytes, part.formula) for name, part in found.lasting.items()]
    lines.append("  what is left of them, with what a phase needs itself:")
    lines += [row(f"  {name}", found.during(name), part.formula) for name, part in found.phases.items()]
    lines.append(row("peak per device", found.total, f"in {found.peak_phase}"))
    if found.host:
        lines.append("on the host, per rank:")
        lines += [row(name, part.bytes, part.formula) for name, part in found.host.items()]
    return "\n".join(lines)


class MemoryCLI(TrainingCLI):
    """Parses train.py's options and instantiates nothing."""

    needs_run_dir = False

    def before_instantiate_classes(self) -> None:
        config, data = self.config, self.config.data
        check_trainer_options(config.trainer, self.lightning_defaults(), to_train=False)
        check_sizes(data.sequence_length, data.global_batch_size, data.micro_batch_size)
        check_number("model.loss_chunk_tokens", config.model.loss_chunk_tokens, least=1, whole=True)
        check_number("model.mlp_tile_tokens", config.model.mlp_tile_tokens, least=0, whole=True, zero="all at once")
        network = config_from_dict(config.model.network.as_dict())
        parallel, ranks = config.parallel, count_processes(config.trainer)
        tokens = config.data.micro_batch_size * config.data.sequence_length
        check_sequence_parallel(ParallelConfig(**parallel.as_dict()), network, tokens, ranks)
        accelerator, backend = config.trainer.accelerator, config.model.loss_backend
        cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        self.setup = Setup(
            network=network,
            tokens=tokens,
            sequence_length=config.data.sequence_length,
            ranks=ranks,
            sequence_parallel=parallel.sequence_parallel,
            zero_stage=parallel.zero_stage,
            offload_optimizer=parallel.offload_optimizer,
            precision=PRECISIONS[config.trainer.precision],
            activation_checkpointing=config.model.activation_checkpointing,
            mlp_tile_tokens=config.model.mlp_tile_tokens,
            loss_chunk_tokens=config.model.loss_chunk_tokens,
            loss_backend={"auto": "liger" if cuda else "chunked"}.get(backend, backend),
            cuda=cuda,
            compiled=config.model.compile,
            keeps_gradients=ranks > 1 or config.data.global_batch_size > config.data.micro_batch_size,
        )

    def instantiate_classes(self) -> None:
        pass


def main() -> None:
    with user_errors(MisconfigurationException):
        setup = MemoryCLI().setup
        print(report(setup, estimate(setup)))


if __name__ == "__main__":
    main()
