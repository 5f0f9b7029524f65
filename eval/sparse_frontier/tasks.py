"""What every way of attending is measured on, by scoring whole contexts (prefill) or token by token (decode)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.common.scoring import Context, Runtime, Scores, score, shifted
from eval.held_out.needle import context_of
from eval.held_out.perplexity import length_windows
from eval.held_out.texts import HeldOut
from model.attention_stats import attention_stats
from model.inference.incremental import extend, make_cache, prefill
from model.policies.policy import Phase, PolicyRecord, SparsePolicy, use_policy
from model.transformer import Transformer

CLOSE = 0.05  # relative distance to the wanted density that ends the search for it
TRIES = 12


@dataclass(frozen=True)
class Tasks:
    """Contexts of one length. text: the windows of each document, scored at every token, or in decoding at the last
    ones. needles, controls: with one needle and without it. several: kind -> contexts."""

    phase: Phase
    context: int
    text: list[list[Context]]
    needles: list[Context]
    controls: list[Context]
    several: dict[str, list[Context]]


def make_tasks(held_out: HeldOut, multiple: int, phase: Phase, decode_tokens: int) -> Tasks:
    plan, base = held_out.plan, held_out.base_length
    text: dict[int, list[Context]] = {document: [] for document in plan.documents}
    for window in length_windows(plan.documents, multiple, plan.multiples[-1], base):
        context = shifted(held_out.store.document(window.document), window.start, window.stop)
        if phase == "decode":
            targets = context.targets.copy()
            targets[:-decode_tokens] = -100
            context = replace(context, targets=targets)
        text[window.document].append(context)
    samples = [sample for sample in held_out.samples if sample.multiple == multiple]
    several: dict[str, list[Context]] = {}
    for sample in held_out.multi_samples:
        if sample.multiple == multiple:
            several.setdefault(sample.kind, []).append(sample.context)
    return Tasks(
        phase,
        multiple * base,
        list(text.values()),
        [context_of(sample) for sample in samples if sample.depth is not None],
        [context_of(sample) for sample in samples if sample.depth is None],
        several,
    )


class Scorer:
    """Scores contexts with one model in one phase. A policy acts on whole contexts, or on the tokens that are decoded
    behind a densely prefilled prompt; the prompt ends before the first input that is scored."""

    def __init__(self, model: Transformer, phase: Phase, runtime: Runtime, chunk_tokens: int, label: str) -> None:
        self.model, self.phase, self.runtime = model, phase, runtime
        self.chunk_tokens, self.label = chunk_tokens, label

    def __call__(
        self, contexts: Sequence[Context], policy: SparsePolicy | None
    ) -> tuple[list[Scores], PolicyRecord | None]:
        """The scores, and what the policy did."""
        if policy is None:  # decoding gives what one forward pass gives
            return score(self.model, contexts, self.runtime, self.label), None
        with use_policy(self.model, policy, {self.phase}) as record:
            if self.phase == "prefill":
                return score(self.model, contexts, self.runtime, self.label), record
            bar = tqdm(contexts, desc=self.label, leave=False)
            return [decode(self.model, one, self.runtime, self.chunk_tokens) for one in bar], record


@torch.no_grad()
def decode(model: Transformer, context: Context, runtime: Runtime, chunk_tokens: int) -> Scores:
    """Scores a context whose tokens from the first scored one on are fed one by one, behind a prefilled prompt.

    Raises: ValueError where nothing stands before the first scored token, or the loss is not finite.
    """
    scored = context.targets >= 0
    first = int(np.flatnonzero(scored)[0])
    if first == 0:
        raise ValueError("the first token of a context is scored: decoding needs a prompt before it")
    tokens = torch.from_numpy(context.tokens).to(runtime.device)
    with runtime.precision():
        cache = make_cache(model, 1, len(tokens))
        prefill(model, [context.tokens[:first].tolist()], cache, chunk_tokens)
        steps = [extend(model, tokens[None, place : place + 1], cache)[0] for place in range(first, len(tokens))]
        logits = model.logits(torch.cat(steps)).float().cpu()[scored[first:]]  # [scored, V]
    wanted = torch.from_numpy(context.targets[scored])
    loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    if not bool(loss.isfinite().all()):
        raise ValueError("the model gives a loss that is not finite: it diverged; evaluate an earlier checkpoint")
    return Scores(loss.double().numpy(), (logits.argmax(-1) == wanted).numpy())


def set_density(
    make: Callable[[float], SparsePolicy], density_of: Callable[[SparsePolicy], float], wanted: float
) -> SparsePolicy:
    """The policy on the curve `make` (level in (0, 1], dense at 1) whose density on some text is nearest to `wanted`,
    by bisection of the logarithm of the level."""
    if wanted >= 1:
        return make(1.0)
    low, high, level = 1e-4, 1.0, wanted
    tried: dict[SparsePolicy, float] = {}
    for _ in range(TRIES):
        policy = make(level)
        if policy not in tried:
            tried[policy] = density_of(policy)
        if abs(math.log(tried[policy] / wanted)) < CLOSE:
            return policy
        low, high = (level, high) if tried[policy] < wanted else (low, level)
        level = math.sqrt(low * high)
    return min(tried, key=lambda policy: abs(math.log(tried[policy] / wanted)))


@torch.no_grad()
def entmax_density(model: Transformer, tasks: Tasks, runtime: Runtime) -> tuple[Tensor, Tensor | None]:
    """Shares of visible keys with weight, and in prefill of tiles, each float64 (L, H), over the first window of every
    document: of all its queries, or in decoding of those that are scored."""
    pairs, visible, tiles = [], 0, []
    for windows in tasks.text:
        tokens = torch.from_numpy(windows[0].tokens).to(runtime.device)[None]
        first = int(np.flatnonzero(windows[0].targets >= 0)[0])
        with runtime.precision():
            # causal: what the queries before the scored ones do, a pass over them alone does too
            whole = attention_stats(model, tokens)
            before = attention_stats(model, tokens[:, :first]) if first else []
        kept = torch.stack([one.support_mean.double() * tokens.shape[1] for one in whole])
        kept -= torch.stack([one.support_mean.double() * first for one in before]) if before else 0
        pairs.append(kept.cpu())
        visible += sum(min(place + 1, model.config.window or place + 1) for place in range(first, tokens.shape[1]))
        tiles.append(torch.stack([one.live_share for one in whole]).double().cpu())
    mean_tiles = torch.stack(tiles).mean(0) if tasks.phase == "prefill" else None
    return torch.stack(pairs).sum(0) / visible, mean_tiles


def time_prefill(
    model: Transformer, context: Context, policy: SparsePolicy | None, runtime: Runtime, runs: int
) -> list[float]:
    """Seconds from a prompt to its first token, in one chunk, `runs` times after an untimed one."""

    def once() -> float:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        started = time.perf_counter()
        with runtime.precision():
            hidden = prefill(model, [prompt], make_cache(model, 1, len(prompt)), len(prompt))
            model.logits(hidden).argmax(-1).tolist()  # waits for the device
        return time.perf_counter() - started

    prompt = context.tokens.tolist()
    if policy is None:
        return [once() for _ in range(runs + 1)][1:]
    with use_policy(model, policy):
        return [once() for _ in range(runs + 1)][1:]
