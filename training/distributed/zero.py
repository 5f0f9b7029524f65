"""ZeRO (Rajbhandari et al., arXiv 1910.02054) through DeepSpeed: strategy, gradients, state by parameter name.

DeepSpeed has three optimizers: one for stages 1 and 2, another for stage 1 in bfloat16, and one for stage 3. What this
file needs to know of their internals stands in _Partitions (where weights and state lie) and ZeroEngine (the norm).
"""

import logging
import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from model.checkpoint import WEIGHT
from model.initial_weights import take_memory
from training.distributed.checkpoint_state import (
    MOMENTS,
    Fragment,
    TrainingState,
    adam_state,
    read_state,
    tensor_shapes,
)
from training.distributed.config import BUCKET_ELEMENTS, ElasticCheckpoints, ParallelConfig, data_ranks


def deepspeed_config(config: ParallelConfig) -> dict[str, Any]:
    """DeepSpeed's configuration. Lightning adds accumulation, clipping and precision."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.zero_stage > 1,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": 10_000,  # vectors stay whole on each rank, matrices do not
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its speed log only, which is off
        "zero_optimization": zero,
        # torch's AdamW
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # bfloat16 for both unless told otherwise
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[config.reduce_dtype],
    }


class ZeroStrategy(ElasticCheckpoints, DeepSpeedStrategy):
    """DeepSpeed on CUDA, or on CPUs with gloo, with the checkpoints of this recipe.

    A network on the meta device gets memory on the device, where it is whole, in the dtype that it computes with, for a
    moment before stage 3 divides it. Its weights, those that a single process would have, are drawn or read parameter
    by parameter, of which each rank keeps its own part.
    """

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        if device_type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU too, DeepSpeed would take that
        import deepspeed
        from deepspeed.runtime import bf16_optimizer

        bf16_optimizer.see_memory_usage = lambda *_, **__: None  # prints whatever the log level
        if device_type == "cpu":
            # a C++ extension that would be compiled for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # its warnings are about its own choices and about steps that this recipe discards
        super().__init__(config=deepspeed_config(config), timeout=config.timeout, logging_level=logging.ERROR)
        self.parallel_config = config
        self._engine: ZeroEngine | None = None
        self._start: Mapping[str, Tensor] = {}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return data_ranks(self.global_rank, self.world_size, self.parallel_config.sequence_parallel)

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        # As DeepSpeedStrategy's, which refuses CPUs.
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def init_deepspeed(self) -> None:
        # As DeepSpeedStrategy's, without its warning that configure_gradient_clipping does not clip: here it does.
        assert self.model is not None
        self._start = self._start_weights()
        if self._is_deferred():  # before the optimizer is made
            dtype = None if self.precision_plugin.precision == "32-true" else torch.bfloat16
            take_memory(self._network(), self.root_device, dtype)
        self._initialize_deepspeed_train(self.model)

    def _is_deferred(self) -> bool:
        return any(parameter.is_meta for parameter in self._network().parameters())

    def teardown(self) -> None:
        if self.lightning_module is not None and self._is_deferred():
            self._lightning_module = None  # setup has failed: what has no memory cannot move to the CPU
        super().teardown()

    def _start_weights(self) -> Mapping[str, Tensor]:
        """By parameter name; none where a checkpoint will give them."""
        module: Any = self.lightning_module
        if module.trainer.ckpt_path:
            return {}
        found = {name: p.detach() for name, p in self._network().named_parameters() if not p.is_meta}
        taken_over, module.taken_over = module.taken_over, {}
        return found or ChainMap(taken_over, module.model.initial)

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        engine, wrapper = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        self._engine = ZeroEngine(engine, self._network())
        if self._start:
            self._engine.partitions.set_weights(self._start)  # DeepSpeed has rounded what it copied, if anything
        self._start = {}  # whole weights, or the files that they lie in
        return engine, wrapper

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of micro-batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """After every micro-batch; hooks on gradients run where they are complete, as with other strategies."""
        loss = closure()
        if self.deepspeed_engine.is_gradient_accumulation_boundary():
            assert self.lightning_module is not None
            self.precision_plugin._after_closure(self.lightning_module, optimizer)
        self.deepspeed_engine.step(**kwargs)
        return loss

    def engine(self) -> "ZeroEngine":
        assert self._engine is not None
        return self._engine

    def training_state(self) -> TrainingState:
        return self.engine().partitions.state()

    def state_restored(self, steps: Mapping[str, int]) -> None:
        self.engine().partitions.set_steps(steps)
        self.engine().partitions.refresh_weights()


class ZeroEngine:
    """Gradients in DeepSpeed's partitions.

    The norm is computed once: DeepSpeed's step, which would compute it again, is given the one from gradient_norm, and
    scales by it. A norm that is not finite makes DeepSpeed drop the gradients and leave weights and state alone.
    """

    def __init__(self, engine: Any, network: nn.Module) -> None:
        self.optimizer = engine.optimizer
        self.partitions, self.network = _Partitions(self.optimizer, network), network
        self.norm: Tensor | None = None
        optimizer = self.optimizer
        if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            self._compute_norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._norm_of_step
        elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1 in bfloat16
            from deepspeed.runtime.utils import get_global_norm_of_tensors

            gradients = optimizer.get_grads_for_norm
            self._compute_norm = lambda: get_global_norm_of_tensors(gradients()[0])
            optimizer.get_grads_for_norm = lambda for_clipping=False: (
                gradients(for_clipping=True) if for_clipping else ([self._norm_of_step()], {})
            )
        else:  # stage 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups = optimizer._get_norm_groups
            self._compute_norm = lambda: combine_grad_norm_groups(groups())
            optimizer._get_norm_groups = lambda: [self._norm_of_step()]

    def _norm_of_step(self) -> Tensor:
        norm, self.norm = self.norm, None
        if norm is None:
            raise RuntimeError("gradient_norm must be called before each optimizer step")
        return norm

    def gradient_norm(self) -> Tensor:
        norm = self._compute_norm()
        self.norm = torch.where(norm < 0, torch.inf, norm)  # DeepSpeed says -1 where it is not finite
        return self.norm

    def clip_gradients(self, max_norm: float, norm: Tensor) -> None:
        self.norm, self.optimizer.clip_grad = norm, max_norm  # scaled in the step

    def discard_gradients(self) -> None:
        assert self.norm is not None
        self.norm = torch.full_like(self.norm, torch.inf)
        if getattr(self.optimizer, "cpu_offload", False):
            # its way out of such a step leaves these, and the next step would add to them
            self.optimizer.averaged_gradients.clear()

    def gradient_norms(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        norms: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():  # one whole gradient at a time
            if (gradient := safe_get_full_grad(parameter)) is not None:
                norms[name] = gradient.norm()
        return norms


@dataclass(frozen=True)
class _Partition:
    """One of DeepSpeed's flat tensors: float32 weights of this rank, with their optimizer group.

    names: of the parameters that it and the partitions of other ranks make up. places: (name, first element in the
    parameter, first element here, number of elements) of each piece in it.
    """

    flat: Tensor
    group: dict[str, Any]
    names: list[str]
    places: list[tuple[str, int, int, int]]


class _Partitions:
    """Where this rank's float32 weights and AdamW state lie."""

    def __init__(self, optimizer: Any, network: nn.Module) -> None:
        self.optimizer, self.adam = optimizer, optimizer.optimizer
        parameters = dict(network.named_parameters())
        # stage 3 leaves shape (0,) in the parameter
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        self.names = {id(p): name for name, p in parameters.items()}
        self.shapes = tensor_shapes(shapes)
        self.stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.partitions = self._stage_3() if self.stage_3 else self._stages_1_and_2()

    def _stages_1_and_2(self) -> list[_Partition]:
        of_stage_1_in_bf16 = hasattr(self.optimizer, "bf16_groups")
        flats, members = (
            (self.optimizer.fp32_groups_flat_partition, self.optimizer.bf16_groups)
            if of_stage_1_in_bf16
            else (self.optimizer.single_partition_of_fp32_groups, self.optimizer.bit16_groups)
        )
        found = []
        for flat, group, parameters in zip(flats, self.adam.param_groups, members, strict=True):
            mappings = [(self.names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
            places = [
                (name, m.lp_fragment_address.start, m.hp_fragment_address.start, m.lp_fragment_address.numel)
                for name, m in mappings
            ]
            found.append(_Partition(flat, group, [self.names[id(p)] for p in parameters], places))
        return found

    def _stage_3(self) -> list[_Partition]:
        found = []
        for index, (flat, parameters) in enumerate(
            zip(self.optimizer.fp32_partitioned_groups_flat, self.optimizer.fp16_groups, strict=True)
        ):
            places = []
            for p in parameters:
                _, offset, share = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
                start = share * dist.get_rank()
                if (count := min(share, p.ds_numel - start)) > 0:  # the last ranks have padding
                    places.append((self.names[id(p)], start, offset, count))
            group = self.adam.param_groups[self.optimizer.sub_group_to_group_id[index]]
            found.append(_Partition(flat, group, [self.names[id(p)] for p in parameters], places))
        return found

    def state(self) -> TrainingState:
        fragments: list[Fragment] = []
        steps: dict[str, int] = {}
        for partition in self.partitions:
            state = adam_state(self.adam, partition.flat, bool(partition.group["fused"]))
            tensors = {WEIGHT: partition.flat.detach(), **{f"{moment}/": state[moment] for moment in MOMENTS}}
            for name, start, offset, count in partition.places:
                fragments += [Fragment(kind + name, start, t.narrow(0, offset, count)) for kind, t in tensors.items()]
            steps |= dict.fromkeys(partition.names, int(state["step"]))
        return TrainingState(self.shapes, fragments, replicated=False, steps=steps)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's share of whole float32 weights, by parameter name; each one is asked for where it is needed
        alone."""
        state = self.state()
        for fragment in state.fragments:
            if fragment.key.startswith(WEIGHT):
                stored = {fragment.key: weights[fragment.key.removeprefix(WEIGHT)]}
                read_state(stored, replace(state, fragments=[fragment]))
        self.refresh_weights()

    def set_steps(self, steps: Mapping[str, int]) -> None:
        """Raises ValueError where parameters that share a counter here have different ones."""
        for partition in self.partitions:
            counts = {steps[name] for name in partition.names}
            if len(counts) > 1:
                raise ValueError(
                    f"the checkpoint's optimizer steps {sorted(counts)} differ within the parameter group "
                    f"{partition.group['name']}: resume it with parallel.zero_stage 0"
                )
            self.adam.state[partition.flat]["step"].fill_(counts.pop())

    def refresh_weights(self) -> None:
        """Bring the weights that the network computes with up to date with the float32 ones."""
        if not self.stage_3:
            self.optimizer.update_lp_params()
            return
        for index in range(len(self.partitions)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := self.optimizer.persistent_parameters:  # small ones, which every rank keeps whole
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
