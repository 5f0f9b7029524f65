import os; os.environ["TRITON_INTERPRET"]="1"
import sys; sys.path.insert(0, ".")
import torch
from exp import keys
from kernels import entmax_attention
torch.manual_seed(0)
T, H, G, D = 330, 4, 2, 16
q, k, v = torch.randn(1,H,T,D)*2, torch.randn(1,G,T,D)*2, torch.randn(1,G,T,D)
alpha = torch.tensor([1.5,1.2,1.8,1.45])
qr, kr, vr, ar = (x.clone().double().requires_grad_() for x in (q,k,v,alpha))
ref = entmax_attention(qr,kr,vr,alpha=ar,backend="reference")
g = torch.randn(1,H,T,D)
ref.backward(g.double())
for fused in (True, False):
    s = keys.fwd(q,k,v,alpha,D**-.5, fused=fused)
    rel = lambda a,b: float((a-b).norm()/b.norm())
    print("out", rel(s[0], ref))
dq,dk,dv,da = keys.bwd(g,q,k,v,alpha,D**-.5,s)
for n,a,b in (("dq",dq,qr.grad),("dk",dk,kr.grad),("dv",dv,vr.grad),("da",da,ar.grad)): print(n, rel(a,b))
on = ((s[3][0,:,:,:,None] >> torch.arange(32)) & 1).float().mean(); print("bits", on, float(((s[4]>>torch.arange(6)[:,None,None,None,None]) &1).float().mean()))
