"""The suite "trained": attention of all layers of a checkpoint on its own q, k, v, and how sparse these are."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Measurement, Timing
from benchmarks.peers import call_kernels
from benchmarks.workloads import Workload

# (queries, keys) of granules: one is live if any of its queries weighs any of its keys
GRANULES = {"64x64": (64, 64), "64x8": (64, 8), "64x1": (64, 1), "16x1": (16, 1), "pairs": (1, 1)}
ROWS = 512  # queries whose dense scores exist at once


def position_free(layer: Workload) -> Workload | None:
    """The heads without position bias, or None where there is none; a key head for each query head where the groups do
    not come apart."""
    if layer.alibi_slopes is None:
        return layer
    heads = [head for head, slope in enumerate(layer.alibi_slopes.tolist()) if slope == 0]
    if not heads:
        return None
    repeat = layer.q.shape[1] // layer.k.shape[1]
    groups = sorted({head // repeat for head in heads})
    whole = len(heads) == repeat * len(groups)
    key_heads = groups if whole else [head // repeat for head in heads]
    alpha = layer.alpha.detach()[heads].requires_grad_() if isinstance(layer.alpha, Tensor) else layer.alpha
    q, k, v = layer.q.detach()[:, heads], layer.k.detach()[:, key_heads], layer.v.detach()[:, key_heads]
    return replace(layer, q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), alpha=alpha, alibi_slopes=None)


@torch.no_grad()
def live_shares(layer: Workload) -> dict[str, float]:
    """Share of live granules among those that the second half of the queries sees whole, mean over heads, by granule.
    One document, causal, a multiple of 64 tokens."""
    _, heads, n_tokens, head_dim = layer.q.shape
    tau = call_kernels(layer, gradient=False, skip_far=True).tau[0]
    alpha = torch.as_tensor(layer.alpha, dtype=torch.float32, device=layer.q.device).expand(heads)
    keys = layer.k[0].repeat_interleave(heads // layer.k.shape[1], 0)
    live, total = dict.fromkeys(GRANULES, 0.0), dict.fromkeys(GRANULES, 0)
    for start in range(n_tokens // 2 // 64 * 64, n_tokens, ROWS):
        stop = min(start + ROWS, n_tokens)
        for head in range(heads):
            scores = layer.q[0, head, start:stop].float() @ keys[head, :start].float().mT * head_dim**-0.5
            if layer.alibi_slopes is not None:
                position = torch.arange(n_tokens, device=scores.device)
                scores -= layer.alibi_slopes[head] * (position[start:stop, None] - position[:start])
            held = scores * (alpha[head] - 1) > tau[head, start:stop, None]
            for name, (rows, columns) in GRANULES.items():
                granules = held.view(held.shape[0] // rows, rows, start // columns, columns).any(3).any(1)
                live[name] += float(granules.sum())
                total[name] += granules.numel()
    return {name: live[name] / total[name] for name in GRANULES}


def mean_shares(layers: Sequence[Workload]) -> str:
    """Live shares of layers, in words."""
    found = [live_shares(layer) for layer in layers]
    means = {name: sum(share[name] for share in found) / len(found) for name in GRANULES}
    return "live: " + ", ".join(f"{name} {100 * mean:.3g} %" for name, mean in means.items())


def summed(found: Sequence[Measurement]) -> Measurement:
    """What all layers take together; the largest of their memory. Without times if a layer lacks them."""

    def add(times: Sequence[Timing | None]) -> Timing | None:
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return None
        return Timing(*(sum(getattr(time, part) for time in known) for part in ("median", "low", "high")))

    extra = [one.extra_bytes for one in found if one.extra_bytes is not None]
    return Measurement(
        both=add([one.both for one in found]),
        forward=add([one.forward for one in found]),
        extra_bytes=max(extra, default=None),
        note="; ".join(dict.fromkeys(one.note for one in found if one.note)),
    )
