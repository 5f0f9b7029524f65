"""Decoding: one token of each row at a time, by the host or as CUDA graphs.

A step of a small model takes the host longer to launch than the GPU to run. As a graph it is launched at once, which
needs the same memory and the same kernels each time: rows and the slots that they see are rounded up to powers of two,
kv_lens says on the device which slots count, and a graph is captured when such a size is met first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.cache import Extension, KVCache
from model.incremental import cached_pass, extend
from model.transformer import Transformer

FEWEST_KEYS = 256  # slots that a graph sees at least


class Decoder:
    """Continues the first b rows of a cache by one token each.

    cuda_graphs: replays CUDA graphs. Capturing one runs its step three times, once for each power of two of rows and
        of slots. Autocast is as it was then.

    Raises: ValueError for cuda_graphs on another device, with an attention backend that waits for the host, or with
        policies of model.policies.
    """

    def __init__(self, model: Transformer, cache: KVCache, cuda_graphs: bool = False) -> None:
        if cuda_graphs:
            check_decoding_graphs(model)
        self.model, self.cache, self.cuda_graphs = model, cache, cuda_graphs
        self._graphs: dict[tuple[int, int], GraphedStep] = {}

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """tokens: the next one of each row. Returns hidden states after the final norm, (b, C). Raises ValueError where
        they do not fit."""
        if not self.cuda_graphs:
            ids = torch.tensor(tokens, device=self.model.embedding.weight.device)
            return extend(self.model, ids[:, None], self.cache)[:, 0]
        rows = len(tokens)
        self.cache.check_room(rows, 1)
        size = step_size(self.cache, rows)
        if size not in self._graphs:
            self._graphs[size] = GraphedStep(FixedStep(self.model, self.cache, *size), tokens)
        hidden = self._graphs[size](tokens)
        self.cache.advance(rows, 1)
        return hidden


def check_decoding_graphs(model: Transformer) -> None:
    """Raises ValueError for what a captured step cannot do."""
    device, attention = model.embedding.weight.device, model.config.attention
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graphs is true, which needs a CUDA device, but the model is on {device}: set it to false"
        )
    if attention.is_entmax and attention.backend not in ("auto", "triton"):
        raise ValueError(
            f"cuda_graphs is true, which needs attention.backend auto or triton, but it is {attention.backend!r}: set "
            "it to false"
        )
    if any(block.attention.policy is not None for block in model.layers()):
        raise ValueError("cuda_graphs is true, but the model attends by a policy of model.policies: set it to false")


def step_size(cache: KVCache, rows: int) -> tuple[int, int]:
    """Rows and slots of the fixed step that continues the first `rows` rows: powers of two, where there are so many.

    Further rows of the step compute something that nobody asks for, and write it behind the tokens that they hold.
    Where one of them is full, the step has no further rows.
    """
    n_rows = min(_power_of_two(rows), len(cache.lengths))
    if any(length == cache.max_tokens for length in cache.lengths[rows:n_rows]):
        n_rows = rows
    n_keys = max(FEWEST_KEYS, _power_of_two(max(cache.lengths[:n_rows]) + 1))
    return n_rows, min(n_keys, cache.max_tokens)


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
        """Of the rows in use, the first ones."""
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
