"""Block masks made from intervals, beside torch's, which asks every pair."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from model.block_masks import TILE
from model.config import NSAConfig
from model.dsa.tokens import packed_tokens
from model.kv_cache import KVCache
from model.nsa.attention import block_masks
from model.nsa.blocks import cached_blocks, packed_blocks
from model.softmax import cached_block_mask, document_block_mask
from model.visible_attention import block_mask_of_view
from tests.model.test_transformer import tiny

CPU = torch.device("cpu")
PACKED = torch.tensor([0, 1, 1, 130, 256, 640, 641, 1000], dtype=torch.int32)


def tiles_of(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """bool (b, 1, query tiles, key tiles): those that are computed under the mask, and those without it."""
    found = []
    for numbers, order in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        if numbers is None:
            found.append(torch.zeros_like(found[0]))
            continue
        listed = torch.arange(order.shape[-1]) < numbers[..., None]
        found.append(torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), listed))
    return found[0], found[1]


def check(ours: BlockMask, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """No tile is left out, and none is taken whole, but as torch's mask has it. Returns both masks' live tiles."""
    rows = ours.kv_num_blocks.shape[0]
    theirs = create_block_mask(ours.mask_mod, rows, None, n_queries, n_keys, device=CPU, BLOCK_SIZE=TILE)
    (partial, full), (their_partial, their_full) = tiles_of(ours), tiles_of(theirs)
    assert ours.seq_lengths == theirs.seq_lengths and not (partial & full).any()
    assert ((partial | full) >= (their_partial | their_full)).all() and (full <= their_full).all()
    return partial | full, their_partial | their_full


@pytest.mark.parametrize("window", [None, 1, 100, 300, 5000])
@pytest.mark.parametrize("documents", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("n_tokens", [1000, 1024])
def test_documents(n_tokens: int, documents: Tensor | None, window: int | None) -> None:
    bounds = None if documents is None else torch.cat([documents, documents.new_tensor([n_tokens])])
    ours = document_block_mask(n_tokens, bounds, window, CPU)
    found, expected = check(ours, n_tokens, n_tokens)
    assert torch.equal(found, expected)
    theirs = create_block_mask(ours.mask_mod, None, None, n_tokens, n_tokens, device=CPU, BLOCK_SIZE=TILE)
    assert torch.equal(tiles_of(ours)[1], tiles_of(theirs)[1])  # as many without the mask


@pytest.mark.parametrize("window", [None, 10, 200])
def test_chunks_of_a_cache(window: int | None) -> None:
    cache = KVCache(tiny(window=window), 1, 900, torch.float32, CPU)
    cache.lengths = [300]
    extension, _ = cache.open(1, 400)
    n_keys = extension.keys.stop - extension.keys.start
    found, expected = check(cached_block_mask(extension, window), 400, n_keys)
    assert torch.equal(found, expected)


def nsa(cached: bool) -> Any:
    sizes = NSAConfig(window=200)
    if not cached:
        return packed_blocks(sizes, 1000, PACKED, 384, CPU)
    cache = KVCache(tiny(), 2, 900, torch.float32, CPU)
    cache.lengths = [300, 17]
    return cached_blocks(sizes, cache.open(2, 400)[0])


@pytest.mark.parametrize("cached", [False, True], ids=["packed", "rows of a cache"])
def test_branches_of_nsa(cached: bool) -> None:
    """The compressed block that a query stands in may be live without need."""
    blocks = nsa(cached)
    compression, window = block_masks(blocks)
    n_queries = blocks.position.shape[1]
    assert compression.full_kv_num_blocks is None
    found, expected = check(compression, n_queries, len(blocks.first_key))
    assert (found ^ expected).sum() <= found.shape[0] * found.shape[2]
    found, expected = check(window, n_queries, blocks.n_keys)
    assert torch.equal(found, expected)


def test_all_that_is_visible() -> None:
    tokens = packed_tokens(1000, PACKED, 384, CPU)
    ours = block_mask_of_view(tokens.view_of(tokens.visible_keys(), None), 1000)
    found, expected = check(ours, 1000, 1000)
    assert torch.equal(found, expected) and ours.full_kv_num_blocks.any()
