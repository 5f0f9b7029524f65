"""Initial weights by parameter name, drawn one by one: many processes that each hold a part of a model start from those
that one process would have, and models that differ in one layer share all others."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dms.eviction import EvictionLogits
from model.layers import HeadAlpha, ScalableTemperature


@dataclass(frozen=True)
class Normal:
    """Distribution of one parameter's initial values; std 0: all are the mean."""

    shape: tuple[int, ...]
    mean: float
    std: float


class InitialWeights(Mapping[str, Tensor]):
    """Each parameter's initial values, drawn anew whenever they are asked for, with a seed of its own made of `seed`
    and its name.

    Normal with init_std, divided by sqrt(2 * n_layers) where a layer writes to the residual stream; norms 1, dms's
    weights of eviction 0, biases and alpha_raw 0 (alpha then starts at its configured value) but for temperature_bias,
    SSMax scalars normal with mean 1 and deviation 0.01.

    Args:
        network: whose parameters may be on the meta device.
        device: where values are drawn; CPUs and GPUs draw different ones.
    """

    def __init__(self, network: nn.Module, config: ModelConfig, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.normals = {
            f"{prefix}.{name}": Normal(tuple(parameter.shape), *_mean_and_std(prefix, module, name, config))
            for prefix, module in network.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def __getitem__(self, name: str) -> Tensor:
        normal = self.normals[name]
        values = torch.empty(normal.shape, device=self.device)
        if not normal.std:
            return values.fill_(normal.mean)
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest) >> 1)
        return values.normal_(normal.mean, normal.std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.normals)

    def __len__(self) -> int:
        return len(self.normals)

    def count(self) -> int:
        """Parameters of the network, whoever holds them."""
        return sum(prod(normal.shape) for normal in self.normals.values())


def _mean_and_std(prefix: str, module: nn.Module, name: str, config: ModelConfig) -> tuple[float, float]:
    if isinstance(module, nn.RMSNorm | nn.LayerNorm):
        return (1.0 if name == "weight" else 0.0), 0.0
    if isinstance(module, HeadAlpha | EvictionLogits):
        return 0.0, 0.0
    if isinstance(module, ScalableTemperature):
        return 1.0, 0.01
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise TypeError(f"{prefix}.{name} of a {type(module).__name__}: no initial values are defined")
    if name == "bias":
        return (config.attention.temperature_bias if prefix.endswith(".temperature.beta") else 0.0), 0.0
    to_residual = prefix.endswith((".attention.wo", ".feed_forward.w_down"))
    return 0.0, config.init_std * ((2 * config.n_layers) ** -0.5 if to_residual else 1.0)


def take_memory(network: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give the parameters of a network on the meta device memory, with unspecified values. dtype: None for theirs."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            values = torch.empty_like(p, device=device, dtype=dtype)
            setattr(module, name, nn.Parameter(values, requires_grad=p.requires_grad))
