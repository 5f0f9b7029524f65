"""Block-Sparse FlashAttention (arXiv:2512.07011) as a policy, and how its thresholds are found."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor

from kernels import KEY_BLOCK, QUERY_BLOCK, block_maxima
from kernels.block_sparse.reference import diagonal_blocks, kept_blocks, query_blocks
from model.config import ModelConfig
from model.loading import model_fingerprint
from model.policies.block_attention import block_attention, count_kept
from model.policies.policy import Attended, Phase, PolicyRecord, SequenceView, SparsePolicy, use_policy
from model.policies.selection import Selection
from model.policies.thresholds import Estimator, read_thresholds
from model.transformer import Transformer


def predicted_density(k: int, length: int) -> float:
    """Share of the visible pairs of query and key in a text of `length` tokens where every block of queries keeps its
    diagonal and k other blocks."""
    kept = diagonal_blocks(length, length, True)
    for i, block in enumerate(query_blocks(length, length, True)):
        kept[i, : min(k, block.diagonal.start)] = True  # which ones does not matter: they have the same number of pairs
    pairs, visible, _, _ = count_kept(kept[None], length, length, QUERY_BLOCK)
    return int(pairs) / int(visible)


class ThresholdCollector(SparsePolicy):
    """Leaves attention as it is and finds the thresholds that keep the k best off-diagonal blocks, for several k, of
    each layer, head and block of query positions. -inf where there are no more than k blocks.

    estimator: "mean", the paper's, is the threshold of each text, midway between its k-th and its next largest score of
    a block, averaged over the texts. "pooled" is midway between the (k n)-th and the next largest score of the blocks
    of all n texts together: it keeps k blocks a text on average, where a mean of thresholds keeps more, because texts
    whose scores lie above it gain more blocks than the others lose. It holds every score of a block in CPU memory:
    4 bytes x L x H x texts x length ** 2 / 16384.

    Whole blocks of queries only: fewer queries reach lower scores.
    """

    name: ClassVar[str] = "bsfa_calibration"
    phases: ClassVar[frozenset[Phase]] = frozenset()

    def __init__(self, ks: Sequence[int], n_layers: int, estimator: Estimator) -> None:
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ValueError(f"ks is {list(ks)}: expected different numbers of blocks of at least 1, such as 8 16 32")
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator is {estimator!r}: expected one of {get_args(Estimator)}")
        self.ks, self.estimator = list(ks), estimator
        # of each layer, text and block of query positions: (H, off-diagonal blocks), or for means (ks, H)
        self.found: list[list[list[Tensor]]] = [[] for _ in range(n_layers)]

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        raise NotImplementedError("collects thresholds, selects no keys")

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        """q: (H, Tq, D), k: (G, Tk, D), a whole text. Raises ValueError for another length than before."""
        refuse_window(view)
        positions = []
        for block, maxima in block_maxima(q[None], k[None], scale=view.scale, alibi_slopes=view.alibi_slopes):
            if block.rows.stop - block.rows.start == QUERY_BLOCK:
                earlier = maxima[0, :, : block.diagonal.start]
                positions.append((self._cut(earlier, 1) if self.estimator == "mean" else earlier.clone()).cpu())
        texts = self.found[view.layer]
        if texts and len(texts[0]) != len(positions):
            raise ValueError(
                f"texts have {len(texts[0])} and {len(positions)} whole blocks of queries: expected all of one length"
            )
        texts.append(positions)

    def _cut(self, maxima: Tensor, n_texts: int) -> Tensor:
        """Float32 (ks, H): midway between the (k n_texts)-th and the next largest. maxima: (H, blocks)."""
        best = maxima.float().sort(-1, descending=True).values
        endless = best.new_full((len(best),), -torch.inf)
        ranks = [n * n_texts for n in self.ks]
        return torch.stack([best[:, n - 1 : n + 1].mean(-1) if n < best.shape[1] else endless for n in ranks])

    def thresholds(self) -> Tensor:
        """float32 (ks, L, H, P). Raises ValueError before any text was seen."""
        if not all(texts and texts[0] for texts in self.found):
            raise ValueError(f"no text of at least {QUERY_BLOCK} tokens was seen")
        return torch.stack([torch.stack(self._thresholds_of(texts), -1) for texts in self.found], 1).float()

    def _thresholds_of(self, texts: list[list[Tensor]]) -> list[Tensor]:
        """(ks, H) of each block of query positions."""
        if self.estimator == "mean":
            return [torch.stack(position).double().mean(0) for position in zip(*texts, strict=True)]
        return [self._cut(torch.cat(position, -1), len(texts)) for position in zip(*texts, strict=True)]


@dataclass(frozen=True)
class KeptBlocks:
    """blocks: bool (H, query blocks, key blocks), query blocks on the grid of positions."""

    blocks: Tensor
    query_start: int

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        position = torch.arange(rows.start, rows.stop, device=self.blocks.device) + self.query_start
        key = torch.arange(n_keys, device=position.device)
        return self.blocks[:, position // QUERY_BLOCK - self.query_start // QUERY_BLOCK][:, :, key // KEY_BLOCK]


@dataclass(frozen=True)
class BlockSparseFlash(SparsePolicy):
    """Blocks of keys whose largest score exceeds the threshold of the layer, head and block of query positions, and the
    diagonal ones (BSFA, arXiv:2512.07011), of prompts and whole texts. On CUDA a Triton kernel reads no other values.

    k, source: the set of thresholds, and its file. thresholds: float32 (L, H, P); the last position's count for all
    that follow.
    """

    name: ClassVar[str] = "bsfa"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    k: int
    source: str
    thresholds: Tensor = field(repr=False, compare=False)

    def faster(self, device: torch.device, config: ModelConfig) -> bool:
        return device.type == "cuda"

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        refuse_window(view)
        limits = self.thresholds[view.layer].to(q.device)
        n_blocks = -(-k.shape[1] // KEY_BLOCK)
        kept = []
        for block, maxima in block_maxima(q[None], k[None], scale=view.scale, alibi_slopes=view.alibi_slopes):
            keep = kept_blocks(maxima[0], limits, block)
            kept.append(torch.nn.functional.pad(keep, (0, n_blocks - keep.shape[1])))
        return KeptBlocks(torch.stack(kept, 1), view.query_start)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        refuse_window(view)
        limits = self.thresholds[view.layer].to(q.device)
        return block_attention(q, k, v, view, QUERY_BLOCK, thresholds=limits)


def refuse_window(view: SequenceView) -> None:
    if view.window is not None:
        raise ValueError(f"BSFA's blocks know no sliding window, and this model has one of {view.window} tokens")


def load_policy(path: Path, k: int, model: Transformer) -> BlockSparseFlash:
    """The policy of one k of a file. Raises ValueError for a k that it does not have, or another model's thresholds."""
    thresholds, calibration = read_thresholds(path)
    if k not in calibration.ks:
        raise ValueError(f"{path} has thresholds for k of {calibration.ks}, not {k}: choose one of them or calibrate")
    found = model_fingerprint(model)
    if found != calibration.model:
        raise ValueError(
            f"{path} belongs to model {calibration.model[:12]} ({calibration.checkpoint}), this one is {found[:12]}: "
            "calibrate this one with python -m eval.calibrate"
        )
    device = next(model.parameters()).device
    return BlockSparseFlash(k, str(path), thresholds[calibration.ks.index(k)].to(device))


def use_thresholds(model: Transformer, path: str | None, k: int | None) -> AbstractContextManager[PolicyRecord | None]:
    """use_policy with `load_policy`, or nothing where both are None. Raises ValueError where only one is."""
    if path is None and k is None:
        return nullcontext(None)
    if path is None or k is None:
        raise ValueError(f"thresholds is {path!r} and keep_blocks is {k!r}: give both, or neither for dense attention")
    return use_policy(model, load_policy(Path(path), k, model))
