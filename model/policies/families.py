"""Every policy by name, as one curve from sparse to dense."""

import math
from collections.abc import Callable, Sequence

from model.policies.bsfa import predicted_density
from model.policies.double_p import DoubleP
from model.policies.flexprefill import FlexPrefill
from model.policies.h2o import H2O
from model.policies.lm_infinite import LMInfinite
from model.policies.minference import BlockSparse, VerticalSlash
from model.policies.patterns import Fixed, Longformer, Strided
from model.policies.policy import SparsePolicy
from model.policies.quest import Quest
from model.policies.sketch_walk import SketchWalk
from model.policies.snapkv import AdaSnapKV, PyramidKV, SnapKV
from model.policies.sparge import SpargeAttention
from model.policies.sparq import SparQ
from model.policies.topk import OracleTopK
from model.policies.twilight import Twilight
from model.policies.vattention import VAttention
from model.policies.window import SlidingWindow, StreamingLLM


def _part(level: float, whole: int) -> int:
    return max(1, math.ceil(level * whole))


def _block(n_keys: int) -> int:
    """Keys of a block: 64, or less for texts below 1,024 tokens, so that there are 16 blocks to choose from."""
    return min(64, max(4, 2 ** max(0, (n_keys // 16).bit_length() - 1)))


def _blocks(level: float, n_keys: int) -> int:
    return _part(level, -(-n_keys // _block(n_keys)))


def _sparge(level: float, n_keys: int) -> SparsePolicy:
    """All three thresholds move together; the paper searches them for each layer."""
    margin = -5 / (1 - level) if level < 1 else -math.inf
    block = _block(n_keys)
    return SpargeAttention(level, margin, max(0.0, 2 * level - 1), query_block=2 * block, key_block=block)


def _stride(level: float, n_keys: int) -> int:
    """From the square root of the text's length, where a stride keeps fewest keys."""
    return max(_part(level, n_keys), math.isqrt(n_keys))


def _fixed(level: float, n_keys: int) -> SparsePolicy:
    """By columns: with longer blocks the density of a query would depend on its place in one."""
    block = math.isqrt(n_keys)
    return Fixed(block, _part(level, block))


def _longformer(level: float, n_keys: int) -> SparsePolicy:
    """Windows grow to 16 times the first layer's while there is room for that. Gaps would leave keys out at a level of
    1."""
    largest = _part(level, n_keys)
    return Longformer(max(largest // 16, _part(2 * level - 1, n_keys)), largest, gap=2 if level <= 0.5 else 1)


def _quest(level: float, n_keys: int) -> Quest:
    """Without dense layers, so that the density is that of all layers alike."""
    return Quest(_part(level, -(-n_keys // 16)), dense_layers=0)


def _sparq(level: float, n_keys: int) -> SparsePolicy:
    """Keys and channels move together; 16 of 64 channels, the paper's example, near the middle."""
    keys = _part(level, n_keys)
    return SparQ(keys, _part(level, 32), min(keys, 16))


def _vattention(level: float, n_keys: int) -> SparsePolicy:
    """The error that is allowed falls as more keys are chosen: from a level of 0.16 on it is within the paper's."""
    sure = min(128, _part(level / 8, n_keys))
    return VAttention(_quest(level, n_keys), 0.1 / level**0.5, 0.1, sinks=sure, local=sure, rate=level / 10)


def _sketch_walk(level: float, n_keys: int) -> SparsePolicy:
    """At a level of 0.2 the paper's window and first keys, and a quantile that makes it a density of 0.2."""
    window, sinks = level / 4, level / 8
    top = (level - window - sinks) / (1 - window - sinks) if level < 1 else 1.0
    return SketchWalk(top, window, sinks, _block(n_keys), dense_layers=0)


# (level, keys of the text) -> the policy whose density rises with the level in (0, 1], dense at 1
FAMILIES: dict[str, Callable[[float, int], SparsePolicy]] = {
    "window": lambda level, n: SlidingWindow(_part(level, n)),
    "streaming_llm": lambda level, n: StreamingLLM(4, _part(level, n)),
    "lm_infinite": lambda level, n: LMInfinite(_part(level, n), 4),
    "strided": lambda level, n: Strided(_stride(level, n)),
    "fixed": _fixed,
    "longformer": _longformer,
    "oracle": lambda level, n: OracleTopK(_blocks(level, n), _block(n)),
    "vertical_slash": lambda level, n: VerticalSlash(_part(level, n), _part(level, n)),
    "block_sparse": lambda level, n: BlockSparse(_blocks(level, n), _block(n)),
    "flexprefill": lambda level, n: FlexPrefill(level, least_keys=_block(n), block=_block(n)),
    "sparge": _sparge,
    "quest": _quest,
    "sparq": _sparq,
    "twilight": lambda level, n: Twilight(_quest(level, n), level**0.1, dense_layers=0),
    "vattention": _vattention,
    "snapkv": lambda level, n: SnapKV(_part(level, n), observed=min(32, _block(n))),
    "pyramidkv": lambda level, n: PyramidKV(_part(level, n), observed=min(8, _block(n))),
    "ada_snapkv": lambda level, n: AdaSnapKV(_part(level, n), observed=min(32, _block(n))),
    "h2o": lambda level, n: H2O(_part(level / 2, n), _part(level / 2, n)),
    "sketch_walk": _sketch_walk,
    "double_p": lambda level, n: DoubleP(level**0.1, level),
}


def policy_at(name: str, level: float, n_keys: int) -> SparsePolicy:
    """Raises ValueError for an unknown name or a level outside (0, 1]."""
    if name not in FAMILIES:
        raise ValueError(f"policy is {name!r}: expected one of {', '.join(FAMILIES)}")
    if not 0 < level <= 1:
        raise ValueError(f"level is {level}: expected a number in (0, 1]; 1 is dense")
    return FAMILIES[name](level, n_keys)


def calibrated_densities(ks: Sequence[int], n_keys: int) -> dict[float, int]:
    """BSFA's curve, whose points are the sets of thresholds that were calibrated: predicted density of a text of
    n_keys -> k."""
    return {predicted_density(k, n_keys): k for k in sorted(ks)}
