"""Makes entmax attention and the models of longsplash.hub known to transformers, which is imported by that call."""

from longsplash.models import DEFAULT_NAME, register_attention


def register(alpha: float = 1.5, *, name: str = DEFAULT_NAME, backend: str = "auto") -> None:
    """Makes `attn_implementation=name` mean alpha-entmax attention in transformers, for each model that takes its
    attention from transformers' interface: `from_pretrained(..., attn_implementation="entmax")`, or
    `model.set_attn_implementation("entmax")` later. Called again it replaces what the name meant.

    Weights are alpha-entmax of the scaled scores where the model's were softmax: a model trained with softmax has to be
    trained on before its outputs mean anything. Padding on either side, caches, `generate`, sliding windows, packed
    documents by position_ids, grouped-query heads and encoders are taken as transformers' own attention takes them; a
    padded token's own output is no meaningful number. docs/pip.md lists what is refused.

    It also makes transformers' Auto classes load models that the recipe has trained with entmax (longsplash.hub); they
    have their own alpha.

    Args:
        alpha: number in (1, 2], from 1.0001 on, of all heads; 1.5 is entmax-1.5, 2 is sparsemax. Modules that add_alpha
            gave a parameter take that.
        name: for attn_implementation, such as "entmax-1.25" beside "entmax".
        backend: as in entmax_attention.

    Raises: ImportError without transformers; TypeError or ValueError naming the argument, its value and what was
    expected. The models raise ValueError for what entmax attention cannot represent: dropout while training, capped
    scores, attention sinks, position biases, masks of their own making, bidirectional windows, paged caches.
    """
    register_attention(alpha, name=name, backend=backend)
    import longsplash.hub  # noqa: F401 — makes the Auto classes know them
