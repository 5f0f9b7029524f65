"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch.optim.Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) for groups with a momentum, AdamW for
    the others: groups and state are this optimizer's own, so that schedules and checkpoints see one.

    Muon averages gradients (float32 where weights are), makes the average nearly orthogonal by 5 Newton-Schulz steps in
    bfloat16, and steps by 0.2 sqrt(max(rows, columns)) of it, whose root mean square is about that of AdamW's steps:
    AdamW's learning rate and weight decay hold for both (Moonlight, arXiv 2502.16982, section 2.2). It sees each
    matrix whole; with several ranks each does the same work.

    Args:
        groups: as parameter_groups gives them for OptimizerConfig.name "muon".

    Raises:
        ValueError: Muon is given a parameter that is no matrix.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        hidden = [group for group in self.param_groups if is_muon(group)]
        others = [group for group in self.param_groups if not is_muon(group)]
        self._parts: list[Optimizer] = [Muon(hidden)] if hidden else []
        self._parts += [AdamW(others)] if others else []
        self._share()

    def _share(self) -> None:
        """Both step on this optimizer's groups and state; load_state_dict has made new ones."""
        for part in self._parts:
            part.param_groups = [g for g in self.param_groups if is_muon(g) == isinstance(part, Muon)]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both. Returns what `closure` does, which computes gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for part in self._parts:
            part.step()
        return loss


def is_muon(group: dict[str, Any]) -> bool:
    """Whether a parameter group is one that Muon steps."""
    return "momentum" in group
