"""Alpha-entmax attention as a package, for code outside of this recipe: `pip install .` in the checkout, or a wheel.

Needs torch and triton alone; register, add_alpha and load_alpha need transformers too (`pip install longsplash[hub]`)
and import it when they are called. A wheel holds this folder and kernels/ as longsplash.kernels, so that Hugging Face's
package of the name kernels keeps its place.

    from longsplash import entmax_attention, entmax
    out = entmax_attention(q, k, v, alpha=1.5, causal=True)

block_sparse_attention is what kernels/ calls block_sparse_softmax_attention: softmax attention that leaves out blocks
of keys, for prefill.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longsplash.public import add_alpha, block_sparse_attention, entmax, entmax_attention, load_alpha, register

__version__ = "0.1.0"

__all__ = ["add_alpha", "block_sparse_attention", "entmax", "entmax_attention", "load_alpha", "register"]


def __getattr__(name: str) -> Any:
    """One of the names above (PEP 562): torch, triton and the kernels take seconds, which `import longsplash` alone,
    as plugins and `longsplash.hub` do it, need not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longsplash import public

    globals().update((each, getattr(public, each)) for each in __all__)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
