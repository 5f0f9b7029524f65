"""MInference's patterns, one for each head (arXiv:2407.02490): which they are, how they are found, and their file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from model.loading import model_fingerprint
from model.policies.blocks import mean_scores, own_blocks, top_count
from model.policies.calibrated_files import read_calibrated, save_calibrated
from model.policies.minference import chosen_lines
from model.policies.policy import Phase, SequenceView, SparsePolicy
from model.policies.selection import BlockSelection, Selection
from model.policies.window import NearKeys
from model.transformer import Transformer

KINDS = ("a_shape", "vertical_slash", "block_sparse")
A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(len(KINDS))
BLOCK = 64
FORMAT = 1
COMMAND = "eval.search_patterns"


@dataclass(frozen=True)
class Candidate:
    """sizes: first and last keys (a_shape), verticals and slashes, or key blocks of each query block and 0."""

    kind: int
    sizes: tuple[int, int]


def candidates(density: float, length: int) -> list[Candidate]:
    """Patterns that read about as much as each other in a text of `length` tokens: the pairs of `density` of all
    visible ones. A query has n = density length / 2 of them: first or last keys and slashes cost one each, a vertical,
    which half of the queries see, a half, and a block of keys BLOCK, but half of that the query's own. Without blocks
    where n is less than one.

    Raises: ValueError for a density above 0.5, where lines cover each other and patterns come apart, or n below 2.
    """
    if not 0 < density <= 0.5 or round(density * length / 2) < 2:
        raise ValueError(
            f"density is {density}: expected at most 0.5, and at least {4 / length:.2g} at {length} tokens, which are "
            "two keys a query"
        )
    n = round(density * length / 2)
    found = [Candidate(A_SHAPE, (first, n - first)) for first in dict.fromkeys((max(1, n // 16), max(1, n // 4)))]
    for share in (1 / 16, 1 / 4, 1 / 2, 3 / 4, 15 / 16):
        slashes = min(max(1, round(share * n)), n - 1)
        found.append(Candidate(VERTICAL_SLASH, (2 * (n - slashes), slashes)))
    blocks = [Candidate(BLOCK_SPARSE, (round(n / BLOCK + 0.5), 0))] if n >= BLOCK else []
    return [*dict.fromkeys(found), *blocks]


@dataclass(frozen=True)
class Calibration:
    """What stands beside the patterns in their file.

    model: fingerprint of the model (model.loading.model_fingerprint). checkpoint, step: where it was. density: asked of
    all candidates. length, samples: of the texts. least_recall: that budgets were raised to, at refined_length; None
    where they were not. recall, reached: of the exact attention's weight and of the visible pairs what was chosen
    keeps, mean over layers and heads, at the last length.
    """

    model: str
    checkpoint: str
    step: int
    density: float
    length: int
    samples: int
    least_recall: float | None
    refined_length: int | None
    recall: float
    reached: float
    block: int = BLOCK
    format: int = FORMAT


@dataclass(frozen=True)
class HeadPatterns(SparsePolicy):
    """Each head of each layer has the pattern that `eval.search_patterns` found for it: the first and the last keys,
    the lines that its last `observed` queries look along, or key blocks by mean scores (MInference, arXiv:2407.02490,
    Algorithms 1 to 3). Prompts and whole texts.

    kinds: int64 (L, H), indices of KINDS. sizes: int64 (L, H, 2), as Candidate's. source: for tables.
    """

    name: ClassVar[str] = "minference"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    source: str
    kinds: Tensor = field(repr=False, compare=False)
    sizes: Tensor = field(repr=False, compare=False)
    observed: int = 64

    @classmethod
    def everywhere(cls, candidate: Candidate, n_layers: int, n_heads: int) -> "HeadPatterns":
        """One pattern for all heads."""
        kinds = torch.full((n_layers, n_heads), candidate.kind)
        return cls(str(candidate), kinds, torch.tensor(candidate.sizes).expand(n_layers, n_heads, 2))

    def scaled(self, level: float, calibration: Calibration, length: int) -> "HeadPatterns":
        """As sparse as `level` asks, in (0, 1], for texts of `length` tokens. Each budget is a share of the text's
        tokens: the one that was found at the density that was searched for, its powers above and below, so that all of
        them reach the whole text at 1."""
        found_at = calibration.refined_length or calibration.length
        unit = torch.where(self.kinds == BLOCK_SPARSE, BLOCK, 1)[..., None]  # tokens
        share = (self.sizes.double() * unit / found_at).clamp(max=1)
        power = math.log(level) / math.log(calibration.density)
        return replace(self, sizes=(length * share**power / unit).ceil().long().clamp(min=1))

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        kinds, sizes = (x[view.layer].to(q.device) for x in (self.kinds, self.sizes))
        parts: dict[int, Selection] = {}
        there = kinds.unique().tolist()
        if A_SHAPE in there:
            parts[A_SHAPE] = NearKeys(view, sizes[:, 0], sizes[:, 1], q.device)
        if VERTICAL_SLASH in there:
            parts[VERTICAL_SLASH] = chosen_lines(q, k, view, sizes[:, 0], sizes[:, 1], self.observed)
        if BLOCK_SPARSE in there:
            own = own_blocks(view, (BLOCK, BLOCK), (q.shape[1], k.shape[1]), q.device)
            scores = mean_scores(q, k, view, (BLOCK, BLOCK)).masked_fill_(own, torch.inf)
            blocks = top_count(scores, sizes[:, :1].expand(-1, scores.shape[1])) | own
            parts[BLOCK_SPARSE] = BlockSelection(blocks, BLOCK, BLOCK)
        return _ByHead(kinds, parts)


@dataclass(frozen=True)
class _ByHead:
    """Each head's own kind of selection. kinds: (H,)."""

    kinds: Tensor
    parts: dict[int, Selection]

    def mask(self, rows: slice, n_keys: int) -> Tensor:
        found = torch.zeros(len(self.kinds), rows.stop - rows.start, n_keys, dtype=torch.bool, device=self.kinds.device)
        for kind, part in self.parts.items():
            found |= part.mask(rows, n_keys) & (self.kinds == kind)[:, None, None]
        return found


class RecallCollector(SparsePolicy):
    """Leaves attention as it is and adds up, for several patterns, which share of its weight they keep: of Qwen2.5-1M
    (arXiv:2501.15383) exp(lse of the kept scores - lse of all), mean over queries.

    recall, density: float64 (policies, L, H), after a text; density of what was kept over all that is visible.
    """

    name: ClassVar[str] = "pattern_search"
    phases: ClassVar[frozenset[Phase]] = frozenset()

    def __init__(self, policies: Sequence[HeadPatterns], n_layers: int, n_heads: int) -> None:
        self.policies = list(policies)
        # weight and pairs that each keeps; last, all there are
        self.sums = torch.zeros(2, len(self.policies) + 1, n_layers, n_heads, dtype=torch.float64)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        raise NotImplementedError("collects recall, selects no keys")

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:
        selections = [policy.select(q, k, view) for policy in self.policies]
        sums = torch.zeros(2, len(selections) + 1, len(q), dtype=torch.float64, device=q.device)
        for rows in view.row_blocks(q, k.shape[1]):
            n_keys = view.query_start + rows.stop
            p = torch.softmax(view.scores(q, k, rows, n_keys), -1)
            seen = view.visible(rows, n_keys, q.device)
            kept = (one.mask(rows, n_keys) & seen for one in selections)
            for i, mask in enumerate(chain(kept, (seen[None],))):
                sums[0, i] += (p * mask).sum((-1, -2))
                sums[1, i] += mask.sum((-1, -2))
        self.sums[:, :, view.layer] += sums.cpu()

    @property
    def recall(self) -> Tensor:
        return self.sums[0, :-1] / self.sums[0, -1]

    @property
    def density(self) -> Tensor:
        return self.sums[1, :-1] / self.sums[1, -1]


def best_patterns(
    collected: RecallCollector, tried: Sequence[Candidate], source: str
) -> tuple[HeadPatterns, Tensor, Tensor]:
    """The candidate that keeps most in each head, its recall and its density, (L, H). collected: of `tried`."""
    best = collected.recall.argmax(0)
    kinds, sizes = torch.tensor([one.kind for one in tried]), torch.tensor([one.sizes for one in tried])
    recall, density = (x.gather(0, best[None])[0] for x in (collected.recall, collected.density))
    return HeadPatterns(source, kinds[best], sizes[best]), recall, density


def raised(policy: HeadPatterns, recall: Tensor, least: float, length: int) -> HeadPatterns:
    """Budgets of heads whose recall, (L, H), is below `least`, times 1.5, but at most the text's length."""
    more = (policy.sizes * 1.5).ceil().long().clamp(max=length)
    return replace(policy, sizes=torch.where((recall < least)[..., None], more, policy.sizes))


def save_patterns(path: Path, policy: HeadPatterns, calibration: Calibration) -> None:
    save_calibrated(path, {"patterns": policy.kinds, "sizes": policy.sizes}, calibration)


def read_patterns(path: Path) -> tuple[HeadPatterns, Calibration]:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or that save_patterns did not write."""
    grid = {"format": FORMAT, "block": BLOCK}
    tensors, calibration = read_calibrated(path, ["patterns", "sizes"], Calibration, grid, COMMAND)
    kinds, sizes = tensors["patterns"], tensors["sizes"]
    if not 0 < calibration.density < 1 or calibration.length < 1:
        raise ValueError(
            f"{path} was searched for density {calibration.density} at {calibration.length} tokens, expected a share "
            f"below 1 and a text: make it again with python -m {COMMAND}"
        )
    known = not kinds.is_floating_point() and not sizes.is_floating_point() and bool((sizes >= 0).all())
    if not known or sizes.shape != (*kinds.shape, 2) or kinds.ndim != 2 or not bool(((kinds >= 0) & (kinds < 3)).all()):
        raise ValueError(
            f"{path} has patterns of shape {tuple(kinds.shape)} with sizes of {tuple(sizes.shape)}, expected indices "
            f"of {', '.join(KINDS)} (layers, heads) and (layers, heads, 2): make it again with python -m {COMMAND}"
        )
    return HeadPatterns(str(path), kinds, sizes), calibration


def load_patterns(path: Path, model: Transformer) -> tuple[HeadPatterns, Calibration]:
    """`read_patterns`, for this model. Raises ValueError for another's too."""
    policy, calibration = read_patterns(path)
    found = model_fingerprint(model)
    if found != calibration.model or policy.kinds.shape != (model.config.n_layers, model.config.n_heads):
        raise ValueError(
            f"{path} belongs to model {calibration.model[:12]} ({calibration.checkpoint}), this one is {found[:12]}: "
            f"search for this one with python -m {COMMAND}"
        )
    return policy, calibration
