"""A checkpoint of this repository as a model of lm-eval (github.com/EleutherAI/lm-evaluation-harness).

Every context starts with <bos>, as in training, unless add_bos_token is false. Continuations are split from their
contexts as lm-eval's own models do it: both are encoded together, and what lies behind the tokens of the context alone
is the continuation.

A request that does not fit the window is never cut: it is either an error, or its sample is noted in `too_long`, the
answer is NaN or an empty text, and who computes scores leaves that sample out and says so (eval/tasks/command.py).
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.common.scoring import Context, Runtime, Scores, score
from eval.generation import GenerationOptions, stream
from model.transformer import Transformer

# of generation_kwargs
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class HarnessModel(LM):
    """Answers lm-eval's three kinds of requests, each batch sorted by length.

    Args:
        model: in eval mode, on the runtime's device.
        window: most tokens of a context with its continuation or its generated text; None for no limit.
        refuse: a request that does not fit is an error; otherwise it is counted in `too_long`.
        add_bos_token: each context starts with <bos>; otherwise only one that would be empty does, and whole texts.
        batch_tokens: as in eval.generation.GenerationOptions.
        seed: of sampled texts.
        label: of the run, for progress bars.

    Attributes:
        too_long: ids of the samples, by task, that have a request which does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        window: int | None,
        refuse: bool,
        add_bos_token: bool,
        batch_tokens: int,
        seed: int,
        label: str,
    ) -> None:
        super().__init__()
        self._device = runtime.device
        self.model, self.codec, self.runtime, self.window = model, tokenizer, runtime, window
        self.refuse, self.add_bos_token = refuse, add_bos_token
        self.batch_tokens, self.seed, self.label = batch_tokens, seed, label
        self.too_long: dict[str, set[int]] = defaultdict(set)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the continuation) of each continuation.

        Raises: ValueError for a continuation without tokens, and with `refuse` for one that does not fit.
        """
        contexts = [self._continuation(request) for request in requests]
        fitting = [index for index, context in enumerate(contexts) if self._fits(requests[index], len(context.tokens))]
        answers = [(math.nan, False)] * len(requests)
        for index, one in zip(fitting, self._score([contexts[i] for i in fitting]), strict=True):
            answers[index] = (-float(one.loss.sum()), bool(one.hit.all()))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of each whole text. A text beyond the window is read in windows that predict every
        token once, each but the first from as much text before it as fits, as lm-eval defines it."""
        windows: list[Context] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            tokens = self.codec.encode(text)
            length = self.window or max(1, len(tokens))
            for before, predicted in map(
                make_disjoint_window, get_rolling_token_windows(tokens, self.codec.bos_id, length, context_len=1)
            ):
                windows.append(_context(before, predicted))
                owners.append(owner)
        answers = [0.0] * len(requests)
        for owner, one in zip(owners, self._score(windows), strict=True):
            answers[owner] -= float(one.loss.sum())
        return answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that follows each context, without the stop string that ended it.

        Raises: ValueError for generation_kwargs that are not understood, and with `refuse` for a context that does not
            fit together with the longest text it asks for.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        for wanted, members in groups.items():
            options = self._options(json.loads(wanted))
            stops = [text for text in options.pop("until") if text]
            prompts = {i: self._begun(self.codec.encode(requests[i].args[0])) for i in members}
            fitting = [i for i in members if self._fits(requests[i], len(prompts[i]) + options["max_new_tokens"])]
            for index, text in zip(fitting, self._generate([prompts[i] for i in fitting], stops, options), strict=True):
                answers[index] = text
        return answers

    def _continuation(self, request: Instance) -> Context:
        context, continuation = request.args
        stem = context.rstrip()  # spaces at the end go with the continuation, where the tokenizer wants them
        stem_tokens = self.codec.encode(stem)
        before = self._begun(stem_tokens)
        start = before[: len(before) - len(stem_tokens)]
        whole = [*start, *self.codec.encode(context + continuation)]
        if len(whole) <= len(before):
            raise ValueError(
                f"task {request.task_name}, sample {request.doc_id}: the continuation {continuation!r} has no token "
                "of its own behind its context"
            )
        return _context(whole[: len(before)], whole[len(before) :])

    def _begun(self, context: list[int]) -> list[int]:
        return [self.codec.bos_id, *context] if self.add_bos_token or not context else context

    def _fits(self, request: Instance, tokens: int) -> bool:
        if self.window is None or tokens <= self.window:
            return True
        task, sample = str(request.task_name), int(request.doc_id or 0)
        if self.refuse:
            raise ValueError(
                f"task {task}, sample {sample}: {tokens} tokens do not fit the window of {self.window}; set a larger "
                "--max_length, or --too_long count to leave out and count such samples"
            )
        self.too_long[task].add(sample)
        return False

    def _score(self, contexts: Sequence[Context]) -> list[Scores]:
        """eval.common.scoring of the contexts, longest first, so that memory runs out early if at all."""
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i].tokens))
        scored = score(self.model, [contexts[i] for i in order], self.runtime, self.label)
        places = np.argsort(order, kind="stable")
        return [scored[place] for place in places]

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Fields of GenerationOptions, and "until"."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        unknown = sorted(set(kwargs) - KNOWN)
        if unknown:
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}: expected some of {', '.join(sorted(KNOWN))}")
        sampling = {"temperature": float(kwargs["temperature"])} if kwargs["do_sample"] else {"temperature": 0.0}
        sampling |= {name: kwargs[name] for name in ("top_p", "top_k") if kwargs["do_sample"] and name in kwargs}
        return {"until": kwargs["until"], "max_new_tokens": kwargs["max_gen_toks"], **sampling}

    def _generate(self, prompts: Sequence[list[int]], stops: Sequence[str], options: dict[str, Any]) -> list[str]:
        def stopped(tokens: Sequence[int]) -> bool:
            text = self.codec.decode(tokens)
            return any(stop in text for stop in stops)

        chosen = GenerationOptions(
            **options,
            seed=self.seed,
            eos=self.codec.eos_id,
            vocab_size=self.codec.vocab_size,
            stop_when=stopped if stops else None,
            chunk_tokens=self.runtime.row_tokens,
            batch_tokens=self.batch_tokens,
        )
        texts: list[list[int]] = [[] for _ in prompts]
        with (
            self.runtime.precision(),
            tqdm(total=len(prompts), desc=self.label, unit="text", leave=False, delay=1) as bar,
        ):
            for piece in stream(self.model, prompts, chosen):
                texts[piece.index] += piece.tokens
                bar.update(piece.ended is not None)
        return [_cut(self.codec.decode(text), stops) for text in texts]


def _context(before: Sequence[int], predicted: Sequence[int]) -> Context:
    """The context that reads `before` and `predicted` but for its last token, and is scored on `predicted`."""
    whole = np.array([*before, *predicted], np.int64)
    targets = whole[1:].copy()
    targets[: len(before) - 1] = -100
    return Context(whole[:-1], targets)


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
