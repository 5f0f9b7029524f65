"""The decoder: embedding, blocks, final norm, head."""

import torch
from torch import Tensor, nn

from model.attention import Attention, AttentionMetadata, make_metadata
from model.compiling import share_cores
from model.config import ModelConfig
from model.initial_weights import InitialWeights, take_memory
from model.kv_cache import LayerCache
from model.layers import FeedForward, ScalableTemperature
from model.sequence_parallel import SequenceShards

# Inductor pads strides that are not whole 128 bytes, and torch 2.11's may read a buffer with other strides than it was
# written with (pytorch issue 194281): with sequences of 130 tokens temperatures got gradients 25 to 50 times too large
COMPILE_OPTIONS = {"comprehensive_padding": False}


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), metadata, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """deferred: parameters stay on the meta device, for whoever gives them memory and the values of `initial`; so they
    do without it where that is the default device."""

    def __init__(self, config: ModelConfig, deferred: bool = False):
        super().__init__()
        self.config = config
        device = torch.empty(0).device
        with torch.device("meta"):  # layers would draw values of their own first
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
            self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.annealed = 1.0  # share of the way from attention.anneal_from to alpha
        deferred = deferred or device.type == "meta"
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.initial = InitialWeights(self, config, seed, torch.device("cpu") if deferred else device)
        if not deferred:
            take_memory(self, device)
            self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        shards: SequenceShards | None = None,
        number: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 (B, T).
            cu_seqlens: int32 (documents + 1,), packed documents (B must be 1); attention and positions stay within
                each document.
            max_seqlen: an upper bound of the documents' lengths (None: T). A constant avoids recompilation and
                synchronisation.
            shards: the ranks that share these sequences (B must be 1): tokens are this rank's slice, cu_seqlens and
                max_seqlen are of all slices together.
            number: int64 (B, T), a number for each token of the run, by which noise is drawn that dms trains with;
                None: its position, so that the noise of every pass is the same.

        Returns: (B, T, C). Raises ValueError for shards of more than one row.
        """
        if shards is not None and tokens.shape[0] != 1:
            raise ValueError(f"ranks share one row of packed documents, got tokens {tuple(tokens.shape)}")
        metadata = make_metadata(
            self.config, tokens.shape[1], cu_seqlens, max_seqlen, tokens.device,
            alpha_progress=self.alpha_progress(), shards=shards, number=number,
        )  # fmt: skip
        x = self.embedding(tokens)  # [B, T, C]
        for block in self.blocks:
            x = block(x, metadata)
        return self.norm(x)

    def compile_blocks(self) -> None:
        """torch.compile of every block, in place: torch.compile(block) would prefix every key of the state dict."""
        share_cores(1)
        for block in self.blocks:
            block.compile(options=COMPILE_OPTIONS)

    def set_step(self, step: int) -> None:
        """Optimizer steps done, which decide how far attention.anneal_steps have moved alpha."""
        self.annealed = self.config.attention.annealed(step)

    def alpha_progress(self) -> Tensor | None:
        """A tensor, so that compiled blocks are not compiled again for each value; None when alpha has arrived."""
        return None if self.annealed >= 1 else torch.full((), self.annealed, device=self.embedding.weight.device)

    def layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return nn.functional.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, C); the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """As InitialWeights says."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial[name])

    @torch.no_grad()
    def alphas(self) -> Tensor | None:
        """float32 (L, H), as used at the current step, or None for softmax kinds."""
        modules = [block.attention.alpha for block in self.layers()]
        device, progress = self.embedding.weight.device, self.alpha_progress()
        alphas = [alpha(device, progress) for alpha in modules if alpha is not None]
        return torch.stack(alphas) if alphas else None

    @torch.no_grad()
    def temperature_scalars(self) -> Tensor | None:
        """float32 (L, heads with a temperature), or None for kinds other than ssmax."""
        modules = [block.attention.temperature for block in self.layers()]
        scalars = [module.scalar.float() for module in modules if isinstance(module, ScalableTemperature)]
        return torch.stack(scalars) if scalars else None
