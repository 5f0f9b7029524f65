"""Evaluation while a run trains: a small held-out set every few steps, in the run's own log.

Named by class_path in YAML (configs/eval/during_training.yaml); nothing of the training code knows it.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm import tqdm

from data.store import TokenStore
from data.tokenizer import load_tokenizer
from eval.common.scoring import Context, NotFinite, Runtime, score, shifted
from eval.held_out.attention_profile import LayerProfile, profile_document
from eval.held_out.config import EvalConfig
from eval.held_out.needle import build_samples, context_of
from eval.held_out.perplexity import PerplexityPlan, length_windows, plan_perplexity
from model.flash_attention import suspended
from model.transformer import Transformer

LENGTHS = [1, 2, 4]
DEFAULTS = EvalConfig()
ATTENTION = ("support", "live_share", "entropy", "relative_entropy", "sink_share")


class CallbackConfig(EvalConfig):
    """As options of the callback, in a config of train.py."""

    @staticmethod
    def option(name: str) -> str:
        length = " (null: data.sequence_length)" * (name == "base_length")
        return f"{name} of HeldOutEvaluation in trainer.callbacks{length}"


@dataclass(frozen=True)
class HeldOutSet:
    """What is measured each time.

    Args:
        perplexity, needles: Contexts by metric name.
        profiled: (multiple, document) of each context whose attention is profiled.
    """

    store: TokenStore
    plan: PerplexityPlan
    perplexity: dict[str, list[Context]]
    needles: dict[str, list[Context]]
    profiled: list[tuple[int, int]]

    def tally(self) -> "Tally":
        profiled = dict.fromkeys(multiple for multiple, _ in self.profiled)
        attention = [f"{field}_{multiple}x" for multiple in profiled for field in ATTENTION]
        return Tally([*self.perplexity, *self.needles, *attention])


class Tally:
    """Sums and counts by metric name; ranks that have the same names add theirs up."""

    def __init__(self, names: Sequence[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}
        self.sums = torch.zeros(len(names), 2, dtype=torch.float64)

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[self.place[name]] += torch.tensor([total, count], dtype=torch.float64)

    def means(self, sums: Tensor) -> dict[str, float]:
        totals, counts = sums.T.tolist()
        return {name: totals[i] / counts[i] if counts[i] else math.nan for name, i in self.place.items()}


class HeldOutEvaluation(Callback):
    """Logs perplexity, needle accuracy and attention by context length every few steps and at the end of the run.

    Metrics, M a multiple of the training length: eval/perplexity_Mx, of the same tokens at every M; eval/needle_Mx, the
    share of needle tokens that are right, and eval/needle_chance; eval/support_Mx, eval/live_share_Mx, eval/entropy_Mx,
    eval/relative_entropy_Mx and eval/sink_share_Mx, means over layers and heads (eval/held_out/attention_profile.py).

    A step is evaluated when the next one begins, so that it is saved before, and a run that is told to stop does not
    evaluate first. The ranks divide the contexts among them and add up; where ranks share sequences in training, here
    each context runs whole on one rank. Training is not disturbed: weights, random states and the data's position stay
    as they are, bit by bit, and the time does not count as training's. The watchdog counts each layer of each
    forward pass as progress. A run that is told to stop leaves an evaluation,
    logs nothing of it, and ends after one more step.

    Args:
        every_n_steps: optimizer steps between evaluations.
        data: prepared corpus with a heldout split, of the run's tokenizer; null for the run's first source.
        base_length: tokens of 1x; null for data.sequence_length.
        lengths, seed, max_documents, needle_samples, needle_tokens, needle_depths, needle_digits, profile_documents,
            profile_queries, sink_tokens, row_tokens: as of python -m eval.run, whose defaults they share but for
            smaller numbers.

    Raises:
        ValueError, FileNotFoundError: before training starts, for data that do not fit, and under ZeRO stage 3.
    """

    def __init__(
        self,
        every_n_steps: int,
        data: str | None = None,
        base_length: int | None = None,
        lengths: list[int] = LENGTHS,
        seed: int = DEFAULTS.seed,
        max_documents: int = 2,
        needle_samples: int = 1,
        needle_tokens: int = DEFAULTS.needle_tokens,
        needle_depths: int = 3,
        needle_digits: int = DEFAULTS.needle_digits,
        profile_documents: int = DEFAULTS.profile_documents,
        profile_queries: int = 32,
        sink_tokens: int = DEFAULTS.sink_tokens,
        row_tokens: int = DEFAULTS.row_tokens,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps of HeldOutEvaluation is {every_n_steps}: expected at least 1")
        self.every_n_steps, self.data = every_n_steps, data
        self.config = CallbackConfig(
            lengths=lengths, base_length=base_length, seed=seed, max_documents=max_documents,
            needle_samples=needle_samples, needle_tokens=needle_tokens, needle_depths=needle_depths,
            needle_digits=needle_digits, profile_documents=profile_documents, profile_queries=profile_queries,
            sink_tokens=sink_tokens, row_tokens=row_tokens,
        )  # fmt: skip
        self.evaluated_step = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if getattr(trainer.strategy, "zero_stage_3", False):
            if not trainer.is_global_zero:
                raise SystemExit  # without a code, which launchers take for a crash: rank 0 says it
            raise ValueError(
                "parallel.zero_stage is 3, whose ranks hold parts of each weight: HeldOutEvaluation needs whole ones; "
                "use stage 0, 1 or 2, or evaluate checkpoints with python -m eval.run"
            )
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.data is None and not source.sources:
            raise ValueError("data of HeldOutEvaluation is null and the run has no data.sources: name a corpus")
        folder = Path(self.data or source.sources[0].path)
        self.held_out = open_held_out_set(folder, source.tokenizer_fingerprint, source.sequence_length, self.config)
        if not pl_module.network_config.attention.has_profile:
            self.held_out = replace(self.held_out, profiled=[])
        for note in self.held_out.plan.notes if trainer.is_global_zero else []:
            tqdm.write(f"HeldOutEvaluation: {note}", file=sys.stderr)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_step == self.evaluated_step:
            return  # a later micro-batch of the same step
        self.evaluated_step = trainer.global_step
        with _clock_paused(trainer), undisturbed(module), trainer.precision_plugin.forward_context():
            module.model.set_step(trainer.global_step)  # alpha as of this step, where it is annealed
            runtime = Runtime(trainer.strategy.root_device, None, self.config.row_tokens)
            place = (trainer.global_rank, trainer.world_size)
            measured = unless_told_to_stop(
                trainer, module.model, lambda: measure(module.model, self.held_out, self.config, runtime, *place)
            )
            tally = measured or self.held_out.tally()
            cut = torch.full((1, 2), float(measured is None), dtype=torch.float64)
            sums = torch.cat([tally.sums, cut])
            total: Any = trainer.strategy.reduce(sums.to(runtime.device), reduce_op="sum")
        if total[-1, 0] > 0:
            if trainer.is_global_zero:
                tqdm.write(f"step {trainer.global_step}: told to stop, so its evaluation is not finished", sys.stderr)
            return
        metrics = finished(tally.means(total[:-1]))
        for logger in trainer.loggers:
            try:
                logger.log_metrics(metrics, step=trainer.global_step)
            except OSError as error:  # a full disk does not end the run
                tqdm.write(f"warning: evaluation of step {trainer.global_step} is not written: {error}", sys.stderr)
        if trainer.is_global_zero:
            tqdm.write(f"step {trainer.global_step}: {one_line(metrics)}", file=sys.stderr)


def open_held_out_set(folder: Path, fingerprint: str, sequence_length: int, config: EvalConfig) -> HeldOutSet:
    """Raises FileNotFoundError or ValueError for a folder without held-out text, or of another tokenizer."""
    store = TokenStore(folder / "heldout")
    if store.fingerprint_of_tokenizer != fingerprint:
        raise ValueError(
            f"{folder} was prepared with tokenizer {store.fingerprint_of_tokenizer[:12]}, the run trains with "
            f"{fingerprint[:12]}: HeldOutEvaluation needs a corpus of the run's tokenizer"
        )
    length = config.base_length or sequence_length
    plan = plan_perplexity(store, length, config)
    perplexity = {
        f"perplexity_{multiple}x": [
            shifted(store.document(window.document), window.start, window.stop)
            for window in length_windows(plan.documents, multiple, plan.multiples[-1], length)
        ]
        for multiple in plan.multiples
    }
    needles: dict[str, list[Context]] = {}
    for sample in build_samples(store, load_tokenizer(store.tokenizer_path), length, plan.multiples, config)[0]:
        name = "needle_chance" if sample.depth is None else f"needle_{sample.multiple}x"
        needles.setdefault(name, []).append(context_of(sample))
    documents = plan.documents[: config.profile_documents]
    return HeldOutSet(store, plan, perplexity, needles, [(m, d) for m in plan.multiples for d in documents])


def measure(
    model: Transformer, held_out: HeldOutSet, config: EvalConfig, runtime: Runtime, rank: int, world_size: int
) -> Tally:
    """This rank's share of all contexts; a loss that is not finite makes its metric NaN."""
    tally = held_out.tally()
    for name, contexts in (held_out.perplexity | held_out.needles).items():
        try:
            for one in score(model, contexts[rank::world_size], runtime):
                value = one.loss if name in held_out.perplexity else one.hit
                tally.add(name, float(value.sum()), len(value))
        except NotFinite:
            tally.add(name, math.nan, 1)
    for multiple, document in held_out.profiled[rank::world_size]:
        layers = profile_document(model, held_out.store, document, multiple, held_out.plan.base_length, config, runtime)
        for field in ATTENTION:
            tally.add(f"{field}_{multiple}x", head_mean(layers, field), 1)
    return tally


def head_mean(layers: Sequence[LayerProfile], field: str) -> float:
    """Mean over layers and heads."""
    values = [value for layer in layers for value in getattr(layer, field)]
    return sum(values) / len(values)


def finished(means: dict[str, float]) -> dict[str, float]:
    """The metrics as logged: losses become perplexities, at most exp(700)."""
    return {
        f"eval/{name}": math.exp(min(value, 700)) if name.startswith("perplexity") else value
        for name, value in means.items()
    }


def one_line(metrics: dict[str, float]) -> str:
    """Perplexity and needles, for the terminal."""
    wanted = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    perplexity = [f"{name.split('_')[1]} {value:.2f}" for name, value in wanted.items() if "perplexity" in name]
    needles = [f"{name.split('_')[1]} {100 * value:.0f} %" for name, value in wanted.items() if "needle" in name]
    return f"held-out perplexity {', '.join(perplexity)}; needle tokens right {', '.join(needles)}"


class _ToldToStop(Exception):
    pass


def unless_told_to_stop(trainer: Trainer, model: Transformer, work: Callable[[], Tally]) -> Tally | None:
    """What the work gives, which runs the model often; None where this process is told to stop meanwhile. The run is
    told of each layer, so that a long evaluation is not taken for one that hangs."""

    def note(*_: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (progress := getattr(callback, "progress", None)) is not None:
                progress.note("evaluating", trainer.global_step)
        if any(getattr(callback, "requested", False) is True for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise _ToldToStop

    hooks = [block.attention_norm.register_forward_pre_hook(note) for block in model.layers()]
    try:
        return work()
    except _ToldToStop:
        return None
    finally:
        for hook in hooks:
            hook.remove()


def _clock_paused(trainer: Trainer) -> AbstractContextManager[Any]:
    """Stops the clock that the run's speed is measured by, where one of its callbacks has one."""
    clocks = [clock for callback in trainer.callbacks if (clock := getattr(callback, "clock", None))]  # type: ignore[attr-defined]
    return clocks[0].paused() if clocks else nullcontext()


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """No gradients, evaluation mode, no compilation, and afterwards modes and random states as before."""
    training, blocks = module.training, module.model.layers()
    compiled = [block._compiled_call_impl for block in blocks]
    with isolate_rng(), torch.no_grad(), suspended():
        module.eval()
        for block in blocks:
            block._compiled_call_impl = None  # else compiled anew for the lengths of these contexts
        try:
            yield
        finally:
            for block, call in zip(blocks, compiled, strict=True):
                block._compiled_call_impl = call
            module.train(training)
