"""Alpha-entmax attention as a package, for code outside of this recipe: `pip install .` in the checkout, or a wheel.

Needs torch and triton alone; register, add_alpha and load_alpha need transformers too (`pip install longsplash[hub]`)
and import it when they are called. A wheel holds this folder and kernels/ as longsplash.kernels, so that Hugging Face's
package of the name kernels keeps its place.

    from longsplash import entmax_attention, entmax
    out = entmax_attention(q, k, v, alpha=1.5, causal=True)

block_sparse_attention is what kernels/ calls block_sparse_softmax_attention: softmax attention that leaves out blocks
of keys, for prefill.
"""

from kernels import block_sparse_softmax_attention as block_sparse_attention
from kernels import entmax, entmax_attention
from longsplash.models import add_alpha, load_alpha
from longsplash.registering import register

__version__ = "0.1.0"

__all__ = ["add_alpha", "block_sparse_attention", "entmax", "entmax_attention", "load_alpha", "register"]
