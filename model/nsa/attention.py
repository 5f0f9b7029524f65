"""Native Sparse Attention (arXiv:2502.11089): three branches over keys and values of their own, and their gates."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from kernels import selected_block_attention
from kernels.block_sparse.attention import runs_on_triton
from model.config import ModelConfig
from model.kv_cache import Extension, LayerCache
from model.nsa.blocks import Blocks, cached_blocks, packed_blocks
from model.nsa.branches import compression_branch, selection_branch, window_branch
from model.nsa.config import BRANCHES, NSAConfig
from model.nsa.selection import select_blocks
from model.sparse_attention import SparseAttention
from model.visible_attention import View, attend_flex, attend_masked, block_mask_of_view, uses_flex


@dataclass(frozen=True)
class NSAMetadata:
    """What all layers of one forward pass share. compression, window: FlexAttention's block masks, None where branches
    are attended with masks."""

    blocks: Blocks
    compression: BlockMask | None
    window: BlockMask | None


class BlockCompression(nn.Module):
    """phi of equation 7: an MLP over the tokens of a block, behind each other, with a learned code of their places.
    The paper does not give its shape: here one hidden layer with SiLU, shared by all heads, without biases."""

    def __init__(self, config: NSAConfig, head_dim: int):
        super().__init__()
        hidden = head_dim if config.compress_hidden is None else config.compress_hidden
        self.place = nn.Embedding(config.compress_length, head_dim)
        self.w_in = nn.Linear(config.compress_length * head_dim, hidden, bias=False)
        self.w_out = nn.Linear(hidden, head_dim, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x: keys or values (B, G, T, D), tokens: int64 (C, compress_length) -> (B, G, C, D)."""
        # called, not read: ZeRO 3 gathers the weights of a module that is called
        code = self.place(torch.arange(tokens.shape[1], device=x.device))
        windows = x[:, :, tokens] + code  # [B, G, C, length, D]
        out: Tensor = self.w_out(nn.functional.silu(self.w_in(windows.flatten(3))))
        return out


class NativeSparseAttention(SparseAttention):
    """What attends in the layers of kind "nsa": sum over the branches of gate times attention (equation 5).

    Keys and values come as 3 G heads, those of compression, selection and window behind each other: separate
    projections keep a branch from learning for another. The gates, sigmoid of a linear map of the layer's input, are
    per query head and token, and not normalised.

    Positions. rope: queries and keys of all branches are rotated for their tokens' positions, before compression. nape:
    ALiBi takes the distance of tokens in the selection and window branches, that to the block's last token in the
    compression branch, and so weighs in what is selected. nope: none, but for phi's code of places within a block.
    qk_norm: over token keys, before they are rotated; compressed keys are not normalised again.

    Selecting has no gradient: phi learns from the compression branch's output alone.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        assert config.attention.nsa is not None
        self.sizes, self.n_kv_heads = config.attention.nsa, config.n_kv_heads
        self.gate = nn.Linear(config.d_model, BRANCHES * config.n_heads)
        self.compress_k = BlockCompression(self.sizes, config.head_size)
        self.compress_v = BlockCompression(self.sizes, config.head_size)

    @staticmethod
    def metadata(
        config: ModelConfig,
        n_tokens: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        device: torch.device,
        number: Tensor | None = None,
    ) -> NSAMetadata:
        assert config.attention.nsa is not None
        return _with_masks(packed_blocks(config.attention.nsa, n_tokens, cu_seqlens, max_seqlen, device))

    @staticmethod
    def cached_metadata(config: ModelConfig, extension: Extension) -> NSAMetadata:
        assert config.attention.nsa is not None
        return _with_masks(cached_blocks(config.attention.nsa, extension))

    @torch.compiler.disable  # FlexAttention is compiled by itself
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        metadata: NSAMetadata,
        slopes: Tensor | None,
        cache: LayerCache | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        """k and v: (B, 3 G, keys, D)."""
        gates = self.gate(x).sigmoid().to(q.dtype).unflatten(-1, (BRANCHES, -1)).permute(2, 0, 3, 1)  # [3, B, H, n]
        compression, selection, window = self.attend(q, k, v, metadata, slopes)
        return gates[0, ..., None] * compression + gates[1, ..., None] * selection + gates[2, ..., None] * window

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: NSAMetadata, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What compression, selection and window give, (B, H, n, D) each, before the gates."""
        blocks = metadata.blocks
        keys, values = k.unflatten(1, (BRANCHES, -1)).unbind(1), v.unflatten(1, (BRANCHES, -1)).unbind(1)
        tokens = blocks.compressed_tokens()
        compressed = self.compress_k(keys[0], tokens).to(q.dtype)
        compressed_values = self.compress_v(values[0], tokens).to(q.dtype)
        chosen = select_blocks(q, compressed, blocks, slopes)
        return (
            _attend(q, compressed, compressed_values, compression_branch(blocks, slopes), metadata.compression),
            _attend_selected(q, keys[1], values[1], chosen, blocks, slopes),
            _attend(q, keys[2], values[2], window_branch(blocks, slopes), metadata.window),
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, branch: View, mask: BlockMask | None) -> Tensor:
    return attend_masked(q, k, v, branch) if mask is None else attend_flex(q, k, v, branch, mask)


def _attend_selected(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Blocks, slopes: Tensor | None) -> Tensor:
    """By the kernel, which reads nothing else, where it runs. chosen: as `select_blocks` gives it."""
    if not runs_on_triton(q):
        return attend_masked(q, k, v, selection_branch(blocks, slopes, chosen, q.shape[1] // k.shape[1]))
    return selected_block_attention(
        q, k, v, blocks.selected_first_keys(chosen), blocks.own_key, block_size=blocks.config.select_block,
        n_blocks=blocks.n_selectable, alibi_slopes=slopes,
    )  # fmt: skip


def _with_masks(blocks: Blocks) -> NSAMetadata:
    n_queries, device = blocks.position.shape[1], blocks.position.device
    if not uses_flex(device, n_queries, blocks.n_keys):
        return NSAMetadata(blocks, None, None)
    return NSAMetadata(blocks, *block_masks(blocks))


def block_masks(blocks: Blocks) -> tuple[BlockMask, BlockMask]:
    """Of compression and window."""
    compression = compression_branch(blocks, None)  # it may see the last of its blocks
    return (
        block_mask_of_view(compression, len(blocks.first_key), exact=False),
        block_mask_of_view(window_branch(blocks, None), blocks.n_keys),
    )
