"""Decoding: one token of each row at a time, by the host or as CUDA graphs.

A step of a small model takes the host longer to launch than the GPU to run. As a graph it is launched at once, which
needs the same memory and the same kernels each time: rows and the slots that they see are rounded up to powers of two,
kv_lens says on the device which slots count. A graph is captured once such a size has come up so often that it pays.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.alpha_entmax.attention import unsupported_by_triton
from model.inference.incremental import cached_pass, extend
from model.kv_cache import Extension, KVCache
from model.transformer import Transformer

FEWEST_KEYS = 256  # slots that a graph sees at least
STEPS_BEFORE_CAPTURE = 5  # of a size: short texts, and rows that end one by one, would not make up for capturing
# rows times slots up to which softmax's fixed steps, which need a mask, were faster too (results/decoding)
SOFTMAX_SLOTS = 2**15


class Decoder:
    """Continues the first b rows of a cache by one token each.

    cuda_graphs: replays CUDA graphs, one for each power of two of rows and of slots, after some steps of that size by
        the host. Capturing one runs its step three times. Autocast is as it was then. None: where decoding by them was
        measured to be faster on a CUDA device: of entmax attention by the kernels every step, of softmax those of at
        most SOFTMAX_SLOTS.

    Attributes: most_slots, rows times slots of the largest step that goes by graphs; 0: none does.

    Raises: ValueError for cuda_graphs true on another device, for a kind of model.trained_sparse, with an attention
        backend that waits for the host, or with policies of model.policies.
    """

    def __init__(self, model: Transformer, cache: KVCache, cuda_graphs: bool | None = None) -> None:
        obstacle = obstacle_to_graphs(model, cache.dtype)
        if cuda_graphs and obstacle is not None:
            raise ValueError(f"cuda_graphs is true, {obstacle}: set it to false")
        self.model, self.cache = model, cache
        self.most_slots: float = 0 if cuda_graphs is False or obstacle is not None else math.inf
        if cuda_graphs is None and not model.config.attention.is_entmax:
            self.most_slots = min(self.most_slots, SOFTMAX_SLOTS)
        self._graphs: dict[tuple[int, int], GraphedStep] = {}
        self._steps: Counter[tuple[int, int]] = Counter()

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """tokens: the next one of each row. Returns hidden states after the final norm, (b, C). Raises ValueError where
        they do not fit."""
        rows = len(tokens)
        self.cache.check_room(rows, 1)
        if self.cache.reserve(rows, 1):
            self._graphs.clear()  # they read the memory that was
        graph = self._graph(tokens)
        if graph is None:
            ids = torch.tensor(tokens, device=self.model.embedding.weight.device)
            return extend(self.model, ids[:, None], self.cache)[:, 0]
        hidden = graph(tokens)
        self.cache.advance(rows, 1)
        return hidden

    def _graph(self, tokens: Sequence[int]) -> "GraphedStep | None":
        """None while a step of this size goes kernel by kernel."""
        if not self.most_slots:
            return None
        size = step_size(self.cache, len(tokens))
        if math.prod(size) > self.most_slots:
            return None
        self._steps[size] += 1
        if self._steps[size] > STEPS_BEFORE_CAPTURE and size not in self._graphs:
            self._graphs[size] = GraphedStep(FixedStep(self.model, self.cache, *size), tokens)
        return self._graphs.get(size)


def obstacle_to_graphs(model: Transformer, dtype: torch.dtype) -> str | None:
    """Why steps of this model with queries of this dtype cannot be captured; None where they can."""
    device, attention = model.embedding.weight.device, model.config.attention
    if attention.is_trained_sparse:
        return f"but attention.kind {attention.kind} decodes kernel by kernel"
    if attention.is_entmax and attention.backend not in ("auto", "triton"):
        return f"which needs attention.backend auto or triton, but it is {attention.backend!r}"
    unsupported = unsupported_by_triton(dtype, model.config.head_size, device) if attention.is_entmax else None
    if unsupported is not None:
        return f"which needs the Triton backend, but that {unsupported}"
    if any(block.attention.override is not None for block in model.layers()):
        return "but the model attends by a policy of model.policies"
    if device.type != "cuda":
        return f"which needs a CUDA device, but the model is on {device}"
    return None


def step_size(cache: KVCache, rows: int) -> tuple[int, int]:
    """Rows and slots of the fixed step that continues the first `rows` rows: powers of two, where there are so many.

    Further rows of the step compute something that nobody asks for, and write it behind the tokens that they hold.
    Where one of them is full, the step has no further rows.
    """
    n_rows = min(_power_of_two(rows), len(cache.lengths))
    if any(length == cache.slots for length in cache.lengths[rows:n_rows]):
        n_rows = rows
    n_keys = max(FEWEST_KEYS, _power_of_two(max(cache.lengths[:n_rows]) + 1))
    return n_rows, min(n_keys, cache.slots)


def _power_of_two(n: int) -> int:
    """The first one from n on."""
    return 1 << (n - 1).bit_length()


class FixedStep:
    """One token of each of the first n_rows rows of a cache, over its first n_keys slots: the same tensors and, but for
    the values in them, the same work each time. Does not count the tokens (`KVCache.advance`)."""

    def __init__(self, model: Transformer, cache: KVCache, n_rows: int, n_keys: int) -> None:
        self.model, self.cache, self.n_keys = model, cache, n_keys
        device = model.embedding.weight.device
        self.tokens, self.position = (torch.zeros(n_rows, 1, dtype=torch.int64, device=device) for _ in range(2))

    def load(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the rows in use, which are the first ones."""
        self.tokens[: len(tokens), 0] = torch.tensor(tokens)
        self.position[:, 0] = torch.tensor(self.cache.lengths[: len(self.position)])

    def run(self) -> Tensor:
        """Hidden states, (n_rows, C)."""
        kv_lens = (self.position[:, 0] + 1).int()
        extension = Extension(self.position, None, slice(0, self.n_keys), kv_lens)
        layers = self.cache.layers(len(self.position), extension)
        return cached_pass(self.model, self.tokens, extension, layers)[:, 0]


class GraphedStep:
    """A fixed step, captured. tokens: of the first one, which capturing runs several times: it writes the same keys."""

    def __init__(self, step: FixedStep, tokens: Sequence[int]) -> None:
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        step.load(tokens)
        cast = torch.get_autocast_dtype("cuda")
        # the cache of casted weights ends with the autocast around, a replay may come later
        with torch.autocast("cuda", dtype=cast, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # what is compiled or allocated once
                    step.run()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._hidden = step.run()

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """(b, C), b of `tokens`."""
        self._step.load(tokens)
        self._graph.replay()
        return self._hidden[: len(tokens)].clone()  # the next step overwrites it
