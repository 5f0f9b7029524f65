"""Two gloo processes in which every engine takes the same steps on the same model. Run by test_zero.py."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import TRAINER_STATE, WEIGHT, read_complete, write_complete
from model.config import AttentionConfig, ModelConfig
from model.loading import StoredTensors
from model.transformer import Transformer
from training.distributed.checkpoint_state import TrainingState, read_state, whole_state
from training.distributed.checkpoint_writer import agreed_checksums, take_share
from training.distributed.config import ParallelConfig
from training.distributed.engine import PlainEngine
from training.distributed.zero import ZeroEngine, ZeroStrategy, deepspeed_config
from training.step.optim import OptimizerConfig, build_optimizer

RANKS, ACCUMULATION, CLIP = 2, 2, 0.05
# w_gate, w_up and w_down are above stage 3's threshold for parameters that stay whole
CONFIG = ModelConfig(
    vocab_size=60, n_layers=2, d_model=36, n_heads=2, n_kv_heads=1, d_ff=300, tie_embeddings=True,
    attention=AttentionConfig(kind="asentmax", learn_alpha=True),
)  # fmt: skip
SETTINGS = OptimizerConfig(lr=1e-3, warmup_steps=0)
CPU = torch.device("cpu")


def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def loss(model: Any, step: int, micro_batch: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Of one rank's micro-batch; the mean over ranks and the sum over micro-batches is the loss of the step."""
    tokens = torch.randint(
        0, 60, (1, 24), generator=torch.Generator().manual_seed(step * 100 + micro_batch * 10 + rank)
    )
    return model(tokens).to(dtype).float().square().mean() / ACCUMULATION


class Reference:
    """One process that sees the micro-batches of all ranks."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer, _ = build_optimizer(self.model, SETTINGS, total_steps=9, fused=False)
        self.engine = PlainEngine(self.model)

    def backward(self, step: int) -> None:
        for micro_batch in range(ACCUMULATION):
            for rank in range(RANKS):
                (loss(self.model, step, micro_batch, rank, torch.float32) / RANKS).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> TrainingState:
        return whole_state(self.model, self.optimizer)


class Divided:
    """DeepSpeed's engine as ZeroStrategy sets it up."""

    def __init__(self, config: ParallelConfig, dtype: torch.dtype) -> None:
        import deepspeed

        self.dtype, self.model = dtype, network()
        initial = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        optimizer, _ = build_optimizer(self.model, SETTINGS, total_steps=9, fused=False)
        options = deepspeed_config(config) | {"gradient_accumulation_steps": ACCUMULATION}
        if dtype == torch.bfloat16:
            options["bf16"] = {"enabled": True}
        self.deepspeed, *_ = deepspeed.initialize(
            config=options, model=self.model, optimizer=optimizer, dist_init_required=False
        )
        self.engine = ZeroEngine(self.deepspeed, self.model)
        self.engine.partitions.set_weights(initial)

    def backward(self, step: int, factor: float = 1.0) -> None:
        for micro_batch in range(ACCUMULATION):
            value = loss(self.deepspeed, step, micro_batch, dist.get_rank(), self.dtype)
            self.deepspeed.backward(value * factor, scale_wrt_gas=False)
            if micro_batch < ACCUMULATION - 1:
                self.deepspeed.step()

    def step(self) -> None:
        self.deepspeed.step()

    def state(self) -> TrainingState:
        return self.engine.partitions.state()


def copy_of(state: TrainingState) -> dict[tuple[str, int], Tensor]:
    return {(fragment.key, fragment.start): fragment.values.clone() for fragment in state.fragments}


def take_step(worker: Any, step: int) -> float:
    worker.backward(step)
    norm = worker.engine.gradient_norm().clone()
    worker.engine.clip_gradients(CLIP, norm)
    worker.step()
    return float(norm)


def check_discarding(worker: Divided, step: int) -> None:
    """A step with good gradients, then one with NaN on one rank only, neither of which may leave a trace."""
    before, steps = copy_of(worker.state()), worker.state().steps
    for good in (True, False):
        worker.backward(step, 1.0 if good or dist.get_rank() else float("nan"))
        norm = worker.engine.gradient_norm()
        assert bool(norm.isfinite()) == good, (step, good, norm)
        check_norms(worker, norm, good)
        worker.engine.discard_gradients()
        worker.step()
        after = copy_of(worker.state())
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert worker.state().steps == steps


def check_norms(worker: Divided, norm: Tensor, good: bool) -> None:
    """Norms of single gradients, on all ranks alike, make up the whole one."""
    norms = worker.engine.gradient_norms()
    assert norms.keys() == dict(worker.model.named_parameters()).keys()
    whole = torch.stack([x.float() for x in norms.values()]).norm()
    everywhere = [torch.zeros_like(whole) for _ in range(RANKS)]
    dist.all_gather(everywhere, whole)
    if good:
        torch.testing.assert_close(torch.stack(everywhere), norm.float().expand(RANKS), rtol=1e-5, atol=0)
    else:
        assert not any(x.isfinite() for x in everywhere)


def write(folder: Path, state: TrainingState) -> StoredTensors:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    agreed_checksums(take_share(folder, state, CPU, None).write)
    if dist.get_rank() == 0:
        (folder / TRAINER_STATE).write_bytes(b"")
        write_complete(folder, {"step": 1})
    dist.barrier()
    return StoredTensors(read_complete(folder))


def check_same(ours: StoredTensors, theirs: StoredTensors) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def check_engine(name: str, config: ParallelConfig, dtype: torch.dtype, folder: Path) -> None:
    reference, worker, exact = Reference(), Divided(config, dtype), dtype == torch.float32
    start = write(folder / f"{name}-0", worker.state())
    check_same(start, write(folder / f"{name}-1", reference.state()))  # float32 weights, whatever computes
    for step in range(3):
        wanted, found = take_step(reference, step), take_step(worker, step)
        assert abs(found / wanted - 1) < (1e-5 if exact else 2e-2), (step, found, wanted)
        check_discarding(worker, step + 50)
    stored, whole = write(folder / f"{name}-2", worker.state()), write(folder / f"{name}-3", reference.state())
    assert len(set(stored.files.values())) == RANKS  # both ranks write
    error, moved = (
        sum(float((a[key] - b[key]).norm()) for key in start if key.startswith(WEIGHT))
        for a, b in ((stored, whole), (whole, start))
    )
    assert error <= (1e-4 if exact else 0.3) * moved, (error, moved)
    # into a new engine of this kind, into a whole one, and back
    again = Divided(config, dtype)
    for number, other in ((4, again), (5, reference)):
        read_state(stored, other.state())
        check_same(write(folder / f"{name}-{number}", other.state()), stored)
    again.engine.partitions.set_steps(worker.state().steps)
    again.engine.partitions.refresh_weights()
    assert take_step(again, 7) == take_step(worker, 7)
    check_same(write(folder / f"{name}-6", again.state()), write(folder / f"{name}-7", worker.state()))


def main(rank: int, folder: str, port: int) -> None:
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    ZeroStrategy(ParallelConfig(zero_stage=1), "cpu")  # its switches for CPUs
    import deepspeed

    deepspeed.init_distributed("gloo", rank=rank, world_size=RANKS)
    dtypes = (torch.float32, torch.bfloat16)
    cases = [(stage, dtype, False) for stage in (1, 2, 3) for dtype in dtypes]
    for stage, dtype, offload in (*cases, (2, torch.bfloat16, True), (3, torch.float32, True)):
        config = ParallelConfig(zero_stage=stage, offload_optimizer=offload)  # type: ignore[arg-type]
        name = f"stage {stage}, {dtype}, offload {offload}"
        try:
            check_engine(name, config, dtype, Path(folder))
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    dist.destroy_process_group()
