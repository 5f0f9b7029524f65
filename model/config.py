"""What a model is: every architectural choice, with its one default, checked when it is made."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from common.checks import check_number
from model.dms.config import DMSConfig
from model.dsa.config import DSAConfig
from model.hierarchical.config import HierarchicalConfig
from model.nsa.config import BRANCHES, NSAConfig

AttentionKind = Literal["softmax", "ssmax", "entmax", "asentmax", "nsa", "dsa", "dms", "hierarchical"]
Positions = Literal["rope", "nape", "nope"]
NapeSlopes = Literal["linear", "exp"]
RopeScalingKind = Literal["linear", "dynamic", "yarn", "llama3"]

# kinds that choose what to read, each with sizes of its own in the field of AttentionConfig of its name
TRAINED_SPARSE: dict[str, type[NSAConfig] | type[DSAConfig] | type[DMSConfig] | type[HierarchicalConfig]] = {
    "nsa": NSAConfig,
    "dsa": DSAConfig,
    "dms": DMSConfig,
    "hierarchical": HierarchicalConfig,
}
BACKENDS = ("auto", "triton", "torch", "reference")  # of kernels.entmax_attention
NEAREST_TO_SOFTMAX = 1.0001  # nearer, float32 spoils the weights: kernels/common/arguments.py
# Far above any model that trains: a number beyond is a slip.
LARGEST = {
    "vocab_size": 2**24, "n_layers": 1000, "d_model": 2**18, "n_heads": 2**12, "n_kv_heads": 2**12, "d_ff": 2**20,
}  # fmt: skip


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass
class AttentionConfig:
    """How scores become weights.

    Attributes:
        kind: softmax; ssmax (scalable softmax, arXiv:2501.19399: queries scaled by a learnable scalar per head times
            log(2 + position)); entmax (alpha-entmax); asentmax (alpha-entmax with the adaptive temperature of
            arXiv:2506.16640); nsa (Native Sparse Attention, arXiv:2502.11089: softmax over compressed keys, selected
            blocks and a window); dsa (DeepSeek Sparse Attention of DeepSeek-V3.2-Exp: softmax over the tokens that an
            indexer chooses); dms (Dynamic Memory Sparsification, arXiv:2506.05345: softmax over the tokens that a KV
            head has not evicted); hierarchical (entmax over summaries of blocks, softmax over the tokens of those with
            weight).
        alpha: start value of every head; entmax kinds and hierarchical only.
        learn_alpha: one alpha per head is a parameter, kept inside (alpha_min, alpha_max).
        alpha_min, alpha_max: bounds of a learnable alpha.
        anneal_steps, anneal_from: alpha moves linearly from anneal_from to each head's own alpha over the first
            anneal_steps optimizer steps; 0 for no such phase. Near 1 entmax is softmax, so that a softmax checkpoint
            can be turned into an entmax model.
        temperature_offset, temperature_range: delta and the range of the exponent in asentmax's temperature.
        temperature_bias: start value of the bias inside asentmax's softplus. 0: the temperature starts near
            delta + 0.69. Clearly negative: it starts near delta (-5: delta + 0.007), which with delta = 1 is the scale
            of softmax, for weights that were trained with that.
        backend: of kernels.entmax_attention.
        nsa, dsa, dms, hierarchical: sizes of the kind of that name, None for others.
    """

    kind: AttentionKind = "asentmax"
    alpha: float = 1.5
    learn_alpha: bool = True
    alpha_min: float = 1.01
    alpha_max: float = 2.0
    anneal_steps: int = 0
    anneal_from: float = 1.01
    temperature_offset: float = 1.0
    temperature_range: float = 2.0
    temperature_bias: float = 0.0
    backend: str = "auto"
    nsa: NSAConfig | None = None
    dsa: DSAConfig | None = None
    dms: DMSConfig | None = None
    hierarchical: HierarchicalConfig | None = None

    def __post_init__(self) -> None:
        _expect(self.backend in BACKENDS, "attention.backend", self.backend, f"one of {BACKENDS}")
        _expect(self.kind in get_args(AttentionKind), "attention.kind", self.kind, f"one of {get_args(AttentionKind)}")
        _expect(
            NEAREST_TO_SOFTMAX <= self.alpha <= 2,
            "attention.alpha",
            self.alpha,
            f"a number in [{NEAREST_TO_SOFTMAX}, 2] (for softmax set kind: softmax)",
        )
        bounds = (self.alpha_min, self.alpha_max)
        _expect(
            NEAREST_TO_SOFTMAX <= bounds[0] < bounds[1] <= 2,
            "attention.alpha_min, alpha_max",
            bounds,
            f"{NEAREST_TO_SOFTMAX} <= alpha_min < alpha_max <= 2",
        )
        _expect(
            not self.learn_alpha or bounds[0] < self.alpha < bounds[1],
            "attention.alpha",
            self.alpha,
            f"a start strictly inside {bounds} when learn_alpha is true (or set learn_alpha: false)",
        )

        check_number("attention.anneal_steps", self.anneal_steps, least=0, whole=True, zero="never")
        check_number("attention.temperature_offset", self.temperature_offset, least=0, most=1e4)
        check_number("attention.temperature_range", self.temperature_range, least=0, most=16)
        check_number("attention.temperature_bias", self.temperature_bias, least=-1e4, most=1e4)
        _expect(
            NEAREST_TO_SOFTMAX <= self.anneal_from <= 2,
            "attention.anneal_from",
            self.anneal_from,
            f"a number in [{NEAREST_TO_SOFTMAX}, 2]",
        )
        _expect(
            not self.anneal_steps or self.has_alpha,
            "attention.anneal_steps",
            self.anneal_steps,
            f"0 for kind {self.kind}, which has no alpha",
        )
        for kind, sizes in TRAINED_SPARSE.items():
            found = getattr(self, kind)
            _expect(found is None or self.kind == kind, f"attention.{kind}", found, f"none for kind {self.kind}")
            if self.kind == kind and found is None:
                setattr(self, kind, sizes())

    @property
    def is_entmax(self) -> bool:
        """Entmax over every key: what kernels.entmax_attention computes."""
        return self.kind in ("entmax", "asentmax")

    @property
    def is_trained_sparse(self) -> bool:
        """Chooses keys before it weighs them: model.trained_sparse."""
        return self.kind in TRAINED_SPARSE

    @property
    def has_profile(self) -> bool:
        """model.attention_weights knows the weights of a query."""
        return not self.is_trained_sparse or self.has_statistics

    @property
    def has_statistics(self) -> bool:
        """model.attention_stats knows what was read; of softmax over every key it is all."""
        return self.has_alpha or self.kind == "dms"

    @property
    def has_alpha(self) -> bool:
        """Each head has an alpha."""
        return self.is_entmax or self.kind == "hierarchical"

    @property
    def has_adaptive_temperature(self) -> bool:
        """Queries are scaled as arXiv:2506.16640 does."""
        return self.kind == "asentmax" or (self.hierarchical is not None and self.hierarchical.adaptive_temperature)

    @property
    def is_softmax(self) -> bool:
        """Softmax over every key: what policies prune."""
        return self.kind in ("softmax", "ssmax")

    @property
    def scales_queries(self) -> bool:
        """Queries are multiplied by a temperature."""
        return self.kind == "ssmax" or self.has_adaptive_temperature

    @property
    def freezes(self) -> bool:
        """Whether only what model.trained_sparse adds to layers is trained."""
        return self.dsa is not None and self.dsa.freezes

    def annealed(self, step: int) -> float:
        """The share of the way from anneal_from to alpha that `step` optimizer steps have moved."""
        return min(1.0, step / self.anneal_steps) if self.anneal_steps else 1.0


@dataclass
class RopeScaling:
    """Rotary frequencies for contexts longer than the original ones.

    Attributes:
        kind: linear (arXiv:2306.15595: all frequencies divided by factor); dynamic (the base grows with the length of
            the input once it is past original_length; keys in a cache stay as they were); yarn (arXiv:2309.00071) and
            llama3 (Llama 3.1): fast pairs keep their frequency, slow ones are divided by factor, those between are
            interpolated.
        factor: the new length over the original one.
        original_length: tokens of the context that the model was trained for.
        low_turns, high_turns: pairs that turn less often within original_length are slow, more often fast; None: 1
            and, for yarn, 32, for llama3, 4.
        attention_factor: multiplies queries and keys; yarn only. None: 0.1 ln(factor) + 1.
        whole_pairs: yarn's bounds are rounded to whole pairs.
    """

    kind: RopeScalingKind
    factor: float
    original_length: int
    low_turns: float = 1.0
    high_turns: float | None = None
    attention_factor: float | None = None
    whole_pairs: bool = True

    def __post_init__(self) -> None:
        kinds = get_args(RopeScalingKind)
        _expect(self.kind in kinds, "rope_scaling.kind", self.kind, f"one of {kinds}")
        check_number("rope_scaling.factor", self.factor, least=1, most=1e4)
        check_number("rope_scaling.original_length", self.original_length, least=1, whole=True)
        check_number("rope_scaling.low_turns", self.low_turns, above=0)
        check_number("rope_scaling.high_turns", self.fast_turns, above=self.low_turns)
        check_number("rope_scaling.attention_factor", self.attention_factor, above=0, null="0.1 ln(factor) + 1")
        _expect(
            self.attention_factor is None or self.kind == "yarn",
            "rope_scaling.attention_factor",
            self.attention_factor,
            f"none for kind {self.kind}: only yarn has one",
        )

    @property
    def fast_turns(self) -> float:
        """high_turns, or its default."""
        if self.high_turns is not None:
            return self.high_turns
        return 32.0 if self.kind == "yarn" else 4.0


@dataclass
class ModelConfig:
    """A Llama-style decoder (RMSNorm, SwiGLU, grouped-query heads) with a choice of attention and positions.

    Attributes:
        vocab_size: rows of the embedding; at least the tokenizer's.
        n_layers, d_model, n_heads, n_kv_heads, d_ff: layers L, width C, query heads H, key/value heads G, width of
            the feed-forward layer (feed_forward_size where attention.nsa.equal_parameters narrows it).
        head_dim: D; None is d_model / n_heads.
        positions: rope (rotary, rope_base), nape (ALiBi on the first half of the heads, none on the rest;
            arXiv:2506.16640) or nope (none).
        rope_scaling: RopeScaling, None for the frequencies of rope_base as they are.
        nope_layers: layers, counted from 0, without rotary positions though positions is rope (SmolLM3's).
        nape_slopes: ALiBi slopes of nape, linear: 1, 1/2, 1/3, ...; exp: 1, 1/2, 1/4, ...
        qkv_bias: the projections to queries, keys and values have biases (Qwen2's).
        qk_norm: RMSNorm over each query and key head.
        tie_embeddings: the output head is the embedding.
        norm_eps: of every RMSNorm.
        init_std: of the weights; layers that write to the residual stream use init_std / sqrt(2 * n_layers).
        window: sliding window in tokens, None for full causal attention.
    """

    vocab_size: int = 4096
    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ff: int = 688
    head_dim: int | None = None
    positions: Positions = "nape"
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    nope_layers: list[int] = field(default_factory=list)
    nape_slopes: NapeSlopes = "linear"
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    window: int | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            check_number(name, getattr(self, name), least=1, most=most, whole=True)
        check_number("head_dim", self.head_dim, least=1, most=1024, whole=True, null="d_model / n_heads")
        check_number("norm_eps", self.norm_eps, above=0, below=1)
        check_number("init_std", self.init_std, above=0, most=10)
        check_number("rope_base", self.rope_base, above=1)
        check_number("window", self.window, least=1, whole=True, null="full attention")
        _expect(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            "n_heads",
            self.n_heads,
            f"a divisor of d_model = {self.d_model} (or set head_dim)",
        )
        _expect(
            self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads = {self.n_heads}"
        )
        _expect(self.positions in get_args(Positions), "positions", self.positions, f"one of {get_args(Positions)}")
        _expect(
            self.nape_slopes in get_args(NapeSlopes), "nape_slopes", self.nape_slopes, f"one of {get_args(NapeSlopes)}"
        )
        if self.positions == "rope":
            _expect(self.head_size % 2 == 0, "head_dim", self.head_size, "an even number, which rope pairs up")
            dynamic = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
            _expect(not dynamic or self.head_size > 2, "head_dim", self.head_size, "more than 2 for a dynamic scaling")
        else:
            none = f"none for positions {self.positions}"
            _expect(self.rope_scaling is None, "rope_scaling", self.rope_scaling, none)
            _expect(not self.nope_layers, "nope_layers", self.nope_layers, none)
        _expect(
            all(layer in range(self.n_layers) for layer in self.nope_layers)
            and len(set(self.nope_layers)) == len(self.nope_layers),
            "nope_layers",
            self.nope_layers,
            f"layers from 0 to {self.n_layers - 1}, each once",
        )
        if self.positions == "nape":
            _expect(
                self.n_heads % 2 == 0, "n_heads", self.n_heads, "an even number: nape gives ALiBi to half of the heads"
            )
        if self.attention.is_trained_sparse:
            kind = self.attention.kind
            instead = ": set attention.nsa.window" if kind == "nsa" else ""
            _expect(self.window is None, "window", self.window, f"none for attention.kind {kind}{instead}")
            _expect(
                self.feed_forward_size > 0,
                f"attention.{kind}.equal_parameters",
                True,
                f"false: what {kind} adds to a layer has more parameters than feed-forward layers of d_ff = "
                f"{self.d_ff} have",
            )

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_cached_heads(self) -> int:
        """Heads of keys, and of values, that a layer projects to and a cache holds: G, or G for each branch."""
        return self.n_kv_heads * (1 if self.attention.nsa is None else BRANCHES)

    @property
    def n_cached_extra(self) -> int:
        """Numbers that a layer caches of each token besides its keys and values: the index key of dsa; of dms what each
        KV head has decided."""
        if self.attention.dms is not None:
            return self.n_kv_heads
        return 0 if self.attention.dsa is None else self.attention.dsa.index_dim

    @property
    def feed_forward_size(self) -> int:
        """d_ff, or what equal_parameters of nsa and dsa leaves of it: a multiple of 16, which FP8 needs."""
        nsa, dsa, extra = self.attention.nsa, self.attention.dsa, 0
        if nsa is not None and nsa.equal_parameters:
            sizes = self.d_model, self.n_heads, self.n_kv_heads, self.head_size
            extra = nsa.extra_parameters(*sizes, self.qkv_bias)
        if dsa is not None and dsa.equal_parameters:
            extra = dsa.extra_parameters(self.d_model)
        return round((self.d_ff - extra / (3 * self.d_model)) / 16) * 16 if extra else self.d_ff

    @property
    def n_alibi_heads(self) -> int:
        """ALiBi heads come first."""
        return self.n_heads // 2 if self.positions == "nape" else 0


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of dataclasses.asdict(ModelConfig). Raises ValueError on a key that this version does not know."""
    unknown = sorted(set(values) - {f.name for f in fields(ModelConfig)})
    attention, scaling = dict(values.get("attention", {})), values.get("rope_scaling")
    unknown += sorted(f"attention.{k}" for k in set(attention) - {f.name for f in fields(AttentionConfig)})
    for name, sizes in TRAINED_SPARSE.items():
        given = attention.get(name)
        unknown += sorted(f"attention.{name}.{k}" for k in set(given or {}) - {f.name for f in fields(sizes)})
    unknown += sorted(f"rope_scaling.{k}" for k in set(scaling or {}) - {f.name for f in fields(RopeScaling)})
    if unknown:
        raise ValueError(f"unknown model configuration keys {unknown}: written by another version of this code?")
    made = {name: sizes(**attention[name]) for name, sizes in TRAINED_SPARSE.items() if attention.get(name) is not None}
    parts = {
        "attention": AttentionConfig(**{**attention, **made}),
        "rope_scaling": None if scaling is None else RopeScaling(**scaling),
    }
    return ModelConfig(**{**values, **parts})
