"""AdamW or Muon with parameter groups by name, and the learning-rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from common.checks import check_number
from training.step.muon import MuonAdamW


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), or Muon for the blocks' matrices beside it, and the schedule.

    Args:
        name: "adamw"; "muon" for the matrices of the blocks, where embeddings, the head, temperatures, gates and all
            that has one dimension stay with AdamW. Learning rate and weight decay mean the same for both
            (step/muon.py).
        lr: Peak learning rate.
        momentum: Decay rate of Muon's average of gradients, with Nesterov's step.
        betas: Decay rates of AdamW's two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices, at most 1 / lr. Parameters of one dimension (norms, biases) and alpha
            have none.
        decay_embeddings: Whether the embedding table (tied or not) is decayed too.
        alpha_lr_factor: Learning rate of the attention's alpha parameters, as a multiple of lr.
        schedule: "cosine" falls over the whole run (arXiv 1608.03983); "wsd" is warm-up, stable, decay
            (arXiv 2404.06395).
        warmup_steps: Steps of linear warm-up.
        warmup_tokens: Its tokens, rounded up to whole steps: in place of warmup_steps, where given.
        decay_fraction: Share of all steps in wsd's linear decay.
        final_lr_fraction: Learning rate at the last step, as a multiple of lr.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    alpha_lr_factor: float = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    warmup_tokens: int | float | None = None
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.1

    def __post_init__(self) -> None:
        name = "model.optimizer."
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"model.optimizer.name is {self.name!r}: expected adamw or muon")
        check_number(name + "momentum", self.momentum, least=0, below=1)
        if self.name != "muon" and self.momentum != OptimizerConfig.momentum:
            raise ValueError(
                f"model.optimizer.momentum is {self.momentum}: it is Muon's, and needs model.optimizer.name muon"
            )
        check_number(name + "lr", self.lr, above=0, most=10)
        check_number(name + "eps", self.eps, above=0, most=1)
        check_number(name + "alpha_lr_factor", self.alpha_lr_factor, least=0, most=1000)
        # a step takes lr * weight_decay of each weight: beyond 1 it changes its sign, beyond 2 it grows without end
        check_number(name + "weight_decay", self.weight_decay, least=0, most=1 / self.lr)
        check_number(name + "warmup_steps", self.warmup_steps, least=0, whole=True)
        check_number(name + "decay_fraction", self.decay_fraction, above=0, most=1)
        check_number(name + "final_lr_fraction", self.final_lr_fraction, least=0, most=1)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"model.optimizer.betas is {self.betas}: expected two numbers in [0, 1)")
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"model.optimizer.schedule is {self.schedule}: expected cosine or wsd")


# names of matrices whose rows are a token's or a head's, and no map of hidden states
BY_HEAD = {"head", "temperature", "gate", "head_weight", "eviction"}


def parameter_groups(module: nn.Module, config: OptimizerConfig, *, fused: bool) -> list[dict[str, Any]]:
    """Optimizer groups in a fixed order, each with its name and every setting that the config decides.

    Groups are "hidden" (Muon's, where the config has it), "matrices" (decayed), "vectors" (one dimension), "embeddings"
    and "alpha" (names ending in alpha_raw); empty ones are left out. A parameter that two modules share, as tied
    embeddings do, counts once.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    members: dict[str, list[nn.Parameter]] = {
        "hidden": [], "matrices": [], "vectors": [], "embeddings": [], "alpha": [],
    }  # fmt: skip
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("alpha_raw"):
            members["alpha"].append(parameter)
        elif id(parameter) in embeddings:
            members["embeddings"].append(parameter)
        else:
            # DeepSpeed's stage 3 leaves shape (0,) here and keeps the true one in ds_shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            hidden = config.name == "muon" and not BY_HEAD & set(name.split("."))
            members["vectors" if dimensions < 2 else "hidden" if hidden else "matrices"].append(parameter)
    decay = {
        "hidden": config.weight_decay,
        "matrices": config.weight_decay,
        "embeddings": config.weight_decay if config.decay_embeddings else 0.0,
    }
    adamw = {"betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    muon = {"momentum": config.momentum, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
    return [
        {
            "name": name, "params": parameters, "weight_decay": decay.get(name, 0.0),
            "lr": config.lr * (config.alpha_lr_factor if name == "alpha" else 1.0),
            **(muon if name == "hidden" else adamw),
        }
        for name, parameters in members.items() if parameters
    ]  # fmt: skip


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, total_steps: int, fused: bool
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer over `module` and its schedule, which is stepped once after each optimizer step."""
    groups = parameter_groups(module, config, fused=fused)
    optimizer = MuonAdamW(groups) if config.name == "muon" else torch.optim.AdamW(groups)
    return optimizer, LambdaLR(optimizer, lr_factor(config, total_steps))


def lr_factor(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate of optimizer step s = 0, 1, ..., total_steps - 1 as a multiple of the peak.

    A plain function on purpose: LambdaLR saves the fields of a callable object and restores them over the config.
    """
    if config.warmup_tokens is not None:
        raise ValueError(
            f"warmup_tokens is {config.warmup_tokens}: expected steps, which training/length.py makes of it"
        )
    warmup, final = config.warmup_steps, config.final_lr_fraction
    decay_steps = max(1, round(config.decay_fraction * total_steps))

    def cosine(step: int) -> float:
        progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    def stable_decay(step: int) -> float:
        progress = (step + 1 - (total_steps - decay_steps)) / decay_steps
        return 1 - (1 - final) * min(1.0, max(0.0, progress))

    after_warmup = cosine if config.schedule == "cosine" else stable_decay

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else after_warmup(step)

    return factor


def reapply_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Give a restored optimizer the settings of the current config.

    torch restores learning rate, betas, eps and weight decay from the checkpoint, so that a changed config would be
    ignored in silence. With an unchanged config every value stays bit-identical.

    Args:
        groups: what parameter_groups gives for the current config.

    Raises:
        ValueError: the optimizer has other groups than the config.
    """
    ours, wanted = [g["name"] for g in optimizer.param_groups], [g["name"] for g in groups]
    if ours != wanted:
        raise ValueError(f"the checkpoint's optimizer has parameter groups {ours}, the config gives {wanted}")
    for index, (group, settings) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group.update({key: value for key, value in settings.items() if key != "params"})
        group["initial_lr"] = scheduler.base_lrs[index] = settings["lr"]
        group["lr"] = settings["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
