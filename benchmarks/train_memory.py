"""Peak memory of training steps on a CUDA device beside the estimate of training/memory.

    python -m benchmarks.train_memory --models 125m 1b --tokens 8192 32768
    python -m benchmarks.train_memory --models 1b --tokens 131072 --sequence_parallel 4  # one rank of four, by itself

One line a case: estimate and measurement (torch.cuda.max_memory_allocated) in GiB, their ratio, and the phase in which
the estimate sees the peak. Cases that are estimated beyond the device's memory are left out.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import gc
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.loopback import first_rank
from common.arguments import PlainParser, a_count
from common.errors import UsageError, user_errors
from model.config import ModelConfig, config_from_dict
from training.memory.estimate import estimate
from training.memory.setup import Setup
from training.module import LanguageModule
from training.step.loss import resolve_loss_backend
from training.step.optim import OptimizerConfig, parameter_groups
from training.throughput import GIB

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 2  # the optimizer's state exists from the second on
TILE_TOKENS = 2048
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "tiled": {"mlp_tile_tokens": TILE_TOKENS},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "offload": {"activation_checkpointing": "offload"},
    "offload-tiled": {"activation_checkpointing": "offload", "mlp_tile_tokens": TILE_TOKENS},
}


def network_of(model: str, attention: str) -> ModelConfig:
    """From configs/models and configs/attention."""
    merged: dict[str, Any] = {}
    for file in (CONFIGS / "models" / f"{model}.yaml", CONFIGS / "attention" / f"{attention}.yaml"):
        merged |= yaml.safe_load(file.read_text())["model"]["network"]
    return config_from_dict(merged)


def make_setup(
    network: ModelConfig, tokens: int, mode: str, device: torch.device, ranks: int = 1, compiled: bool = False
) -> Setup:
    """ranks: that share a sequence; their first one is what trains."""
    return Setup(
        network=network, tokens=tokens, sequence_length=tokens, precision="bf16-mixed", cuda=device.type == "cuda",
        ranks=ranks, sequence_parallel=ranks, loss_backend=resolve_loss_backend("auto", device),
        compiled=compiled, **MODES[mode],
    )  # fmt: skip


def train(setup: Setup, device: torch.device) -> float:
    """Some optimizer steps of two micro-batches under autocast, as Lightning makes them. Returns the last loss."""
    torch.manual_seed(0)
    module = LanguageModule(
        setup.network, OptimizerConfig(), loss_backend=setup.loss_backend, loss_chunk_tokens=setup.loss_chunk_tokens,
        activation_checkpointing=setup.activation_checkpointing,  # type: ignore[arg-type]
        mlp_tile_tokens=setup.mlp_tile_tokens, compile=setup.compiled,
    ).to(device)  # fmt: skip
    module.shards = first_rank(setup.network, setup.sequence_parallel, setup.tokens)
    optimizer = torch.optim.AdamW(parameter_groups(module.model, OptimizerConfig(), fused=device.type == "cuda"))
    # two documents a sequence, the second three times as long as the first
    bounds = torch.tensor([0, setup.tokens // 4, setup.tokens], dtype=torch.int32, device=device)
    for _ in range(STEPS):
        for micro_batch in range(2):
            tokens = torch.randint(setup.network.vocab_size, (1, setup.local_tokens), device=device)
            batch = {"tokens": tokens, "labels": tokens.roll(-1), "cu_seqlens": bounds, "max_seqlen": setup.tokens}
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                loss = module.training_step(batch, 0)["loss"]
            if micro_batch == 0:
                optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return float(loss.detach())


def measure(setup: Setup, device: torch.device) -> float:
    """Peak bytes of `train` on a CUDA device, kernels compiled before."""
    train(setup, device)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    train(setup, device)
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    parser = PlainParser(prog="python -m benchmarks.train_memory", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["125m", "1b"], help="names in configs/models")
    parser.add_argument("--attention", nargs="+", default=["softmax", "asentmax"], help="names in configs/attention")
    parser.add_argument("--tokens", nargs="+", type=a_count, default=[8192, 32768], help="of a micro-batch")
    parser.add_argument(
        "--sequence_parallel", type=a_count, default=1, metavar="S", help="ranks that share a micro-batch"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--compile", action="store_true", help="as model.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device; python -m training.memory estimates without one")
    device = torch.device("cuda")
    room = torch.cuda.get_device_properties(device).total_memory
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, bf16 autocast, GiB", flush=True)
    print(f"{'case':<44}{'estimate':>10}{'measured':>10}{'ratio':>8}  peak", flush=True)
    for model, attention, tokens, mode in product(options.models, options.attention, options.tokens, options.modes):
        setup = make_setup(
            network_of(model, attention), tokens, mode, device, options.sequence_parallel, options.compile
        )
        expected, name = estimate(setup), f"{model} {attention} {tokens} {mode}"
        if expected.total > 0.95 * room:
            print(f"{name:<44}{expected.total / GIB:>10.2f}  left out: the device has {room / GIB:.0f}", flush=True)
            continue
        try:
            found = measure(setup, device)
        except torch.OutOfMemoryError:
            print(f"{name:<44}{expected.total / GIB:>10.2f}  out of memory", flush=True)
        else:
            ratio = expected.total / found
            print(
                f"{name:<44}{expected.total / GIB:>10.2f}{found / GIB:>10.2f}{ratio:>8.2f}  {expected.peak_phase}",
                flush=True,
            )
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with user_errors():
        main()
