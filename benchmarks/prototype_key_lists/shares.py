"""Live shares by granule, per layer, of a model's own q, k at T tokens: scan's bound and final thresholds."""
import sys
from unittest import mock
import torch
import kernels, model.attention
import kernels.entmax_triton as et
from benchmarks.dump_qkv import read_tokens
from data.store import TokenStore

def capture_all(network, tokens):
    calls = []
    def record(q, k, v, **o):
        calls.append(dict(q=q.detach(), k=k.detach(), v=v.detach(), alpha=o["alpha"].detach() if torch.is_tensor(o["alpha"]) else o["alpha"], slopes=o["alibi_slopes"], scale=o.get("scale")))
        return kernels.entmax_attention(q, k, v, **o)
    with torch.no_grad(), mock.patch.object(model.attention, "entmax_attention", record), torch.autocast("cuda", dtype=torch.bfloat16):
        network(tokens)
    return calls

class Skip:
    def __getitem__(self, g):
        return lambda **k: None

def taus(c, heads):
    """final and scan tau (H', T) of position-free heads"""
    q = c["q"][:, heads]; rep = c["q"].shape[1] // c["k"].shape[1]
    k = c["k"].repeat_interleave(rep, 1)[:, heads]; v = c["v"].repeat_interleave(rep, 1)[:, heads]
    alpha = c["alpha"].float()[heads]
    scale = c["scale"] or q.shape[-1] ** -0.5
    args = (q, k, v, alpha, scale, "general", True, None, None, None, None, True, True, True)
    final = et._forward(*args)[2]
    with mock.patch.object(et, "entmax_refine", Skip()), mock.patch.object(et, "entmax_sum", Skip()):
        scan = et._forward(*args)[2]
    return q[0], k[0], alpha, scale, final[0], scan[0]

def shares(q, k, alpha, scale, tau):
    """counts of live granules over the second half of queries"""
    H, T, D = q.shape
    G = {"pairs": (1, 1), "1x64": (1, 64), "16x1": (16, 1), "16x64": (16, 64), "32x1": (32, 1), "64x1": (64, 1), "64x2": (64, 2), "64x4": (64, 4), "64x8": (64, 8), "64x64": (64, 64), "128x1": (128, 1)}
    live = {g: torch.zeros(H, dtype=torch.float64, device=q.device) for g in G}
    total = dict.fromkeys(G, 0.0)
    for i in range(T // 2, T, 1024):
        n = i + 1024
        z = (q[:, i:n].float() @ k[:, :n].float().transpose(1, 2)) * (scale * (alpha - 1))[:, None, None]
        z = z.masked_fill(torch.arange(n, device=q.device)[None] > torch.arange(i, n, device=q.device)[:, None], float("-inf"))
        on = z > tau[:, i:n, None]
        for g, (r, w) in G.items():
            x = on.view(H, 1024 // r, r, n // w, w).any(4).any(2)
            live[g] += x.flatten(1).sum(1)
            total[g] += sum((min(n, i + (b + 1) * r) + w - 1) // w for b in range(1024 // r))
    return {g: (live[g] / total[g]) for g in G}

def report(network, store, T, out=sys.stdout):
    tokens = read_tokens(store, T).cuda()
    calls = capture_all(network, tokens)
    sums = {}
    for i, c in enumerate(calls):
        heads = [h for h in range(c["q"].shape[1]) if c["slopes"] is None or float(c["slopes"][h]) == 0]
        q, k, alpha, scale, final, scan = taus(c, heads)
        print(f"layer {i} alpha {[round(a, 3) for a in alpha.tolist()]}", file=out)
        for name, tau in (("final", final), ("scan", scan)):
            s = shares(q, k, alpha, scale, tau)
            for g, v in s.items():
                sums.setdefault((name, g), []).append(v.mean().item())
            print("  ", name, {g: [round(100 * x, 2) for x in v.tolist()] for g, v in s.items() if g in ("pairs", "64x1", "1x64", "64x64")}, file=out)
    for name in ("final", "scan"):
        print(name, {g: round(100 * sum(v) / len(v), 2) for (n, g), v in sums.items() if n == name}, file=out)
    return calls

if __name__ == "__main__":
    from model.checkpoint import load_model
    store = TokenStore("prepared/linux/heldout")
    for run in sys.argv[1:]:
        print("==", run)
        report(load_model(run, "cuda").model, store, 32768)
