"""Text generation: greedy and sampled, many prompts in batches sorted by length, or one token after another."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eval.common.options import check_least
from model.inference.decoding import Decoder
from model.inference.incremental import make_cache, prefill
from model.transformer import Transformer

RESERVED = 4096  # new tokens that the cache has room for from the start, or as many as the prompt has
Ended = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when a text ends.

    Args:
        max_new_tokens: Most tokens of one text.
        temperature: Divides the logits; 0 takes the likeliest token (the lowest id of equal ones).
        top_k: Only the k likeliest tokens are drawn from; 0 is all.
        top_p: Only the likeliest tokens that together reach this probability, after top_k (arXiv:1904.09751).
        seed: Of the draws. Prompt i has its own stream, so that its text does not depend on the other prompts.
        eos: Token id that ends a text.
        stop: Sequences of token ids that end a text.
        stop_when: Called with the tokens of a text after each new one; if true the text ends ("stop") and keeps
            these tokens: for stop strings, which may end inside a token and be spelled by several sequences.
        vocab_size: Ids from here on are never chosen: for embeddings with more rows than the tokenizer has tokens.
        max_prompt_tokens: Longer prompts are an error; None takes any.
        decode_last_prompt_token: Feed the last token of each prompt behind the others as new tokens are fed, so that
            what acts on decoding (a policy of model/policies) acts on the first new token too.
        chunk_tokens: Most prompt tokens of one forward pass, which bounds the memory of activations.
        batch_tokens: Most tokens of prompts and texts, with padding, that are cached at once; a longer one has a batch
            of its own.
        cuda_graphs: Decode by CUDA graphs (model/inference/decoding.py); None: where that is faster on
            a CUDA device.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos: int | None = None
    stop: Sequence[Sequence[int]] = field(default_factory=tuple)
    stop_when: Callable[[Sequence[int]], bool] | None = None
    vocab_size: int | None = None
    max_prompt_tokens: int | None = None
    decode_last_prompt_token: bool = False
    chunk_tokens: int = 8192
    batch_tokens: int = 65536
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        smallest = {
            "max_new_tokens": 1, "top_k": 0, "seed": 0, "vocab_size": 1, "max_prompt_tokens": 1, "chunk_tokens": 1,
            "batch_tokens": 1,
        }  # fmt: skip
        check_least(self, smallest)
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: expected 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a probability in (0, 1]")
        if any(len(sequence) == 0 for sequence in self.stop):
            raise ValueError(f"stop is {list(self.stop)}: expected sequences of at least one token id")


@dataclass(frozen=True)
class Generated:
    """tokens: without the eos or stop sequence that ended them, if one did."""

    tokens: list[int]
    ended: Ended


@dataclass(frozen=True)
class Piece:
    """What one step adds to the text of prompt `index`: usually one token; none while the last tokens may become a
    stop sequence, several when they did not. ended: None while the text goes on."""

    index: int
    tokens: list[int]
    ended: Ended | None


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any
) -> list[Generated]:
    """The continuation of every prompt, in their order. Arguments and errors as in `stream`; options: further fields of
    GenerationOptions."""
    texts: list[list[int]] = [[] for _ in prompts]
    ended: list[Ended] = ["length"] * len(prompts)
    for piece in stream(model, prompts, GenerationOptions(max_new_tokens, **options)):
        texts[piece.index] += piece.tokens
        ended[piece.index] = piece.ended or ended[piece.index]
    return [Generated(*both) for both in zip(texts, ended, strict=True)]


def stream(model: Transformer, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Iterator[Piece]:
    """Yields what is new of each text as it comes; the texts of one batch advance together.

    Args:
        model: in the precision that is wanted: autocast, if any, stands around the iteration.
        prompts: token ids, with bos where the model is used to it.

    Raises: ValueError for a prompt that is empty, longer than allowed or has ids that the model does not know (before
        anything is computed), and for logits that are not finite.
    """
    vocab_size = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: give at least one token, for example bos")
        if options.decode_last_prompt_token and len(prompt) == 1:
            raise ValueError(f"prompt {index} has one token: decode_last_prompt_token needs one before it, such as bos")
        if options.max_prompt_tokens is not None and len(prompt) > options.max_prompt_tokens:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, max_prompt_tokens is {options.max_prompt_tokens}: shorten "
                "the prompt or allow more"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {index} has token ids outside [0, {vocab_size}), the model's vocabulary")
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches_by_length(lengths, options.max_new_tokens, options.batch_tokens):
        yield from _decode(model, [_Row(index, prompts[index], options) for index in batch], options)


def batches_by_length(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Indices of prompts, longest first, in batches whose padded prompts and texts take at most batch_tokens."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == room:
            batches.append([])
            room = max(1, batch_tokens // (lengths[index] + max_new_tokens))
        batches[-1].append(index)
    return batches


class _Row:
    """One text in progress. shown: how many of its tokens were yielded."""

    def __init__(self, index: int, prompt: Sequence[int], options: GenerationOptions) -> None:
        self.index, self.prompt, self.options = index, prompt, options
        self.random = np.random.default_rng([options.seed, index])
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, token: int) -> Piece:
        self.tokens.append(token)
        ended, end = self._state()
        shown, self.shown = self.shown, max(self.shown, end)
        return Piece(self.index, self.tokens[shown:end], ended)

    def _state(self) -> tuple[Ended | None, int]:
        """Why the text ends here, if it does, and how many of its tokens may be shown."""
        length = len(self.tokens)
        if self.tokens[-1] == self.options.eos:
            return "eos", length - 1
        for sequence in self.options.stop:
            if self._ends_with(sequence):
                return "stop", length - len(sequence)
        if self.options.stop_when is not None and self.options.stop_when(self.tokens):
            return "stop", length
        if length == self.options.max_new_tokens:
            return "length", length
        starts = (list(sequence[:n]) for sequence in self.options.stop for n in range(1, len(sequence)))
        return None, length - max((len(start) for start in starts if self._ends_with(start)), default=0)

    def _ends_with(self, sequence: Sequence[int]) -> bool:
        return self.tokens[-len(sequence) :] == list(sequence)


def _decode(model: Transformer, rows: list[_Row], options: GenerationOptions) -> Iterator[Piece]:
    """rows: longest prompt first."""
    longest = len(rows[0].prompt)
    reserved = longest + max(longest, RESERVED)
    cache = make_cache(model, len(rows), longest + options.max_new_tokens - 1, reserved)
    decoder = Decoder(model, cache, options.cuda_graphs)
    prompts = [row.prompt for row in rows]
    if options.decode_last_prompt_token:
        prefill(model, [prompt[:-1] for prompt in prompts], cache, options.chunk_tokens)
        hidden = decoder([prompt[-1] for prompt in prompts])  # [B, C]
    else:
        hidden = prefill(model, prompts, cache, options.chunk_tokens)
    while True:
        tokens = _choose(model, hidden, rows, options)
        pieces = [row.add(token) for row, token in zip(rows, tokens, strict=True)]
        yield from pieces
        for place in reversed(range(len(pieces))):
            if pieces[place].ended:  # the last row takes its place, so that rows in progress stay the first ones
                if place < len(rows) - 1:
                    cache.copy_row(len(rows) - 1, place)
                    rows[place] = rows[-1]
                rows.pop()
                cache.truncate(len(rows), 0)
        if not rows:
            return
        hidden = decoder([row.tokens[-1] for row in rows])


@torch.no_grad()
def _choose(model: Transformer, hidden: Tensor, rows: Sequence[_Row], options: GenerationOptions) -> list[int]:
    logits = model.logits(hidden)[:, : options.vocab_size].float()  # [B, V]
    if not bool(logits.isfinite().all()):
        raise ValueError("the model gives logits that are not finite: it diverged; use an earlier checkpoint")
    if options.temperature == 0:
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
    uniform = torch.tensor([row.random.random() for row in rows], dtype=torch.float64, device=hidden.device)
    return draw_tokens(logits, uniform, options).tolist()  # type: ignore[no-any-return]


def draw_tokens(logits: Tensor, uniform: Tensor, options: GenerationOptions) -> Tensor:
    """Draws a token of each row by inverting the distribution function, likeliest token first.

    logits: float32 (B, V). uniform: float64 (B,), in [0, 1). Returns int64 (B,).
    """
    size = logits.shape[-1]
    kept, ids = logits.topk(min(options.top_k, size) if options.top_k else size)  # sorted
    p = torch.softmax(kept.double() / options.temperature, dim=-1)
    before = p.cumsum(-1) - p
    cumulative = p.masked_fill(before >= options.top_p, 0).cumsum(-1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place)[:, 0]
