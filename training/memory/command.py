"""The command: train.py's options in, a table out."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.checks import check_number
from common.errors import user_errors
from data.datamodule import check_sizes
from model.config import config_from_dict
from training.cli import TrainingCLI
from training.distributed.config import ParallelConfig
from training.distributed.sequence_parallel import check_sequence_parallel
from training.memory.estimate import Estimate, estimate
from training.memory.setup import Setup
from training.memory.states import parameter_count
from training.options import PRECISIONS, check_trainer_options, count_processes
from training.step.teacher import DistillConfig, check_distillation, find_teacher
from training.throughput import GIB


def report(setup: Setup, found: Estimate) -> str:
    """A table of the estimate."""
    shared = f", {setup.sequence_parallel} share a sequence" * (setup.sequence_parallel > 1)
    lines = [
        f"{parameter_count(setup.network):,} parameters, {setup.local_tokens:,} tokens a rank and micro-batch "
        f"({setup.ranks} ranks{shared}), {setup.precision}, ZeRO stage {setup.zero_stage}, activation checkpointing "
        f"{setup.activation_checkpointing}, loss backend {setup.loss_backend}"
        + f", FP8 {setup.float8}"
        * (setup.float8 != "none"),
        "",
    ]

    def row(name: str, size: float, text: str) -> str:
        return f"  {name:<28}{size / GIB:>9.2f} GiB   {text}"

    lines += [row(name, part.bytes, part.formula) for name, part in found.lasting.items()]
    lines.append("  what is left of them, with what a phase needs itself:")
    lines += [row(f"  {name}", found.during(name), part.formula) for name, part in found.phases.items()]
    lines.append(row("peak per device", found.total, f"in {found.peak_phase}"))
    if found.host:
        lines.append("on the host, per rank:")
        lines += [row(name, part.bytes, part.formula) for name, part in found.host.items()]
    return "\n".join(lines)


class MemoryCLI(TrainingCLI):
    """Parses train.py's options and instantiates nothing."""

    needs_run_dir = False

    def before_instantiate_classes(self) -> None:
        config, data = self.config, self.config.data
        check_trainer_options(config.trainer, self.lightning_defaults(), to_train=False)
        check_sizes(data.sequence_length, data.global_batch_size, data.micro_batch_size)
        check_number("model.loss_chunk_tokens", config.model.loss_chunk_tokens, least=1, whole=True)
        check_number("model.mlp_tile_tokens", config.model.mlp_tile_tokens, least=0, whole=True, zero="all at once")
        network = config_from_dict(config.model.network.as_dict())
        parallel, ranks = config.parallel, count_processes(config.trainer)
        tokens = config.data.micro_batch_size * config.data.sequence_length
        check_sequence_parallel(ParallelConfig(**parallel.as_dict()), network, tokens, ranks)
        distill = DistillConfig(**config.model.distill.as_dict())
        teacher = find_teacher(distill.teacher, network, parallel.sequence_parallel)
        accelerator, backend = config.trainer.accelerator, config.model.loss_backend
        check_distillation(distill, loss_backend=backend, cuda_graphs=config.model.cuda_graphs)
        cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        self.setup = Setup(
            network=network,
            tokens=tokens,
            sequence_length=config.data.sequence_length,
            ranks=ranks,
            sequence_parallel=parallel.sequence_parallel,
            zero_stage=parallel.zero_stage,
            offload_optimizer=parallel.offload_optimizer,
            precision=PRECISIONS[config.trainer.precision],
            activation_checkpointing=config.model.activation_checkpointing,
            mlp_tile_tokens=config.model.mlp_tile_tokens,
            loss_chunk_tokens=config.model.loss_chunk_tokens,
            loss_backend={"auto": "liger" if cuda and not teacher else "chunked"}.get(backend, backend),
            cuda=cuda,
            compiled=config.model.compile,
            float8=config.model.float8,
            optimizer=config.model.optimizer.name,
            asynchronous_saves=config.checkpoint.asynchronous,
            teacher=teacher.architecture if teacher else None,
            keeps_gradients=ranks > 1 or config.data.global_batch_size > config.data.micro_batch_size,
        )

    def instantiate_classes(self) -> None:
        pass


def main() -> None:
    with user_errors(MisconfigurationException):
        setup = MemoryCLI().setup
        print(report(setup, estimate(setup)))
