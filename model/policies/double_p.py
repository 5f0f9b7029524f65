"""Double-P: clusters of keys, some of them attended exactly, some by their centroids."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.common.stats import count_live_tiles
from model.policies.blocks import check_least, check_share, top_share
from model.policies.policy import Attended, Phase, SequenceView, SparsePolicy, weigh
from model.policies.selection import Selection, TokenSelection

DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32


@dataclass(frozen=True)
class Clusters:
    """Clusters of a prompt's keys, of each key/value head, or with ALiBi of each query head (heads: G or H). of_key:
    int64 (heads, prompt), each key's cluster. centroids: float32 (heads, clusters, channels). sizes: float32 (heads,
    clusters), numbers of keys."""

    of_key: Tensor
    centroids: Tensor
    sizes: Tensor

    def means(self, x: Tensor) -> Tensor:
        """float32 (heads, clusters, D), 0 for clusters without keys; x: (heads, prompt, D), of each key."""
        places = self.of_key[..., None].expand_as(x)
        sums = torch.zeros(*self.sizes.shape, x.shape[2], device=x.device).scatter_add_(1, places, x.float())
        return sums / self.sizes[..., None].clamp(min=1)


@dataclass(frozen=True)
class DoubleP(SparsePolicy):
    """Decoding attends to clusters of the prompt's keys (Double-P, arXiv:2602.05191): centroids weighted by the sizes
    of their clusters estimate the attention; the clusters that first reach `coverage` of it take part, those that first
    reach `exact` key by key, the others by their centroid and mean value; the rest of the prompt is dropped. Tokens
    after the prompt are always exact. Dense where both are 1.

    Clusters: k-means (Lloyd's, from evenly spaced keys) of each key/value head's prompt, `cluster` keys on average;
    ALiBi, which the paper's models do not have, counts as the channel of the keys that it amounts to, and clusters are
    of each query head then. The density counts a centroid as one key; estimating costs 1 / cluster of the cache more.
    Simplified: estimates are softmax-normalised over the clusters alone, and generated tokens join no cluster.
    """

    name: ClassVar[str] = "double_p"
    phases: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    remembers: ClassVar[bool] = True
    coverage: float
    exact: float
    cluster: int = 16
    iterations: int = 10

    def __post_init__(self) -> None:
        check_share(coverage=self.coverage, exact=self.exact)
        check_least(1, cluster=self.cluster, iterations=self.iterations)
        if self.exact > self.coverage:
            raise ValueError(
                f"exact is {self.exact}: expected at most coverage, {self.coverage}, of which it is a part"
            )

    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        """The keys that are attended exactly."""
        return TokenSelection(self._choose(q, k, view)[0][:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        exact, scores = self._choose(q, k, view)
        seen = view.visible(slice(0, 1), k.shape[1], q.device)  # [1, keys]
        mask = exact[:, None] & seen
        by_key = view.scores(q, k, slice(0, 1), k.shape[1]).masked_fill_(~mask, -torch.inf)
        p = torch.softmax(torch.cat([by_key, scores[:, None]], -1), -1)
        if "values" not in view.memory:
            clusters = self._clusters(k, view)
            view.memory["values"] = clusters.means(_of_heads(v, clusters)[:, : clusters.of_key.shape[1]])
        values = torch.cat([_of_heads(v, self._clusters(k, view)).float(), view.memory["values"]], 1)
        kept = mask.sum((-1, -2)) + (scores > -torch.inf).sum(-1)
        tiles, total = count_live_tiles(mask, 0), count_live_tiles(seen, 0)
        return Attended(weigh(p, values).to(q.dtype), kept, seen.sum(), tiles, total)

    def _choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[Tensor, Tensor]:
        """Bool (H, keys), attended exactly; float32 (H, clusters), scores of the centroids that stand for their
        clusters, -inf for the others. A cluster that a window cuts is exact."""
        clusters = self._clusters(k, view)
        n_prompt, heads = clusters.of_key.shape[1], len(clusters.of_key)
        repeat = len(q) // heads
        query = q.float().unflatten(0, (heads, repeat))  # [heads, repeat, 1, D]
        centroids = clusters.centroids[:, None, :, : k.shape[2]]
        scores = (query @ centroids.transpose(-1, -2)).flatten(0, 1)[:, 0] * view.scale
        if view.alibi_slopes is not None:  # linear: the mean of the keys' biases
            index = torch.arange(n_prompt, device=k.device).expand(heads, -1)[..., None]
            scores = scores - view.alibi_slopes[:, None] * (view.query_start - clusters.means(index)[..., 0])
        scores = scores + clusters.sizes.log().repeat_interleave(repeat, 0)
        share = scores.softmax(-1)
        taking_part, exact = top_share(share, self.coverage), top_share(share, self.exact)
        if view.window is not None:
            hidden = ~view.visible(slice(0, 1), n_prompt, q.device).expand(heads, -1)
            cut = torch.zeros_like(clusters.sizes).scatter_add_(1, clusters.of_key, hidden.float()) > 0
            exact = exact | (taking_part & cut.repeat_interleave(repeat, 0))
        keys = exact.gather(1, clusters.of_key.repeat_interleave(repeat, 0))
        keys = torch.nn.functional.pad(keys, (0, k.shape[1] - n_prompt), value=True)
        return keys, scores.masked_fill(exact | ~taking_part, -torch.inf)

    def _clusters(self, k: Tensor, view: SequenceView) -> Clusters:
        """Summaries of the prompt, made at the first token that is passed alone."""
        if view.key_start:
            raise ValueError(f"{self.name} clusters whole prompts: not a cache that a window has cut")
        if "clusters" not in view.memory:
            prompt = k[:, : view.query_start].float()
            if view.alibi_slopes is not None:
                prompt = prompt.repeat_interleave(len(view.alibi_slopes) // len(k), 0)
                place = torch.arange(view.query_start, device=k.device)
                channel = view.alibi_slopes[:, None] * place / view.scale
                prompt = torch.cat([prompt, channel[..., None]], -1)
            view.memory["clusters"] = make_clusters(prompt, self.cluster, self.iterations)
        found: Clusters = view.memory["clusters"]
        return found


def _of_heads(x: Tensor, clusters: Clusters) -> Tensor:
    """(G, n, D) -> (heads, n, D)."""
    repeat = len(clusters.of_key) // len(x)
    return x if repeat == 1 else x.repeat_interleave(repeat, 0)


def make_clusters(k: Tensor, size: int, iterations: int) -> Clusters:
    """k-means of each head's keys in n / size clusters, rounded up. k: (heads, n, channels)."""
    n, k = k.shape[1], k.float()
    count = -(-n // size)
    centroids = k[:, torch.arange(count, device=k.device) * size]
    clusters = Clusters(torch.zeros_like(k[..., 0], dtype=torch.int64), centroids, torch.zeros_like(centroids[..., 0]))
    for _ in range(iterations if n else 0):
        of_key = torch.stack([_nearest(*head) for head in zip(k, clusters.centroids, strict=True)])
        sizes = torch.zeros_like(clusters.sizes).scatter_add_(1, of_key, torch.ones_like(k[..., 0]))
        clusters = replace(clusters, of_key=of_key, sizes=sizes)
        moved = torch.where(sizes[..., None] > 0, clusters.means(k), clusters.centroids)  # without keys: it stays
        clusters = replace(clusters, centroids=moved)
    return clusters


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """int64 (n,): the nearest centroid of each key. keys: (n, D), centroids: (clusters, D)."""
    rows = max(1, DISTANCES_AT_ONCE // len(centroids))
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in keys.split(rows)])
