"""What all sparse-attention policies share: what they are told, what they answer, and the attention over it.

    with use_policy(model, StreamingLLM(sinks=4, size=1024)) as record:
        hidden = model(tokens, cu_seqlens)
    record.density("prefill")  # share of the visible keys that was kept, (L, H)

A policy sees one sequence at a time: one document of a packed row, or one row of a cache. It cannot cross documents,
and whatever it selects, a query attends only to keys that are visible to it. Softmax models only: entmax selects its
keys itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kernels.common.stats import count_live_tiles
from kernels.common.visibility import TILE
from model.attention import AttentionMetadata
from model.config import ModelConfig
from model.kv_cache import Extension
from model.override import override_attention
from model.policies.selection import Selection
from model.rotary import rotary_frequencies
from model.transformer import Transformer

Phase = Literal["prefill", "decode"]
PHASES: frozenset[Phase] = frozenset({"prefill", "decode"})
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}  # of one sequence, all heads together: 16 and 512 MiB of float32


@dataclass(frozen=True)
class SequenceView:
    """One sequence as one layer sees it. Query i stands at key query_start + i and sees the keys up to there.

    layer, n_layers: from 0, of how many in the model.
    decoding: one token that continues a cache; False for whole sequences and chunks of a prompt.
    query_start: index of the key that query 0 stands at; the last query stands at the last key.
    key_start: position in the sequence of key 0: 0 but where a window has cut the cache.
    scale: of the scores q . k; temperatures are in q already.
    window: a query sees itself and the window - 1 keys before it; None for all.
    alibi_slopes: float32 (H,) or None; bias -slope * (query - key).
    memory: what the policy keeps of this row and layer from one forward pass to the next; empty where a sequence
        starts. Only sequences in a cache go on.
    frequencies: model.rotary's angle per token of each pair of channels, float32 (D / 2,); None without rotation.
    below: the memory of the layer below for the same sequence, as this forward pass has left it; empty in the first.
    """

    layer: int
    n_layers: int
    decoding: bool
    query_start: int
    key_start: int
    scale: float
    window: int | None
    alibi_slopes: Tensor | None
    memory: dict[str, Any]
    frequencies: Tensor | None = None
    below: dict[str, Any] = field(default_factory=dict)

    def visible(self, rows: slice, n_keys: int, device: torch.device) -> Tensor:
        """Bool (rows, n_keys): which of the first n_keys keys queries rows.start ... rows.stop - 1 may see."""
        distance = self._distance(rows, n_keys, device)
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def scores(self, q: Tensor, k: Tensor, rows: slice, n_keys: int) -> Tensor:
        """Scores of queries `rows` and the first n_keys keys with their bias, float32 (H, rows, n_keys); -inf where not
        visible. q: (H, Tq, D), k: (G, Tk, D)."""
        part = q[:, rows].float().unflatten(0, (len(k), -1))  # [G, H / G, rows, D]
        scores = (part @ k[:, None, :n_keys].float().transpose(-1, -2)).flatten(0, 1) * self.scale
        if self.alibi_slopes is not None:
            scores -= self.alibi_slopes[:, None, None] * self._distance(rows, n_keys, q.device)
        return scores.masked_fill_(~self.visible(rows, n_keys, q.device), -torch.inf)

    def row_blocks(self, q: Tensor, n_keys: int) -> Iterator[slice]:
        """Queries in blocks of multiples of TILE, as many at a time as SCORES_AT_ONCE scores take."""
        heads, n_queries = q.shape[:2]
        rows = max(1, SCORES_AT_ONCE[q.device.type] // (heads * n_keys * TILE)) * TILE
        for start in range(0, n_queries, rows):
            yield slice(start, min(start + rows, n_queries))

    def _distance(self, rows: slice, n_keys: int, device: torch.device) -> Tensor:
        query = torch.arange(rows.start, rows.stop, device=device) + self.query_start
        return query[:, None] - torch.arange(n_keys, device=device)


@dataclass(frozen=True)
class Attended:
    """What attention over a selection gives.

    out: (H, Tq, D). kept: int64 (H,), pairs of a query and a key that was read for it. visible: int64 (), pairs of a
    query and a visible key. live_tiles: int64 (H,), 64 x 64 tiles with a kept pair; total_tiles: int64 (), tiles with a
    visible pair, on the grid of this view's queries and keys. estimated: int64 (H,), what choosing them has read
    besides, of policies that count it, in pairs: a key and its value.
    """

    out: Tensor
    kept: Tensor
    visible: Tensor
    live_tiles: Tensor
    total_tiles: Tensor
    estimated: Tensor | int = 0

    @property
    def read(self) -> Tensor:
        """int64 (H,): pairs that density counts."""
        return self.kept + self.estimated


class SparsePolicy(ABC):
    """Frozen dataclasses with the policy's settings. Subclasses choose keys (`select`), or also change what is computed
    over them (`attend`).

    name: in tables and options.
    phases: where the policy acts; elsewhere attention is dense.
    remembers: it uses view.memory, so that a cache must have one row.
    """

    name: ClassVar[str]
    phases: ClassVar[frozenset[Phase]] = PHASES
    remembers: ClassVar[bool] = False

    def check(self, config: ModelConfig) -> None:  # noqa: B027
        """Raises ValueError for a model that the policy cannot run on."""

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, view: SequenceView) -> Selection:
        """The keys that each query sees; at least one visible key a query. q: (H, Tq, D), k: (G, Tk, D)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
        """Attention over what `choose` keeps. v: (G, Tk, D)."""
        selection, estimated = self.choose(q, k, view)
        return replace(masked_attention(q, k, v, view, selection), estimated=estimated)

    def choose(self, q: Tensor, k: Tensor, view: SequenceView) -> tuple[Selection, Tensor | int]:
        """What `select` keeps, and what it has read for that besides, as in Attended; 0: it is not counted."""
        return self.select(q, k, view), 0

    def faster(self, device: torch.device, config: ModelConfig) -> bool:
        """Whether over whole prompts it skips the work that is not kept, so that its time says something."""
        return False

    def observe(self, q: Tensor, k: Tensor, view: SequenceView) -> None:  # noqa: B027
        """Called in phases where the policy does not act, before dense attention."""


# scores of the selected keys (H, rows, n_keys), -inf elsewhere, and rows -> bool, which weights count as 0 after all
Skip = Callable[[Tensor, slice], Tensor]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: SequenceView,
    selection: Selection,
    skip: Skip | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """Softmax over the selected visible keys, exactly, in float32, a block of queries at a time. Shapes as in
    SparsePolicy; a query without a selected key gets 0.

    skip: drops weights that the softmax has already been normalised with. bias: (H, 1, Tk), added to all scores.
    """
    heads, n_queries, _ = q.shape
    out = torch.empty_like(q)
    counts = torch.zeros(heads + 1, 2, dtype=torch.int64, device=q.device)  # heads, then all that is visible
    for rows in view.row_blocks(q, k.shape[1]):
        n_keys = view.query_start + rows.stop
        seen = view.visible(rows, n_keys, q.device)
        mask = selection.mask(rows, n_keys) & seen
        scores = view.scores(q, k, rows, n_keys).masked_fill_(~mask, -torch.inf)
        if bias is not None:
            scores += bias[..., :n_keys]
        p = torch.softmax(scores, -1).nan_to_num_(0.0)
        if skip is not None:
            skipped = skip(scores, rows)
            p, mask = p.masked_fill_(skipped, 0), mask & ~skipped
        out[:, rows] = weigh(p, v[:, :n_keys]).to(q.dtype)
        for places, shown in ((slice(0, heads), mask), (slice(heads, None), seen[None])):
            counts[places, 0] += shown.sum((-1, -2))
            counts[places, 1] += count_live_tiles(shown, 0)
    return Attended(out, counts[:heads, 0], counts[heads, 0], counts[:heads, 1], counts[heads, 1])


def weigh(p: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values, float32 (H, rows, D). p: (H, rows, keys), v: (G, keys, D)."""
    return (p.unflatten(0, (len(v), -1)) @ v[:, None].float()).flatten(0, 1)


@dataclass
class PolicyRecord:
    """What a policy did, summed over forward passes.

    counts: phase -> int64 (2, L, H + 1): pairs read and live tiles of each head, last the visible ones; phases in which
    it did not act are missing.
    """

    n_layers: int
    n_heads: int
    counts: dict[Phase, Tensor] = field(default_factory=dict)

    def add(self, phase: Phase, layer: int, attended: Attended) -> None:
        if phase not in self.counts:
            shape = (2, self.n_layers, self.n_heads + 1)
            self.counts[phase] = torch.zeros(shape, dtype=torch.int64, device=attended.kept.device)
        self.counts[phase][0, layer] += torch.cat([attended.read.expand(self.n_heads), attended.visible[None]])
        self.counts[phase][1, layer] += torch.cat(
            [attended.live_tiles.expand(self.n_heads), attended.total_tiles[None]]
        )

    def density(self, phase: Phase) -> Tensor:
        """Pairs of query and key read over visible ones, float64 (L, H); above 1 where estimates did not pay. Raises
        ValueError where the policy did not act."""
        return self._share(phase, 0)

    def tile_density(self, phase: Phase) -> Tensor:
        """64 x 64 tiles with a kept pair over those with a visible one, float64 (L, H)."""
        return self._share(phase, 1)

    def _share(self, phase: Phase, row: int) -> Tensor:
        if phase not in self.counts:
            raise ValueError(f"the policy did not act in phase {phase!r}: it acted in {sorted(self.counts)}")
        counts = self.counts[phase][row].double().cpu()
        return counts[:, :-1] / counts[:, -1:]


@contextmanager
def use_policy(
    model: Transformer, policy: SparsePolicy, phases: AbstractSet[Phase] | None = None
) -> Iterator[PolicyRecord]:
    """Inside, the model's attention is the policy's: in forward, and over a cache in `extend` and `prefill`.

    phases: of the policy's, in which it acts; None for all of them.

    Raises: ValueError for a model that is not softmax or another that the policy cannot run on, and where one is in use
    already.
    """
    config, kind = model.config, model.config.attention.kind
    if not config.attention.is_softmax:
        raise ValueError(f"policies prune softmax attention, and this model's kind is {kind!r}: give its softmax twin")
    policy.check(config)
    record = PolicyRecord(config.n_layers, config.n_heads)
    active = policy.phases & (phases or PHASES)
    layers: list[_LayerPolicy] = []
    for i in range(config.n_layers):
        layers.append(_LayerPolicy(policy, i, config, active, record, layers[-1].memories if layers else {}))
    with override_attention(model, layers):
        yield record


class _LayerPolicy:
    """A policy in one layer, over the sequences of each forward pass.

    memories: of each sequence, which are a cache's rows or a forward pass's documents. below: those of the layer below.
    """

    def __init__(
        self,
        policy: SparsePolicy,
        layer: int,
        config: ModelConfig,
        phases: AbstractSet[Phase],
        record: PolicyRecord,
        below: dict[int, dict[str, Any]],
    ) -> None:
        self.policy, self.layer, self.config, self.phases, self.record = policy, layer, config, phases, record
        self.memories: dict[int, dict[str, Any]] = {}
        self.below = below

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, extension: Extension | None
    ) -> Tensor | None:
        """Attention as in model.attention: (B, H, T, D), or None where the layer's own, dense, is wanted."""
        if metadata.exchange is not None:
            raise ValueError("policies do not run where ranks share sequences: evaluate with sequence_parallel 1")
        if extension is not None and len(q) > 1 and self.policy.remembers:
            raise ValueError(
                f"{self.policy.name} remembers one prompt, got a cache of {len(q)} rows: generate one by one"
            )
        decoding = extension is not None and q.shape[2] == 1
        phase: Phase = "decode" if decoding else "prefill"
        out = torch.empty_like(q)
        if extension is None:
            self.memories.clear()  # nothing goes on
        with torch.autocast(q.device.type, enabled=False):  # it would turn the float32 of selection into bfloat16
            for place, (row, queries, keys) in enumerate(sequences(q, k, metadata.cu_seqlens, extension)):
                one = (q[row, :, queries], k[row, :, keys], v[row, :, keys])
                view = self._view(place, decoding, one[0], one[1], metadata.alibi_slopes, extension)
                if phase in self.phases:
                    attended = self.policy.attend(*one, view)
                    out[row, :, queries] = attended.out
                    self.record.add(phase, self.layer, attended)
                else:
                    self.policy.observe(one[0], one[1], view)
        return out if phase in self.phases else None

    def _view(
        self, place: int, decoding: bool, q: Tensor, k: Tensor, slopes: Tensor | None, extension: Extension | None
    ) -> SequenceView:
        query_start = k.shape[1] - q.shape[1]
        key_start = 0 if extension is None else extension.keys.start
        if query_start + key_start == 0:
            self.memories[place] = {}
        memory, below = self.memories.setdefault(place, {}), self.below.get(place, {})
        scale, n_layers, window = q.shape[-1] ** -0.5, self.config.n_layers, self.config.window
        frequencies = None
        if self.config.positions == "rope" and self.layer not in self.config.nope_layers:
            last = torch.tensor(key_start + k.shape[1] - 1, device=k.device)
            frequencies = rotary_frequencies(self.config, last)
        facts = (self.layer, n_layers, decoding, query_start, key_start, scale, window, slopes, memory, frequencies)
        return SequenceView(*facts, below)


def sequences(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, extension: Extension | None
) -> Iterator[tuple[int, slice, slice]]:
    """Batch row, queries and keys of each sequence: documents that are not empty, or rows."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if stop > start:
                yield 0, slice(start, stop), slice(start, stop)
        return
    lengths = None if extension is None or extension.kv_lens is None else extension.kv_lens.tolist()
    for row in range(len(q)):
        yield row, slice(0, q.shape[2]), slice(0, k.shape[2] if lengths is None else lengths[row])
