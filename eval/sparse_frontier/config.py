"""Settings and raw results of eval.sparse_frontier."""

from dataclasses import dataclass, field
from typing import Any, Literal

from eval.common.options import check_least, check_most
from eval.common.provenance import Provenance
from eval.held_out.config import EvalConfig
from eval.ruler.tasks import RULER_TASKS
from model.policies.families import FAMILIES
from model.policies.policy import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class FrontierConfig:
    """What is measured and how much of it.

    Args:
        policies: Names of model/policies/families.py.
        densities: Shares of the visible keys that each policy is set to keep, besides the entmax model's own.
        thresholds: File of eval.calibrate for the softmax checkpoint: adds the policy bsfa at the density of each of
            its ks.
        patterns: File of eval.search_patterns for the softmax checkpoint: adds the policy minference.
        ruler: Folder of python -m eval.ruler: adds its samples whose length is that of a measured context.
        ruler_tasks: Names of eval.ruler.tasks.RULER_TASKS; empty for all that the folder has.
        ruler_samples: Most samples of each RULER task and length, the first ones; None for all.
        lengths: Context lengths to measure, as multiples of the training length; each divides the next.
        base_length: Length in tokens that counts as 1x. None takes the checkpoints' training length.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
        seed: Seed of every choice of documents, windows and needles.
        max_documents: Most documents scored at every length; below 5 there are no intervals.
        decode_tokens: Tokens at the end of each context that are decoded one by one under decoding policies.
        needle_samples: Most needle samples in each cell of length and depth.
        needle_tokens: Most tokens of needle contexts at each length; long ones get fewer samples, at least one a cell.
        needle_depths: Number of needle depths, evenly spread from the start (0) to the end (1).
        needle_digits: Digits of a needle's value.
        needle_count: Needles of a sample with several.
        row_tokens: Most tokens packed into one forward pass; a longer context is a row of its own.
        chunk_tokens: Most prompt tokens of one forward pass before decoding.
        timed_runs: Timed prefills behind each time to the first token; their median is reported.
        processes: Processes that measure policies beside each other, on all GPUs where the device is auto or cuda.
            Each has the model in memory. Times are measured by one alone.
    """

    policies: list[str] = field(default_factory=lambda: list(FAMILIES))
    densities: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.25, 0.5])
    thresholds: str | None = None
    patterns: str | None = None
    ruler: str | None = None
    ruler_tasks: list[str] = field(default_factory=list)
    ruler_samples: int | None = None
    lengths: list[int] = field(default_factory=lambda: [1, 4])
    base_length: int | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    max_documents: int = EvalConfig.max_documents
    decode_tokens: int = 16
    needle_samples: int = EvalConfig.needle_samples
    needle_tokens: int = EvalConfig.needle_tokens
    needle_depths: int = EvalConfig.needle_depths
    needle_digits: int = EvalConfig.needle_digits
    needle_count: int = EvalConfig.needle_count
    row_tokens: int = EvalConfig.row_tokens
    chunk_tokens: int = 8192
    timed_runs: int = 3
    processes: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.policies if name not in FAMILIES]
        if unknown or not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies is {self.policies}: expected different ones of {', '.join(FAMILIES)}")
        wrong = any(not 0 < density <= 1 for density in self.densities)
        if wrong or not self.densities or len(set(self.densities)) < len(self.densities):
            raise ValueError(f"densities is {self.densities}: expected different shares in (0, 1]; 1 is dense")
        strange = [name for name in self.ruler_tasks if name not in RULER_TASKS]
        if strange or len(set(self.ruler_tasks)) < len(self.ruler_tasks):
            raise ValueError(f"ruler_tasks is {self.ruler_tasks}: expected different ones of {', '.join(RULER_TASKS)}")
        if self.ruler is None and (self.ruler_tasks or self.ruler_samples is not None):
            raise ValueError(
                f"ruler_tasks is {self.ruler_tasks} and ruler_samples is {self.ruler_samples}, but ruler is not set: "
                "build RULER with python -m eval.ruler and pass its folder with --ruler"
            )
        check_least(self, {"decode_tokens": 1, "chunk_tokens": 1, "timed_runs": 1, "ruler_samples": 1, "processes": 1})
        check_most(self, {"timed_runs": 1000, "processes": 256})
        self.shared()

    def shared(self) -> EvalConfig:
        """The settings that eval.run has too, for what is shared with it. Raises ValueError as that does."""
        names = (
            "lengths", "base_length", "device", "precision", "seed", "max_documents", "needle_samples", "needle_tokens",
            "needle_depths", "needle_digits", "needle_count", "row_tokens",
        )  # fmt: skip
        return EvalConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Way:
    """One way of attending, in one phase and at one length.

    Args:
        label: The checkpoint's.
        method: A policy's name, or "dense" or "entmax" for the two models as they are.
        multiple, context: The length, in training lengths and in tokens.
        wanted: The density it was set to, of bsfa the one that its k predicts; None for the models as they are.
        policy: With its settings; empty for the models as they are.
    """

    label: str
    method: str
    phase: Phase
    multiple: int
    context: int
    wanted: float | None
    policy: str


@dataclass(frozen=True)
class Cell(Way):
    """Text and needles under one way of attending, before statistics.

    Args:
        density, tile_density: (L, H) shares of visible pairs, and of 64 x 64 tiles, on the text that is scored. Tiles
            are None for entmax in decoding, where they are not counted.
        needle_density: Mean over layers and heads on the needle contexts; None for the models as they are.
        loss, tokens: Of each document, sums over its scored tokens, in nats.
        needles: hits and tokens of each needle sample.
        several: kind -> hits and tokens of each sample with several needles.
        controls: hits and tokens of samples without their needle, at the shortest length; empty for policies.
    """

    density: list[list[float]]
    tile_density: list[list[float]] | None
    needle_density: float | None
    loss: list[float]
    tokens: list[int]
    needles: list[tuple[int, int]]
    several: dict[str, list[tuple[int, int]]]
    controls: list[tuple[int, int]]
    hardware: str
    date: str
    seconds: float


@dataclass(frozen=True)
class RulerCell(Way):
    """One RULER task under one way of attending.

    Args:
        sha256: Of the frozen file.
        density: Share of the visible keys that was read on these samples, in the phase; mean over layers and heads.
        scores: RULER's score of each sample, in [0, 1].
        texts: The answers, each up to where it holds all that was asked for.
    """

    task: str
    sha256: str
    density: float
    scores: list[float]
    texts: list[str]
    hardware: str
    date: str
    seconds: float


@dataclass(frozen=True)
class PrefillTime:
    """Time to the first token of a prompt: seconds of each timed run, after an untimed one. Others as in Cell."""

    label: str
    method: str
    context: int
    wanted: float | None
    policy: str
    seconds: list[float]


@dataclass(frozen=True)
class Study(Provenance):
    """All cells of one comparison, and where the numbers come from. settings: FrontierConfig as a mapping."""

    cells: list[Cell]
    ruler: list[RulerCell]
    times: list[PrefillTime]
    settings: dict[str, Any]
    base_length: int
    documents: int
    subjects: list[str]
    data: str
    data_fingerprint: str
    precision: dict[str, str]
    notes: list[str]
