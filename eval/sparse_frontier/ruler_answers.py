"""RULER under one way of attending: greedy answers to frozen samples, and RULER's own score of them.

A policy of the prompt acts on all of it, in one forward pass, and the answer is decoded densely. A policy of decoding
acts on the answer and on the prompt's last token, as in the other decoding tasks: every token of the answer is chosen
under the policy, behind a prompt that is prefilled densely.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.common.scoring import Context
from eval.common.subjects import Subject
from eval.generation import Generated, generate
from eval.held_out.texts import HeldOut
from eval.ruler.files import FrozenTask, check_tokenizer, open_frozen, read_manifest
from eval.ruler.tasks import RULER_TASKS, match
from eval.sparse_frontier.config import FrontierConfig
from eval.sparse_frontier.tasks import Scorer, Tasks, entmax_density
from model.checkpoint import CheckpointInfo
from model.policies.policy import Phase, SparsePolicy, use_policy


@dataclass(frozen=True)
class Answers:
    """What was written to the samples of one file. density: share of the visible keys that was read in the phase, mean
    over layers and heads. scores: of each sample, in [0, 1]. texts: end where all that is asked for is there."""

    density: float
    scores: list[float]
    texts: list[str]


def open_wanted(
    config: FrontierConfig, subjects: Sequence[Subject], held_out: HeldOut
) -> tuple[list[FrozenTask], list[str]]:
    """`open_sets` of what the configuration asks for; nothing without config.ruler."""
    if config.ruler is None:
        return [], []
    contexts = [multiple * held_out.base_length for multiple in held_out.plan.multiples]
    checkpoints = [subject.checkpoint for subject in subjects]
    return open_sets(Path(config.ruler), config.ruler_tasks, config.ruler_samples, contexts, checkpoints)


def open_sets(
    folder: Path,
    tasks: Sequence[str],
    samples: int | None,
    contexts: Sequence[int],
    checkpoints: Sequence[CheckpointInfo],
) -> tuple[list[FrozenTask], list[str]]:
    """Files of eval.ruler whose length is one of `contexts`, and notes on what is not there.

    Args:
        tasks: empty for all that the folder has; a named one must be there at one of the contexts.
        samples: most of each file, the first ones; None for all.
        contexts: lengths in tokens.

    Raises:
        FileNotFoundError: RULER was not built there.
        ValueError: no file for these tasks and contexts, a damaged one, or built with another tokenizer.
    """
    manifest = read_manifest(folder)
    check_tokenizer(folder, checkpoints)
    lengths: dict[str, list[int]] = {}
    for one in manifest["files"]:
        lengths.setdefault(one["task"], []).append(one["length"])
    found: list[FrozenTask] = []
    for task in tasks or lengths:
        if task not in lengths:
            open_frozen(folder, task, [])  # raises with the reason
        common = [length for length in contexts if length in lengths[task]]
        if tasks and not common:
            not_built = [one["length"] for one in manifest["left_out"] if one["task"] == task]
            if set(contexts) <= set(not_built):
                open_frozen(folder, task, contexts)  # raises with the reason
            raise ValueError(_no_length(folder, f"{task} at", lengths[task], contexts))
        found += open_frozen(folder, task, common) if common else []
    if not found:
        built = sorted({length for of_task in lengths.values() for length in of_task})
        raise ValueError(_no_length(folder, "samples of", built, contexts))
    notes = [note for length in contexts for note in _missing(manifest, tasks or list(lengths), found, length)]
    return [replace(one, samples=one.samples[:samples]) for one in found], notes


def _no_length(folder: Path, what: str, built: Sequence[int], contexts: Sequence[int]) -> str:
    return (
        f"--ruler {folder} has {what} {_listed(built)} tokens, contexts measured have {_listed(contexts)}: expected "
        f"a common length; build one with python -m eval.ruler --lengths {' '.join(map(str, contexts))}, or set "
        "--base_length and --lengths, its multiples, to one that is there"
    )


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths)) or "no"


def _missing(manifest: dict[str, Any], tasks: Sequence[str], found: Sequence[FrozenTask], length: int) -> Iterator[str]:
    """What is wanted at a length and not found there, with the reason where eval.ruler gave one."""
    there = [one.task for one in found if one.length == length]
    if not there:
        yield f"No RULER samples of {length:,} tokens."
        return
    reasons = {one["task"]: f": {one['reason']}" for one in manifest["left_out"] if one["length"] == length}
    for task in tasks:
        if task not in there:
            yield f"No RULER task {task} at {length:,} tokens{reasons.get(task, '')}."


def write_answers(scorer: Scorer, tokenizer: Tokenizer, frozen: FrozenTask, policy: SparsePolicy | None) -> Answers:
    """Answers every sample, one by one: some policies remember a single prompt. Raises ValueError as generate does."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(sample["prompt"])] for sample in frozen.samples]
    pairs = list(zip(prompts, frozen.samples, strict=True))
    with nullcontext() if policy is None else use_policy(scorer.model, policy, {scorer.phase}) as record:
        bar = tqdm(pairs, desc=f"{scorer.label}, {frozen.task}", leave=False)
        written = [_answer(scorer, tokenizer, frozen.task, prompt, sample["answers"]) for prompt, sample in bar]
    if record is not None:
        density = float(record.density(scorer.phase).mean())
    elif scorer.model.config.attention.is_entmax:
        contexts = [_read(*pair, scorer.phase) for pair in zip(prompts, written, strict=True)]
        tasks = Tasks(scorer.phase, frozen.length, [[context] for context in contexts], [], [], {})
        density = float(entmax_density(scorer.model, tasks, scorer.runtime)[0].mean())
    else:
        density = 1.0
    texts = [tokenizer.decode(one.tokens) for one in written]
    part = RULER_TASKS[frozen.task].part
    scores = [match(text, sample["answers"], part) for text, sample in zip(texts, frozen.samples, strict=True)]
    return Answers(density, scores, texts)


def _answer(
    scorer: Scorer, tokenizer: Tokenizer, name: str, prompt: Sequence[int], answers: Sequence[str]
) -> Generated:
    task, decoding = RULER_TASKS[name], scorer.phase == "decode"

    def complete(tokens: Sequence[int]) -> bool:  # more text cannot change the score
        return match(tokenizer.decode(tokens), answers, task.part) == 1

    with scorer.runtime.precision():
        return generate(
            scorer.model, [prompt], max_new_tokens=task.answer_tokens, eos=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size, stop_when=complete, decode_last_prompt_token=decoding,
            chunk_tokens=scorer.chunk_tokens if decoding else len(prompt),
        )[0]  # fmt: skip


def _read(prompt: Sequence[int], answer: Generated, phase: Phase) -> Context:
    """What the model read, with targets (their ids are not used) at the inputs on which a policy would act."""
    # a last token that ended the text was never fed; an eos did so behind all of answer.tokens
    fed = [] if phase == "prefill" else answer.tokens if answer.ended == "eos" else answer.tokens[:-1]
    tokens = np.array([*prompt, *fed], np.int64)
    targets = np.zeros_like(tokens)
    if phase == "decode":
        targets[: len(prompt) - 1] = -100
    return Context(tokens, targets)
