"""LitGPT's training step, beside ours in benchmarks.train_speed: TinyLlama's shape as `litgpt pretrain` trains it."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_speed import Trial, network, random_batch
from model.flops import train_flops

MODEL = "1b"  # ours of the same shape
NAME = "tiny-llama-1.1b"
VERSION = "0.5.13"


def check_installed() -> None:
    """Raises ValueError where litgpt is not."""
    if find_spec("litgpt") is None:
        raise ValueError(f"--peers litgpt needs the package litgpt, not found here: pip install litgpt=={VERSION}")


class LitGPTTrial(Trial):
    """One model of LitGPT in training, as its pretrain.py runs by default but for autocast, which ours takes too:
    torch.compile of the whole model, its chunked cross-entropy, clipping, fused AdamW.

    longest: tokens of the longest sequence, which its tables of rotary positions hold.
    """

    def __init__(self, longest: int, device: torch.device | None = None) -> None:
        check_installed()
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy

        self.device, self.config = device or torch.device("cuda"), network(MODEL, "softmax")
        self.chunked_cross_entropy = chunked_cross_entropy
        with self.device:
            self.model = GPT(Config.from_name(NAME, block_size=longest))
        self.compiled: Any = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True
        )

    def step(self, batch: dict[str, Any]) -> None:
        """batch: of `batch`."""
        tokens, labels = (batch[key].to(self.device) for key in ("tokens", "labels"))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss: Tensor = self.chunked_cross_entropy(self.compiled(tokens), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def batch(self, tokens: int, length: int) -> dict[str, Any]:
        """Rows of `length` tokens, int64 (sequences, length), and the FLOPs that ours counts for them."""
        lengths = [length] * (tokens // length)
        drawn = random_batch(self.config, tokens, lengths, length)
        rows = {key: drawn[key].view(len(lengths), length) for key in ("tokens", "labels")}
        return {**rows, "flops": train_flops(self.config, lengths)}
