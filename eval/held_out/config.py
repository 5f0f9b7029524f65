"""Settings of an evaluation; every default stands here once."""

from dataclasses import dataclass, field
from typing import Literal

from eval.common.options import check_least, check_most

# More would take memory that nobody has, or go on for ever; needles of a sample have names of their own.
GREATEST = {"needle_depths": 1000, "needle_digits": 100, "needle_count": 32, "needle_samples": 10000}


@dataclass(frozen=True)
class EvalConfig:
    """What is measured and how much of it. The defaults suit two small models on two CPU cores.

    Args:
        lengths: Context lengths to measure, as multiples of the training length; each divides the next.
        base_length: Length in tokens that counts as 1x. None takes the checkpoints' training length.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
        seed: Seed of every choice of documents, windows and needles.
        headline_tokens: Most tokens scored for bits per byte at the training length; when the split holds
            more, a random sample of its windows is scored. 0 scores all.
        max_documents: Most documents scored at every length; below 5 there are no intervals.
        needle_samples: Most needle samples in each cell of length and depth.
        needle_tokens: Most tokens of needle contexts at each length; long ones get fewer samples, at least one a cell.
        needle_depths: Number of needle depths, evenly spread from the start (0) to the end (1).
        needle_digits: Digits of a needle's value.
        needle_count: Needles of a sample with several.
        profile_documents: Documents over which the attention's measures are averaged.
        profile_queries: Most queries of a document whose weights are computed for entropy and sink: one at random of
            each of so many equal stretches.
        sink_tokens: First tokens of a document that count as the sink.
        row_tokens: Most tokens packed into one forward pass; a longer context is a row of its own.
        thresholds: File of eval.calibrate: softmax models attend by Block-Sparse FlashAttention.
        keep_blocks: Which of its ks.
        dual_chunk: Trained length in tokens of softmax models with rotary positions: each is measured once more, with
            Dual Chunk Attention (arXiv:2402.17463) in place of its own.
    """

    lengths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    base_length: int | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    headline_tokens: int = 32768
    max_documents: int = 12
    needle_samples: int = 4
    needle_tokens: int = 10240
    needle_depths: int = 5
    needle_digits: int = 6
    needle_count: int = 4
    profile_documents: int = 1
    profile_queries: int = 64
    sink_tokens: int = 4
    row_tokens: int = 8192
    thresholds: str | None = None
    keep_blocks: int | None = None
    dual_chunk: int | None = None

    def __post_init__(self) -> None:
        if not self.lengths or any(multiple < 1 for multiple in self.lengths):
            raise ValueError(f"lengths is {self.lengths}: expected positive multiples such as 1 2 4 8")
        if len(set(self.lengths)) != len(self.lengths) or self.lengths != sorted(self.lengths):
            raise ValueError(f"lengths is {self.lengths}: expected different multiples in rising order")
        for shorter, longer in zip(self.lengths, self.lengths[1:], strict=False):
            if longer % shorter:
                raise ValueError(
                    f"lengths has {shorter} before {longer}: each must divide the next (1 2 4 8), so that all columns "
                    "score the same tokens"
                )
        if (self.thresholds is None) != (self.keep_blocks is None):
            raise ValueError(
                f"thresholds is {self.thresholds!r} and keep_blocks is {self.keep_blocks!r}: give both, or neither"
            )
        smallest = {
            "headline_tokens": 0, "seed": 0, "max_documents": 2, "needle_samples": 1,
            "needle_tokens": 1, "needle_depths": 2, "needle_digits": 1, "needle_count": 2, "profile_documents": 1,
            "profile_queries": 1, "sink_tokens": 1, "row_tokens": 1, "base_length": 8, "dual_chunk": 8,
        }  # fmt: skip
        check_least(self, smallest)
        check_most(self, GREATEST)

    @staticmethod
    def option(name: str) -> str:
        """A field as users of the command set it, for messages of what is found later."""
        return f"--{name}"
