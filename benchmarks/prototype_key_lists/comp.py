import os, sys, re, subprocess
sys.path.insert(0, ".")
import torch
import tests.kernels.compile_for_hopper as ch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
driver.set_active(ch.Hopper())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: ch.Properties
run = JITFunction.run
PT = {}
def compile_only(self, *args, grid, warmup, **options):
    options.pop("x", None)
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    name = self.fn.__name__
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    open(f"/tmp/{name}.ptx", "w").write(ptx); open(f"/tmp/{name}.ttgir", "w").write(ttgir)
    cub = compiled.asm["cubin"]; open(f"/tmp/{name}.cubin", "wb").write(cub)
    print(name, "shared", compiled.metadata.shared, "cvt", ttgir.count("convert_layout"), "shfl", ptx.count("shfl.sync"), "bar", ptx.count("bar.sync"), "wgmma", ptx.count("wgmma.mma"), "spill?", len(re.findall(r"ld\.local", ptx)))
    return compiled
JITFunction.run = compile_only
from exp import keys
orig = keys.launch
def launch(kernel, name, tasks, **kw):
    c = dict(keys.CONFIG[name]); c.pop("programs")
    kernel[(kw.pop("n_programs"),)](n_tasks=tasks, **c, **kw)
keys.launch = launch
T, H, G, D = 256, 2, 1, 64
q, k, v = (torch.randn(1, h, T, D).bfloat16() for h in (H, G, G))
alpha = torch.tensor([1.5, 1.4])
import kernels.entmax_triton, kernels.tiles
keys.write_intervals = lambda *a: None
s = keys.fwd(q, k, v, alpha, D ** -.5, fused=False)
keys.fwd(q, k, v, alpha, D ** -.5, fused=True)
keys.bwd(q, q, k, v, alpha, D ** -.5, s)
