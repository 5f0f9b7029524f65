"""The LightningModule: network, loss, optimizer. What is logged and saved lives in the callbacks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common.checks import check_number
from model.compiling import share_cores
from model.config import ModelConfig
from model.flash_attention import deactivate, reactivate
from model.flops import forward_flops, train_flops
from model.sequence_parallel import SequenceShards
from model.sparse_attention import collected_auxiliary, freeze_dense
from model.trained_sparse import auxiliary_loss
from model.transformer import Transformer
from training.distributed.engine import engine_of
from training.distributed.sequence_parallel import join_sequence_group
from training.faults.step_guard import StepGuard
from training.step.activations import ActivationCheckpointing, KeepOnHost, tile_feed_forward
from training.step.cuda_graphs import GraphedLoss, check_graphs
from training.step.flash_attention import take_flash_attention
from training.step.float8 import Float8, convert_linears
from training.step.forms import Batch, forms
from training.step.loss import (
    IGNORE_INDEX,
    TeacherHead,
    linear_cross_entropy,
    linear_distillation,
    resolve_loss_backend,
)
from training.step.optim import OptimizerConfig, build_optimizer, parameter_groups, reapply_settings
from training.step.recomputation import checkpoint_blocks
from training.step.teacher import PRODUCTS, DistillConfig, Teacher, check_distillation
from training.tracking import say

NO_TEACHER = DistillConfig()
FlashAttention = Literal["auto", "none"]


class LanguageModule(LightningModule):
    """Next-token training of a Transformer on packed documents.

    The loss of a micro-batch is its sum of token losses divided by the number of its tokens, labelled or not. All
    micro-batches have the same number, so accumulation and averaging over ranks give exactly sum / (tokens of the
    global batch): the gradient does not depend on micro-batch size or world size. Dividing by valid tokens instead
    would weight micro-batches unequally. The logged loss is per valid token.

    Where ranks share sequences, each computes the losses of its own slice, and the same holds: slices are equally long.
    A rank's backward pass also carries the gradients that the others' losses send through the exchange in attention.

    What layers learn from besides (model.trained_sparse.auxiliary_loss) is added, divided by the tokens likewise. With
    a teacher the token loss shares its place with the divergence from the teacher (step/loss.py: linear_distillation),
    whose sum over labelled tokens is divided by the number of all tokens too. The logged loss stays the token loss.

    Args:
        network: architecture.
        optimizer: AdamW or Muon, and the schedule.
        loss_backend: "auto" (liger-kernel on CUDA where installed, else chunked), "liger" or "chunked".
        loss_chunk_tokens: tokens whose logits exist at one time in the chunked loss.
        float8: "none", or how the blocks' linears scale the operands of products in FP8 (step/float8.py): "tensorwise",
            "rowwise" or "rowwise_with_gw_hp". Needs torchao, and with torch.compile only it can be fast.
        flash_attention: "auto" computes softmax attention of training steps by FlashAttention-4 where it is installed
            (pip install -r requirements-flash.txt) and works; "none" by what torch itself has.
        compile: compile each block with torch.compile.
        activation_checkpointing: "none" keeps all activations for backward; "full" each block's input and entmax's
            thresholds, and recomputes the rest; "selective" attention's output too; "offload" is full with the blocks'
            inputs in CPU memory.
        z_loss: coefficient of logsumexp(logits)^2 of each token (PaLM, arXiv 2204.02311), in training only; 0 for none.
            The logged loss is without it.
        mlp_tile_tokens: tokens for which the feed-forward layer's inner activations exist at one time; 0 for all.
        deferred: the network stays on the meta device until the strategy gives it memory and `taken_over` or its
            initial values (ZeroStrategy).
        cuda_graphs: replay forward and backward as CUDA graphs: for small models on one device, whose batches have one
            shape (data.task). The loss backend is the chunked one.
        distill: a frozen teacher's predictions as a target (step/teacher.py); `teacher` has to be set before training.
            The loss backend is the chunked one.

    Raises:
        ValueError: a loss_backend that is unknown or that this machine cannot run, an unknown activation_checkpointing,
            an unknown float8 or one without torchao, an unknown flash_attention, loss_chunk_tokens below 1, z_loss
            outside [0, 1], mlp_tile_tokens below 0, or a teacher beside cuda_graphs or loss_backend liger.
    """

    def __init__(
        self,
        network: ModelConfig,
        optimizer: OptimizerConfig,
        loss_backend: str = "auto",
        loss_chunk_tokens: int = 2048,
        z_loss: float = 0.0,
        float8: Float8 = "none",
        flash_attention: FlashAttention = "auto",
        compile: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        mlp_tile_tokens: int = 0,
        cuda_graphs: bool = False,
        deferred: bool = False,
        distill: DistillConfig = NO_TEACHER,
    ) -> None:
        super().__init__()
        if cuda_graphs and loss_backend == "liger":
            raise ValueError("model.loss_backend is 'liger', which CUDA graphs cannot capture: set it to auto")
        check_distillation(distill, loss_backend=loss_backend, cuda_graphs=cuda_graphs)
        check_number("model.loss_chunk_tokens", loss_chunk_tokens, least=1, whole=True)
        check_number("model.z_loss", z_loss, least=0, most=1, zero="none")
        check_number("model.mlp_tile_tokens", mlp_tile_tokens, least=0, whole=True, zero="all at once")
        for name, value, known in (
            ("activation_checkpointing", activation_checkpointing, get_args(ActivationCheckpointing)),
            ("float8", float8, get_args(Float8)),
            ("flash_attention", flash_attention, get_args(FlashAttention)),
        ):
            if value not in known:
                raise ValueError(f"model.{name} is {value!r}: expected one of {known}")
        self.network_config, self.optimizer_config = network, optimizer
        self.loss_backend, self.loss_chunk_tokens, self.z_loss = loss_backend, loss_chunk_tokens, z_loss
        self.distill = distill
        self.teacher: Teacher | None = None  # no module, hence no part of this one's parameters
        if cuda_graphs or distill.teacher is not None:
            self.loss_backend = "chunked"  # liger waits for the device, and has no such divergence
        self.model, self.float8, self.flash_attention = Transformer(network, deferred), float8, flash_attention
        if network.attention.freezes:
            freeze_dense(self.model)
        self.converted = None if float8 == "none" else convert_linears(self.model.layers(), float8)
        self.taken_over: dict[str, Tensor] = {}  # weights of another run by name, where the model has no memory yet
        # Of the last optimizer step, for the log: before clipping and before the schedule moves on.
        self.step_gradient_norm: Tensor | float = 0.0
        self.step_lr = 0.0
        self.steps_done = 0
        self.suspended = False  # FlashAttention-4, which validation does without
        self.guard: StepGuard | None = None  # looks at each step of train.py's runs before it is taken
        self.sample_ids: list[int] = []  # global samples of the current micro-batch, on the host
        self.shards: SequenceShards | None = None
        self.checkpointing = activation_checkpointing
        self.graphed_loss = GraphedLoss(self.model, self.loss_sum) if cuda_graphs else None
        tile_feed_forward(self.model.layers(), mlp_tile_tokens)
        if activation_checkpointing != "none":
            checkpoint_blocks(self.model.blocks, activation_checkpointing)
        self.compiled, self.forms_compiled = compile, False
        if compile:
            self.model.compile_blocks()

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        self.loss_backend = resolve_loss_backend(self.loss_backend, device)
        self.shards = join_sequence_group(self.trainer.strategy)
        workers = share_cores(self.trainer.num_devices)  # FlexAttention is compiled in eager models too
        if self.compiled:
            say(f"compiling with {workers} processes a rank: the first step takes a minute or more")
        if self.graphed_loss:
            check_graphs(
                self.network_config, device=device, world_size=self.trainer.world_size,
                accumulation=self.trainer.accumulate_grad_batches, mode=self.checkpointing,
            )  # fmt: skip
        if self.teacher is not None:
            tiles, precision = self.model.layers()[0].feed_forward.tile_tokens, str(self.trainer.precision)
            self.teacher.place(device, precision, compile=self.compiled, tile_tokens=tiles)
        deactivate()  # of a run in this process that has failed
        if self.flash_attention == "auto" and not self.graphed_loss and stage == "fit":
            configs = [self.network_config, *([self.teacher.model.config] if self.teacher else [])]
            dtype, ranks = PRODUCTS.get(str(self.trainer.precision)), self.shards.size if self.shards else 1
            take_flash_attention(self.trainer.strategy, configs, dtype, ranks, self.compiled)

    def teardown(self, stage: str) -> None:
        deactivate()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take this rank's slice, and count its share of FLOPs and its valid tokens, while the batch is still on the
        CPU: on the GPU it would synchronise. cu_seqlens and max_seqlen stay those of the whole micro-batch; where every
        document fills a sequence, tokens and labels become (sequences, T) and cu_seqlens None, which dense attention
        kernels are faster with."""
        lengths = batch["cu_seqlens"].diff().tolist()
        flops = train_flops(self.network_config, lengths)
        if self.teacher is not None and self.training:
            flops += forward_flops(self.teacher.model.config, lengths)
        if self.shards is not None:
            flops /= self.shards.size
            batch = {**batch, **{key: self.shards.local_tokens(batch[key], dim=1) for key in ("tokens", "labels")}}
        elif lengths == [batch["max_seqlen"]] * len(lengths):
            rows = {key: batch[key].view(len(lengths), -1) for key in ("tokens", "labels")}
            batch = {**batch, **rows, "cu_seqlens": None}
        valid = int((batch["labels"] != IGNORE_INDEX).sum())
        self.sample_ids = batch["sample_ids"].tolist()
        return {**batch, "flops": flops, "valid_tokens": valid}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.steps_done = self.trainer.global_step
        self.model.set_step(self.steps_done)

    def on_validation_start(self) -> None:
        self.model.set_step(self.trainer.global_step)
        self.suspended = deactivate()

    def on_validation_end(self) -> None:
        if self.suspended:
            reactivate()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        if self.compiled and not self.forms_compiled:
            self._compile_forms(batch)
        sums = self.graphed_loss(batch) if self.graphed_loss else self.loss_sum(batch)
        total, loss_sum, z_sum, kl_sum, auxiliary = sums.unbind()
        loss_sum, tokens = loss_sum.detach(), batch["labels"].numel()
        if self.guard:
            self.guard.observe(loss_sum, batch["valid_tokens"], self.sample_ids, z_sum, kl_sum, auxiliary / tokens)
        besides = auxiliary_loss(self.network_config, auxiliary / tokens, self.steps_done)
        return {"loss": total / tokens + besides, "loss_sum": loss_sum}

    def _compile_forms(self, batch: Batch) -> None:
        """Compile for every form of micro-batch in the first step, on all ranks at once: later one rank's first
        micro-batch of another form would hold up all of them, and each its own."""
        self.forms_compiled = True
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None or data.task.name is not None or self.shards is not None:  # one form
            return
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        for form in forms(batch, data.sequence_length):
            # not backward, whose gradients strategies exchange
            total, *_, auxiliary = self.loss_sum(form).unbind()
            torch.autograd.grad(total + auxiliary, weights, allow_unused=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any] | None:
        if self.guard and self.guard.interruption.cuts_validation(self.trainer):
            return None
        return {"loss_sum": self.loss_sum(batch)[0]}

    def loss_sum(self, batch: Batch) -> Tensor:
        """Of one micro-batch (5,), in nats: what is trained on, summed over labelled tokens, which carries the
        gradient: token losses and, while the module trains, z-loss and the divergence from a teacher; of these the
        token losses, the z-loss and the divergence each, without a gradient; and the sum of what layers learn from
        besides, over tokens and layers, with its gradient and likewise in training alone."""
        if self.compiled and batch["cu_seqlens"] is not None:
            torch._dynamo.maybe_mark_dynamic(batch["cu_seqlens"], 0)  # or the second number of documents compiles again
        teacher = self._teacher_head(batch)  # before there are activations to keep beside its own
        with self._activations(batch["tokens"]), collected_auxiliary(self.model) as auxiliary:
            hidden = self.model(  # (B, T, C)
                batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"], self.shards, self._numbers(batch)
            )
        operands = hidden.flatten(0, 1), self.model.head_weight, batch["labels"].flatten()
        z_loss, chunk = self.z_loss if self.training else 0.0, self.loss_chunk_tokens
        if teacher is not None:
            total, parts = linear_distillation(*operands, teacher, chunk_tokens=chunk, z_loss=z_loss)
        else:
            total, z_sum = linear_cross_entropy(*operands, backend=self.loss_backend, chunk_tokens=chunk, z_loss=z_loss)
            parts = torch.stack([total.detach() - z_sum, z_sum, torch.zeros_like(z_sum)])
        besides = torch.stack(auxiliary).sum().to(total.dtype) if auxiliary else torch.zeros_like(parts[1])
        return torch.stack([total, *parts, besides])

    def _teacher_head(self, batch: Batch) -> TeacherHead | None:
        """What the teacher says of a micro-batch; None without one, and outside of training."""
        if self.distill.teacher is None or not self.training:
            return None
        if self.teacher is None:
            raise RuntimeError("model.distill names a teacher, which is to be loaded (`teacher`) before training")
        hidden = self.teacher.hidden(batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"], self.shards)
        head = self.teacher.model.head_weight
        return TeacherHead(hidden.flatten(0, 1), head, self.distill.weight, self.distill.temperature)

    def _numbers(self, batch: Batch) -> Tensor | None:
        """The place of each token in the run, for kinds that train with noise: int64, as tokens. None for others, and
        for batches that are made up, which are no samples of a run."""
        samples = batch.get("sample_ids")
        if self.network_config.attention.dms is None or not isinstance(samples, Tensor):
            return None
        tokens = batch["tokens"]
        length = tokens.numel() // len(samples)
        return (samples[:, None] * length + torch.arange(length, device=tokens.device)).view(tokens.shape)

    def _activations(self, tokens: Tensor) -> AbstractContextManager[Any]:
        offload = self.checkpointing == "offload"
        return KeepOnHost((*tokens.shape, self.network_config.d_model)) if offload else nullcontext()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = build_optimizer(
            self.model, self.optimizer_config, total_steps=self.trainer.max_steps, fused=self._fused()
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        # The optimizer has been restored by now.
        groups = parameter_groups(self.model, self.optimizer_config, fused=self._fused())
        scheduler = cast(LambdaLR, self.trainer.lr_scheduler_configs[0].scheduler)
        reapply_settings(self.trainer.optimizers[0], scheduler, groups)

    def _fused(self) -> bool:
        # Under float16 a fused step unscales by itself, too late for clipping and for the logged norm.
        return self.trainer.strategy.root_device.type == "cuda" and self.trainer.precision != "16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.step_lr = optimizer.param_groups[0]["lr"]
        engine = engine_of(self.trainer)
        self.step_gradient_norm = norm = engine.gradient_norm()
        if self.guard and not self.guard.admits(self.trainer, engine, norm):
            engine.discard_gradients()
        elif gradient_clip_val:
            engine.clip_gradients(gradient_clip_val, norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        align_batch_counters(checkpoint, self.trainer.accumulate_grad_batches)


def align_batch_counters(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Set Lightning's micro-batch counters in a loaded checkpoint to optimizer steps * accumulation, in place.

    Lightning steps the optimizer when its count of micro-batches is a multiple of the accumulation. A checkpoint of
    another micro-batch size or world size would otherwise resume in the middle of an accumulation.
    """
    micro_batches = checkpoint["global_step"] * accumulation
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    # A run that is extended goes on behind what was its last batch.
    progress["is_last_batch"] = False
    for counts in (progress["total"], progress["current"]):
        # A save in on_train_batch_end counts the last micro-batch as processed and not yet completed.
        counts.update(ready=micro_batches, started=micro_batches, processed=micro_batches, completed=micro_batches - 1)
