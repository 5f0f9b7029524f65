"""What is logged during training, and the progress shown meanwhile."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from common.checks import check_number, check_numbers
from data.datamodule import PackedDataModule
from model.attention_stats import attention_stats
from model.flops import peak_flops
from training.distributed.engine import engine_of
from training.faults.step_guard import StepGuard
from training.module import LanguageModule
from training.resume.start_point import StartPoint
from training.throughput import StepClock, Work, peak_memory_gib, speed_metrics
from training.tracking import say


@dataclass
class StatsConfig:
    """Statistics of entmax attention on a piece of the current batch, and of gradients.

    Args:
        every_n_steps: optimizer steps between them; 0 for never.
        layers: how many layers, evenly spread from the first to the last.
        tokens: length of the piece, taken from the batch's start.
    """

    every_n_steps: int = 100
    layers: int = 4
    tokens: int = 4096

    def __post_init__(self) -> None:
        check_number("stats.every_n_steps", self.every_n_steps, least=0, whole=True, zero="never")
        check_numbers("stats.", self, ("layers", "tokens"), least=1, whole=True)


@dataclass
class ValidationConfig:
    """Loss on the held-out split.

    Args:
        every_n_steps: optimizer steps between validations; 0 for never. trainer.limit_val_batches bounds each one.
    """

    every_n_steps: int = 0

    def __post_init__(self) -> None:
        check_number("validation.every_n_steps", self.every_n_steps, least=0, whole=True, zero="never")


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write one row of metrics at the current optimizer step to every logger. A full disk does not end the run."""
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.global_step)
        except OSError as error:
            say(f"warning: metrics of step {trainer.global_step} could not be written: {error}")


def perplexity(loss: float) -> float:
    return math.inf if loss >= 700 else math.exp(loss)


class MetricsLogger(Callback):
    """Logs loss and speed every trainer.log_every_n_steps optimizer steps.

    train/loss is the mean over the valid tokens of the steps since the last line; skipped ones do not count, and if all
    were skipped it is NaN. train/z_loss, train/distill_kl and train/index_kl, where there is one, are no part of it.
    train/distill_kl is KL(teacher || student) at model.distill.temperature, in nats, the mean over the same tokens.
    train/index_kl is the loss of DSA's indexer, in nats, the mean over tokens and layers. train/evicted is the share of
    tokens that DMS's KV heads evict in training, noise included, train/evicted_target what the last step aimed at.

    Args:
        clock: shared with whoever interrupts training.
        guard: knows each step's loss, over all ranks.
        start: of this session.
    """

    def __init__(self, clock: StepClock, guard: StepGuard, start: StartPoint) -> None:
        self.clock, self.guard, self.start, self.tokens = clock, guard, start, start.tokens
        self.latest: dict[str, float] = {}  # for the progress bar
        self.work = Work()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step
        self.every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        if device.type == "cuda" and device_peak(device, trainer.precision) is None:
            say(
                f"throughput/mfu is not logged: model/flops.py has no peak of {torch.cuda.get_device_name(device)} in "
                f"{trainer.precision}"
            )
        self._reset()

    def _reset(self) -> None:
        self.work, self.loss_sum, self.z_loss_sum, self.kl_sum, self.valid_tokens = Work(), 0.0, 0.0, 0.0, 0.0
        self.auxiliary, self.taken = 0.0, 0
        self.clock.reset()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.work.tokens += batch["labels"].numel()
        self.work.flops += batch["flops"]
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation
        self.step = trainer.global_step
        self.work.steps += 1
        if not self.guard.skipped:
            self.loss_sum += self.guard.outcome.loss_sum
            self.z_loss_sum += self.guard.outcome.z_loss_sum
            self.kl_sum += self.guard.outcome.kl_sum
            self.valid_tokens += self.guard.outcome.valid_tokens
            self.auxiliary += self.guard.outcome.auxiliary
            self.taken += 1
        if self.step % self.every_n_steps == 0 or self.step == trainer.max_steps:
            self._log_window(trainer, pl_module)
            self._reset()

    def _log_window(self, trainer: Trainer, module: LanguageModule) -> None:
        work, device = self.work, trainer.strategy.root_device
        local = torch.tensor([work.tokens, work.flops], dtype=torch.float64, device=device)
        totals = trainer.strategy.reduce(local, reduce_op="sum")
        tokens, flops = totals.tolist()  # waits for the device, so the time below is true
        loss, z_loss, kl = (
            (x / self.valid_tokens if self.valid_tokens else math.nan)
            for x in (self.loss_sum, self.z_loss_sum, self.kl_sum)
        )
        self.tokens += int(tokens)
        data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        passes = data.passes_done(self.start.samples_at(self.step, data.global_batch_size))
        self.latest = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            **({"train/z_loss": z_loss} if module.z_loss else {}),
            **({"train/distill_kl": kl} if module.teacher else {}),
            **self._auxiliary(module),
            "train/lr": module.step_lr,
            "train/grad_norm": float(module.step_gradient_norm),
            "train/tokens": self.tokens,
            "train/skipped_steps": self.guard.history.total,
            **({} if passes is None else {"train/passes": passes}),
            **speed_metrics(
                tokens=tokens, flops=flops, steps=work.steps, seconds=self.clock.seconds(), devices=trainer.world_size,
                peak=device_peak(device, trainer.precision),
            ),
            "memory/peak_gib": peak_memory_gib(device),
            **head_metrics("alpha", module.model.alphas()),
            **head_metrics("ssmax", module.model.temperature_scalars(), module.network_config.n_alibi_heads),
        }  # fmt: skip
        log(trainer, self.latest)

    def _auxiliary(self, module: LanguageModule) -> dict[str, float]:
        network = module.network_config
        mean = self.auxiliary / network.n_layers / self.taken if self.taken else math.nan
        if network.attention.dms is not None:
            target = network.attention.dms.target(module.steps_done)
            return {"train/evicted": mean, "train/evicted_target": target}
        return {} if network.attention.dsa is None else {"train/index_kl": mean}

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.clock.pause()
        self.val_sum = torch.zeros(2, dtype=torch.float64, device=trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is not None:
            self.val_sum[0] += outputs["loss_sum"]
            self.val_sum[1] += batch["valid_tokens"]

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.clock.resume()
        if self.guard.interruption.validation_is_cut:
            say(f"step {trainer.global_step}: told to stop, so this validation was not finished")
            return
        loss_sum, valid_tokens = trainer.strategy.reduce(self.val_sum, reduce_op="sum").tolist()
        loss = loss_sum / max(1, valid_tokens)
        log(trainer, {"val/loss": loss, "val/perplexity": perplexity(loss)})
        say(f"step {trainer.global_step}: validation loss {loss:.4f} over {int(valid_tokens):,} tokens")


def head_metrics(name: str, values: Tensor | None, first: int = 0) -> dict[str, float]:
    """values (L, heads) by layer and head, heads counted from `first` on; nothing for kinds that have none."""
    if values is None:
        return {}
    return {
        f"{name}/layer_{layer:02d}/head_{head:02d}": value
        for layer, heads in enumerate(values.tolist())
        for head, value in enumerate(heads, start=first)
    }


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device for the matrix products of a Trainer precision; None where it is not known."""
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    return peak_flops(torch.cuda.get_device_name(device), dtype)


class AttentionStats(Callback):
    """Logs temperature, support size and live tiles of some layers, from a forward pass over a piece of the batch."""

    def __init__(self, config: StatsConfig, clock: StepClock) -> None:
        self.config, self.clock, self.step = config, clock, -1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every, first = self.config.every_n_steps, self.step == 0
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if every and (first or self.step % every == 0) and pl_module.network_config.attention.has_statistics:
            with self.clock.paused(), trainer.precision_plugin.forward_context():
                log(trainer, self.measure(pl_module, batch))

    def measure(self, module: LanguageModule, batch: dict[str, Any]) -> dict[str, float]:
        """Metrics of the first tokens of this rank's batch.

        Only rank 0's are logged, whose tokens are the batch's first also where ranks share sequences. The others take
        part all the same: an engine that divides weights gathers them on all ranks together.
        """
        tokens, cu_seqlens = first_tokens(batch["tokens"], batch["cu_seqlens"], self.config.tokens)
        stats = attention_stats(module.model, tokens, cu_seqlens)
        metrics: dict[str, float] = {}
        for layer in spread(len(stats), self.config.layers):
            metrics[f"support/layer_{layer:02d}"] = float(stats[layer].support_mean.mean())
            metrics[f"live_tiles/layer_{layer:02d}"] = float(stats[layer].live_share.mean())
            blocks, pairs = stats[layer].live_blocks, stats[layer].pairs_read
            if blocks is not None:
                metrics[f"live_blocks/layer_{layer:02d}"] = float(blocks.mean())
            if pairs is not None:
                metrics[f"pairs_read/layer_{layer:02d}"] = float(pairs.mean())
            mean, largest = stats[layer].temperature, stats[layer].temperature_max
            if mean is not None and largest is not None:
                metrics[f"temperature/layer_{layer:02d}"] = float(mean.mean())
                metrics[f"temperature_max/layer_{layer:02d}"] = float(largest.max())
        return metrics


# what a component of a parameter's name makes it
PARTS = {
    "alpha_raw": "alpha", "temperature": "temperature", "wq": "query_key", "wk": "query_key", "q_norm": "query_key",
    "k_norm": "query_key", "wv": "value_output", "wo": "value_output", "feed_forward": "feed_forward",
    "embedding": "embedding", "head": "embedding", "sparse": "sparse",
}  # fmt: skip


class GradientNorms(Callback):
    """Logs the gradient norm of each kind of parameter (PARTS; "norm" for the rest) before clipping: one kind that
    grows far beyond the others lets clipping shrink the steps of all. With the statistics of attention, since engines
    that divide gradients have to gather them."""

    def __init__(self, config: StatsConfig) -> None:
        self.every_n_steps = config.every_n_steps
        self.squares: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.every_n_steps or (trainer.global_step + 1) % self.every_n_steps:
            return
        for name, norm in engine_of(trainer).gradient_norms().items():
            part = next((PARTS[piece] for piece in name.split(".") if piece in PARTS), "norm")
            self.squares[part] = self.squares.get(part, torch.zeros_like(norm)) + norm**2

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.squares:
            log(trainer, {f"grad_norm/{part}": math.sqrt(float(square)) for part, square in self.squares.items()})
            self.squares = {}


def first_tokens(tokens: Tensor, cu_seqlens: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
    """The first `length` tokens (1, n) of the first row and their document boundaries; the last document is cut."""
    length = min(length, tokens.shape[1])
    if cu_seqlens is None:
        return tokens[:1, :length], None
    end = cu_seqlens.new_tensor([length])
    return tokens[:, :length], torch.cat([cu_seqlens[cu_seqlens < length], end])


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0 .. count - 1, evenly spread, the first and last among them."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


class StepProgress(ProgressBar):
    """Progress in optimizer steps with loss and tokens/s: a bar in a terminal, one line a log interval elsewhere."""

    def __init__(self, metrics: MetricsLogger) -> None:
        super().__init__()
        self.metrics, self.bar, self.enabled = metrics, None, True
        self.shown: dict[str, float] = {}

    bar: "tqdm[Any] | None"

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.enabled = self.enabled and trainer.is_global_zero
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
        if self.metrics.latest and self.metrics.latest is not self.shown:
            self.shown = self.metrics.latest
            loss, speed = self.shown["train/loss"], self.shown["throughput/tokens_per_second"]
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
            else:
                say(f"step {trainer.global_step}/{trainer.max_steps}: loss {loss:.4f}, {speed:,.0f} tokens/s")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
