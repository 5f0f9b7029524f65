"""Entmax attention in models of Hugging Face's transformers: its name there, and a learned alpha."""

import inspect
import math
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.alpha_entmax.attention import BACKENDS
from kernels.common.arguments import check_alpha

LOWEST, HIGHEST = 1.001, 2.0  # of a learned alpha; nearer to 1, float32 spoils the weights
PARAMETER = "entmax_alpha.raw"  # as names in a state dict end
OCCUPIED = ("eager", "sdpa", "flex_attention")
DEFAULT_NAME = "entmax"
_names: set[str] = set()  # that register was called with


def register_attention(alpha: float = 1.5, *, name: str = DEFAULT_NAME, backend: str = "auto") -> None:
    """As longsplash.register, without the models of longsplash.hub."""
    check_alpha(alpha, torch.float32, "attn_implementation='sdpa'")
    if isinstance(alpha, Tensor):
        raise TypeError("alpha must be a number, got a tensor; for an alpha per head call longsplash.add_alpha(model)")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not isinstance(name, str) or not name or name in OCCUPIED or any(x in name for x in "/|:@") or "flash" in name:
        raise ValueError(f"name must be one that transformers gives no meaning, such as 'entmax-1.25', got {name!r}")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"longsplash.register needs transformers ({error}): pip install longsplash[hub]") from None
    from longsplash.attention_function import attention_function
    from longsplash.attention_mask import entmax_mask

    AttentionInterface.register(name, attention_function(float(alpha), backend))
    AttentionMaskInterface.register(name, entmax_mask)
    _names.add(name)


def registered_names() -> frozenset[str]:
    """What attn_implementation can be for entmax attention."""
    return frozenset(_names)


class HeadAlpha(nn.Module):
    """A learned alpha per head (arXiv:1909.00015): 1.001 + 0.999 * sigmoid(raw), raw (H,) the parameter."""

    def __init__(self, heads: int, start: float, device: torch.device):
        super().__init__()
        share = (start - LOWEST) / (HIGHEST - LOWEST)
        self.raw = nn.Parameter(torch.full((heads,), math.log(share / (1 - share)), device=device))

    def forward(self) -> Tensor:
        """float32 (H,), in [1.001, 2]."""
        return (LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(self.raw.float())).clamp(max=HIGHEST)


def add_alpha(model: nn.Module, start: float = 1.5) -> list[nn.Parameter]:
    """Gives each attention module of a model a learned alpha per head, which its entmax attention takes from then on.

    The parameters are float32 and stand in the state dict, as `...entmax_alpha.raw`, so that save_pretrained and
    torch.save keep them. To load them again: `from_pretrained`, which leaves them out with a warning, then
    `longsplash.load_alpha(model, folder)`; or `add_alpha(model)`, then `model.load_state_dict`.

    Args:
        model: a transformers model (or a module that contains one) with an attn_implementation of register.
        start: alpha of all heads, between 1.001 and 2 (both exclusive).

    Returns: the parameters, (H,) each, for an optimizer's group without weight decay.

    Raises: TypeError or ValueError naming the argument, its value and what was expected, also where the model has an
    alpha already, or another attention. Then nothing was added.
    """
    check_alpha(start, torch.float32, "attn_implementation='sdpa'")
    if isinstance(start, Tensor) or not LOWEST < start < HIGHEST:
        raise ValueError(f"start must be a number between {LOWEST} and {HIGHEST} (both exclusive), got {start}")
    modules = _attention_modules(model)
    heads = {name: _heads(name, module) for name, module in modules.items()}  # before any is changed
    parameters = []
    for name, module in modules.items():
        alpha = HeadAlpha(heads[name], float(start), next(module.parameters()).device)
        module.entmax_alpha = alpha
        parameters.append(alpha.raw)
    return parameters


def load_alpha(model: nn.Module, folder: str | PathLike[str]) -> list[nn.Parameter]:
    """add_alpha with the values that save_pretrained has written to a folder.

    Args:
        model: as in add_alpha, of the class that was saved.
        folder: with the .safetensors files.

    Returns: the parameters, as add_alpha. Raises: as add_alpha; FileNotFoundError without such files; ValueError where
    the folder's alphas are not those of the model's attention modules.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder must hold .safetensors files, as save_pretrained writes, got {str(folder)!r}")
    saved: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            saved.update({name: file.get_tensor(name) for name in file.keys() if name.endswith(PARAMETER)})  # noqa: SIM118
    wanted = {f"{name}.{PARAMETER}": _heads(name, module) for name, module in _attention_modules(model).items()}
    if {name: tuple(x.shape) for name, x in saved.items()} != {name: (heads,) for name, heads in wanted.items()}:
        first = min(set(saved) ^ set(wanted), default="shapes")
        raise ValueError(
            f"folder must hold the alpha of each of the model's {len(wanted)} attention modules, got {len(saved)} in "
            f"{str(folder)!r} (they differ in {first}); load the class that was saved"
        )
    parameters = add_alpha(model)
    with torch.no_grad():
        for parameter, name in zip(parameters, wanted, strict=True):
            parameter.copy_(saved[name])
    return parameters


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of those whose forward takes its attention from transformers' interface.

    Raises: ValueError where there is none, or one has an alpha already, or its attention is not of register."""
    found = {name: module for name, module in model.named_modules() if _uses_interface(module)}
    if not found:
        class_name = type(model).__name__
        raise ValueError(f"model must have modules that use transformers' attention interface, got {class_name}")
    for name, module in found.items():
        if hasattr(module, "entmax_alpha"):
            raise ValueError(f"model has an alpha already, in {name}; change it there, e.g. by load_state_dict")
        config: Any = getattr(module, "config", None)
        kind = getattr(config, "_attn_implementation", None)
        if kind not in _names:
            raise ValueError(
                f"model must have entmax attention, got attn_implementation={kind!r} in {name}: call "
                "longsplash.register() and model.set_attn_implementation('entmax') first"
            )
    return found


def _uses_interface(module: nn.Module) -> bool:
    """By the name that its forward's code mentions: modules carry no other mark."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _heads(name: str, module: nn.Module) -> int:
    config: Any = module.config
    for owner, attribute in ((module, "num_heads"), (module, "num_attention_heads"), (config, "num_attention_heads")):
        heads = getattr(owner, attribute, None)
        if isinstance(heads, int):
            return heads
    raise ValueError(f"model must say num_heads, or its config num_attention_heads, got neither for {name}")
