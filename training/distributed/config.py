"""How a run is spread over devices: options, and Lightning strategies for one process and for DDP."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from common.checks import check_number
from model.checkpoint import read_complete
from model.loading import StoredTensors
from training.distributed.checkpoint_state import TrainingState, read_state, together, whole_state
from training.distributed.checkpoint_writer import HostCopy, Share, agreed_checksums, begin_copy, take_share
from training.distributed.engine import Engine, PlainEngine

ZERO_PRECISIONS = ("32-true", "bf16-mixed")
STEPS = "optimizer_steps"
# Of gradients and weights that ZeRO moves together; twice this in float32 is allocated.
BUCKET_ELEMENTS = 50_000_000


@dataclass
class ParallelConfig:
    """How a run is spread over the devices that trainer.devices and trainer.num_nodes give it.

    Args:
        sequence_parallel: ranks that share each sequence (Ulysses, arXiv 2309.14509); a divisor of the number of ranks.
        zero_stage: what ZeRO (arXiv 1910.02054) divides among the ranks: 0 nothing (DDP), 1 optimizer state and
            float32 weights, 2 gradients too, 3 the computing weights too.
        offload_optimizer: keep optimizer state and float32 weights in host memory and step there (ZeRO only).
        reduce_dtype: of gradients while they travel between ranks (ZeRO only); they are summed up in float32.
        timeout_minutes: a collective that has not finished after it ends the run.
    """

    sequence_parallel: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_minutes: int = 30

    def __post_init__(self) -> None:
        check_number("parallel.sequence_parallel", self.sequence_parallel, least=1, whole=True)
        check_number("parallel.timeout_minutes", self.timeout_minutes, least=1, most=60 * 24 * 365, whole=True)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}: expected 0, 1, 2 or 3")
        if self.reduce_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"parallel.reduce_dtype is {self.reduce_dtype!r}: expected float32 or bfloat16")
        for name, default in (("offload_optimizer", False), ("reduce_dtype", "float32")):
            if self.zero_stage == 0 and (value := getattr(self, name)) != default:
                raise ValueError(f"parallel.{name} is {value}: it needs parallel.zero_stage 1, 2 or 3")

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)


class ElasticCheckpoints(Strategy):
    """Saves and restores weights and optimizer state by parameter name (state.py), so that a checkpoint fits
    any strategy and any number of processes. Lightning's own file keeps loops, schedules and the data's position."""

    _engine: Engine | None = None
    checksums: dict[str, str] = {}  # of the tensors that were saved last
    copied: Share | None = None  # that is still to be written

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # into engines and optimizers that exist

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def engine(self) -> Engine:
        """The same one for the whole run, once the network is on its device."""
        self._engine = self._engine or PlainEngine(self._network())
        return self._engine

    def training_state(self) -> TrainingState:
        """What this rank holds of weights and optimizer state."""
        return whole_state(self._network(), self.optimizers[0])

    def state_restored(self, steps: Mapping[str, int]) -> None:
        """Take over what was written into the fragments of training_state; steps: by parameter name."""
        for name, parameter in self._network().named_parameters():
            if "step" in (state := self.optimizers[0].state.get(parameter, {})):  # Muon counts none
                state["step"].fill_(steps[name])

    def _network(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self.lightning_module).model)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the state files and Lightning's file into one folder. Raises SaveError, on all ranks alike.

        With a HostCopy as storage_options all is copied there, and `copied` is what this rank has to write of it.
        """
        state, copy = self.training_state(), cast(HostCopy | None, storage_options)
        content = None
        if self.is_global_zero:
            torch.save({**checkpoint, STEPS: state.steps}, buffer := io.BytesIO())
            content = buffer.getvalue()
        share = take_share(Path(filepath).parent, state, self.root_device, content, copy)
        if copy is None:
            self.checksums = agreed_checksums(share.write)
        else:
            self.copied = share

    def begin_copy(self, copy: HostCopy) -> None:
        """Begin to make the room that a save with this HostCopy will need."""
        begin_copy(self.training_state(), self.root_device, copy)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._restored_from = Path(checkpoint_path).parent
        return torch.load(checkpoint_path, map_location="cpu", weights_only=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = self.training_state()
        with together():
            read_state(StoredTensors(read_complete(self._restored_from)), state)
        self.state_restored(checkpoint[STEPS])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        pass  # together with the weights


class OneDevice(ElasticCheckpoints, SingleDeviceStrategy):
    """One process without communication."""


class DataParallelStrategy(ElasticCheckpoints, DDPStrategy):
    """Lightning's DDP, whose samplers divide the data by groups of ranks that share sequences."""

    def __init__(self, config: ParallelConfig, **options: Any) -> None:
        super().__init__(gradient_as_bucket_view=True, timeout=config.timeout, **options)
        self.config = config

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return data_ranks(self.global_rank, self.world_size, self.config.sequence_parallel)


def data_ranks(rank: int, world_size: int, sequence_parallel: int) -> dict[str, int]:
    """num_replicas and rank for the samplers: the neighbouring ranks of a sequence-parallel group count as one."""
    return {"num_replicas": world_size // sequence_parallel, "rank": rank // sequence_parallel}


def check_optimizer(zero_stage: int, optimizer: str) -> None:
    """Raises ValueError for an optimizer that cannot step on ZeRO's pieces of matrices."""
    if zero_stage and optimizer == "muon":
        raise ValueError(
            f"model.optimizer.name is 'muon', which needs whole matrices, and parallel.zero_stage {zero_stage} divides "
            "them: use adamw, or parallel.zero_stage 0"
        )


def check_combinations(
    config: ParallelConfig, *, precision: str, compile: bool, optimizer: str = "adamw", freezes: bool = False
) -> None:
    """Raises ValueError for options that cannot work with ZeRO. freezes: some weights are not trained."""
    check_optimizer(config.zero_stage, optimizer)
    if config.zero_stage and freezes:
        raise ValueError(
            f"parallel.zero_stage is {config.zero_stage}: expected 0, since model.network.attention.dsa.freeze leaves "
            "weights without gradients, whose saving ZeRO's engines do not know; use stage 0, or freeze false"
        )
    if config.zero_stage and precision not in ZERO_PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision!r}: expected {' or '.join(ZERO_PRECISIONS)} with parallel.zero_stage "
            f"{config.zero_stage} (its optimizer state and weights to be updated are float32)"
        )
    if config.reduce_dtype == "bfloat16" and precision == "32-true":
        raise ValueError("parallel.reduce_dtype is bfloat16: expected float32 with trainer.precision 32-true")
    if config.zero_stage == 3 and compile:
        raise ValueError(
            "model.compile is true: parallel.zero_stage 3 gathers weights in hooks that torch.compile cannot trace; "
            "use stage 1 or 2, or model.compile false"
        )
