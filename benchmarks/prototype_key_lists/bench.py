import sys, time, statistics
sys.path.insert(0, ".")
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from exp import keys, shares
from exp.loadpacked import load
from data.store import TokenStore
import kernels
from kernels import entmax_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
T = int(sys.argv[2]) if len(sys.argv) > 2 else 32768
t0 = time.time()
model = load(f"exp/data/{sys.argv[1]}")
calls = shares.capture_all(model, shares.read_tokens(TokenStore("prepared/linux/heldout"), T).cuda())
cases = []
for c in calls:
    heads = [h for h in range(c["q"].shape[1]) if float(c["slopes"][h]) == 0]
    rep = c["q"].shape[1] // c["k"].shape[1]
    groups = sorted({h // rep for h in heads})
    q = c["q"][:, heads].contiguous(); k = c["k"][:, groups].contiguous(); v = c["v"][:, groups].contiguous()
    cases.append((q, k, v, c["alpha"].float()[heads].contiguous(), torch.randn_like(q)))
del model, calls
print(torch.cuda.get_device_name(), "T", T, "q", tuple(cases[0][0].shape), "k", tuple(cases[0][1].shape), f"{time.time()-t0:.0f} s", flush=True)
scale = cases[0][0].shape[-1] ** -0.5

def timed(f, n=5):
    """ms, sum over layers, median of n"""
    f(); torch.cuda.synchronize()
    out = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda._sleep(2_000_000)
        a.record(); f(); b.record(); torch.cuda.synchronize()
        out.append(a.elapsed_time(b))
    return statistics.median(out)

def ours(backward, which=None):
    for q, k, v, alpha, g in cases:
        if backward:
            q, k, v, alpha = (x.detach().requires_grad_() for x in (q, k, v, alpha))
            entmax_attention(q, k, v, alpha=alpha, backend="triton").backward(g)
        else:
            with torch.no_grad():
                entmax_attention(q, k, v, alpha=alpha, backend="triton")
def dense(backward):
    for q, k, v, alpha, g in cases:
        if backward:
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            sdpa(q, k, v, is_causal=True, enable_gqa=True).backward(g)
        else:
            with torch.no_grad():
                sdpa(q, k, v, is_causal=True, enable_gqa=True)

def passes(n=3, fused=False, gradient=True, back=True):
    events = {}
    original = keys.launch
    def launch(kernel, name, tasks, **kw):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); original(kernel, name, tasks, **kw); b.record()
        events.setdefault(name, []).append((a, b))
    totals = []
    keys.launch = launch
    try:
        for i in range(n + 1):
            events.clear()
            torch.cuda.synchronize(); torch.cuda._sleep(4_000_000)
            a, b = torch.cuda.Event(True), torch.cuda.Event(True)
            a.record()
            for q, k, v, alpha, g in cases:
                s = keys.fwd(q, k, v, alpha, scale, fused=fused, gradient=gradient)
                if back:
                    keys.bwd(g, q, k, v, alpha, scale, s)
            b.record(); torch.cuda.synchronize()
            if i:
                totals.append((a.elapsed_time(b), {k: sum(x.elapsed_time(y) for x, y in e) for k, e in events.items()}))
    finally:
        keys.launch = original
    total, parts = sorted(totals, key=lambda t: t[0])[len(totals) // 2]
    return total, {k: round(x, 2) for k, x in parts.items()}

def check():
    for i in (0, 3, 6):
        q, k, v, alpha, g = cases[i]
        a = [x.detach().requires_grad_() for x in (q, k, v, alpha)]
        out = entmax_attention(a[0], a[1], a[2], alpha=a[3], backend="triton"); out.backward(g)
        s = keys.fwd(q, k, v, alpha, scale, fused=False)
        grads = keys.bwd(g, q, k, v, alpha, scale, s)
        rel = lambda x, y: float((x.float() - y.float()).norm() / y.float().norm())
        bits = ((s[3][..., None] >> torch.arange(32, device="cuda")) & 1).float().mean().item() * 2
        rows = sum(((s[4] >> b) & 1).sum().item() for b in range(32)) / (s[4].shape[1] * T * T / 64) * 2
        print("layer", i, "rel", [f"{rel(x, y):.1e}" for x, y in zip((s[0], *grads), (out, *(x.grad for x in a)))], f"live 64x1 {bits:.3f} 1x64 {rows:.3f}", flush=True)

if __name__ == "__main__":
    check()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        c1, c2 = timed(lambda: dense(False)), timed(lambda: dense(True))
    o1, o2 = timed(lambda: ours(False)), timed(lambda: ours(True))
    print(f"cuDNN {c1:.2f} / {c2:.2f}; ours {o1:.2f} / {o2:.2f}: ratios {o1/c1:.2f} {o2/c2:.2f}", flush=True)
    def show(name, **options):
        t0 = time.time()
        try:
            total, parts = passes(**options)
            print(f"{name:40s} {total:7.2f} ratio {total / (c2 if options.get('back', True) else c1):.2f} {parts}  [{time.time()-t0:.0f} s]", flush=True)
        except Exception as e:
            print(name, "failed", repr(e)[:300], flush=True)
    show("split")
    show("fused", fused=True)
    show("forward only, split", gradient=False, back=False)
    base = {k: dict(v) for k, v in keys.CONFIG.items()}
    def vary(kernel, **o):
        keys.CONFIG[kernel] = {**base[kernel], **o}
        show(f"{kernel} {o}", n=2)
        keys.CONFIG[kernel] = dict(base[kernel])
    end = time.time() + float(sys.argv[3]) if len(sys.argv) > 3 else 1e18
    for kernel, o in [("scan", dict(CHUNK=32)), ("scan", dict(programs=2, maxnreg=248)), ("scan", dict(STAGES=4)), ("scan", dict(FOLD=4)), ("scan", dict(FOLD=4, programs=4, maxnreg=128)),
                      ("sum", dict(STAGES=2)), ("refine", dict(STAGES=2, programs=5, maxnreg=96)), ("sum", dict(programs=2, maxnreg=248, STAGES=4)),
                      ("backward_queries", dict(STAGES=3)), ("backward_queries", dict(programs=2, maxnreg=248, STAGES=3)),
                      ("backward_keys", dict(STAGES=3)), ("backward_keys", dict(STEP=32, TRANSPOSED=True, STAGES=3)), ("backward_keys", dict(TRANSPOSED=True)), ("backward_keys", dict(programs=3, maxnreg=168))]:
        if time.time() > end: print("out of time"); break
        vary(kernel, **o)
    # the cost of words alone
    def scan_only(words):
        for q, k, v, alpha, g in cases:
            keys.fwd(q, k, v, alpha, scale, words=words)
    print(f"scan without words {timed(lambda: scan_only(False), 3):.2f}", flush=True)
