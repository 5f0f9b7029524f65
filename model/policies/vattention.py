"""vAttention: the weight of keys that no selector chose is estimated from a random sample of them."""

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import torch
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.policies.blocks import check_least, check_share, top_count
from model.policies.policy import Attended, Phase, SequenceView, SparsePolicy, masked_attention
from model.policies.selection import Selection, TokenSelection
from model.policies.twilight import check_selector
from model.policies.window import NearKeys


@dataclass(frozen=True)
class VAttention(SparsePolicy):
    """Decoding attends exactly to the first `sinks` keys, the last `local` and those that `base` selects, and estimates
    what the n others add to softmax's numerator and denominator by b of them, drawn without replacement, each counted
    n / b times (vAttention, arXiv:2510.05688). Both estimates are unbiased. Dense at rate 1.

    b is chosen for each head and token so that the numerator and the denominator each miss their value by more than the
    share `eps` of it with a probability of at most `delta`: by the central limit theorem, z(1 - delta / 2) n sigma /
    (eps |value|), squared, with sigma (the root of the covariance's trace) and value estimated from a first sample, the
    share `rate` of the others; at least as many as that. So it holds for large samples only.

    Both samples are drawn afresh, so that b depends on no key that it counts, from a generator that `seed`, layer and
    position decide. The density counts the keys of either, and what base itself counts. The paper's eps and delta are
    0.05 to 0.25, its base the 2 to 10 % of keys of largest score.
    """

    name: ClassVar[str] = "vattention"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    base: SparsePolicy
    eps: float = 0.05
    delta: float = 0.05
    sinks: int = 128
    local: int = 128
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_selector(self.base)
        check_least(0, sinks=self.sinks, local=self.local, seed=self.seed)
        check_share(rate=self.rate)
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}: expected a relative error above 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}: expected a probability in (0, 1)")

    def check(self, config: ModelConfig) -> None:
        self.base.check(config)

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        """The exact keys alone: how many others are read depends on the values."""
        return TokenSelection(self._exact(q, k, view)[0][:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        exact, read = self._exact(q, k, view)
        others = view.visible(slice(0, 1), k.shape[1], q.device) & ~exact
        first, second = self.samples(q, k, v, view, exact, others)
        times = (others.sum(-1) / second.sum(-1).clamp(min=1))[:, None]
        bias = torch.where(second, times, 1.0).log()[:, None]  # [H, 1, keys]
        attended = masked_attention(q, k, v, view, TokenSelection((exact | second)[:, None]), bias=bias)
        return replace(attended, estimated=(first & ~second).sum(-1) + read)

    def _exact(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[Tensor, Tensor | int]:
        """Bool (H, keys), and what the base has read to choose them."""
        rows, n_keys = slice(0, 1), k.shape[1]
        base, read = self.base.choose(q, k, view)
        kept = base.mask(rows, n_keys) | NearKeys(view, self.sinks, self.local, q.device).mask(rows, n_keys)
        return (kept & view.visible(rows, n_keys, q.device)).expand(len(q), -1, -1)[:, 0], read

    def samples(
        self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView, exact: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two samples of the others, the first to find how large the second must be: bool (H, keys), like exact and
        others."""
        place = f"{self.seed} {view.layer} {view.key_start + view.query_start}".encode()
        # torch's generator on the CPU reads the low 32 bits of a seed alone: a sum of shifted numbers would lose some
        generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(place))
        heads, n_keys = others.shape
        draws = torch.rand(view.key_start + n_keys, 2, heads, generator=generator, dtype=torch.float64)
        draws = draws[view.key_start :].permute(1, 2, 0).to(q.device)  # a position's, wherever the cache starts
        n = others.sum(-1)
        count = (n * self.rate).ceil().long().clamp(min=2).minimum(n)
        first = top_count(draws[0].masked_fill(~others, -1), count)
        scores = view.scores(q, k, slice(0, 1), k.shape[1])[:, 0]
        count = self.sample_size(scores, v, exact, first, n).clamp(min=count, max=n)
        return first, top_count(draws[1].masked_fill(~others, -1), count)

    def sample_size(self, scores: Tensor, v: Tensor, exact: Tensor, first: Tensor, n: Tensor) -> Tensor:
        """int64 (H,): how many of the n (H,) others a sample needs. scores: (H, keys), of which those in exact or
        first, bool (H, keys), are read. v: (G, keys, D)."""
        known = scores.double().masked_fill(~(exact | first), -torch.inf)
        e = (known - known.amax(-1, keepdim=True)).exp()  # [H, keys]
        values = torch.nn.functional.pad(v.double(), (0, 1), value=1.0)  # the denominator is one channel more
        values = values.repeat_interleave(len(scores) // len(v), 0)  # [H, keys, D + 1]
        count, sample = first.sum(-1, keepdim=True), e * first
        mean = torch.einsum("hk,hkd->hd", sample, values) / count
        total = torch.einsum("hk,hkd->hd", e * exact, values) + n[:, None] * mean
        squares = torch.einsum("hk,hkd->hd", sample.square(), values.square())
        variance = ((squares - count * mean.square()) / (count - 1)).clamp(min=0)
        z = NormalDist().inv_cdf(1 - self.delta / 2)
        sizes = [
            (z * n / self.eps) ** 2 * variance[:, part].sum(-1) / total[:, part].square().sum(-1)
            for part in (slice(0, -1), slice(-1, None))
        ]
        return torch.stack(sizes).nan_to_num(nan=0.0).amax(0).ceil().minimum(n).long()
