"""What transformers' masks say, in the arguments of entmax_attention: a registered mask function.

transformers describes a mask by a function of (batch row, head, query, key) and a 2-d padding mask. Here the function
is recognised, not evaluated (that would take time and memory of Tq * Tk), and what is not recognised is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

# the code objects of the functions that masking_utils puts together
CODE = {
    "and": masking_utils.and_masks().__code__,
    "window": masking_utils.sliding_window_overlay(1).__code__,
    "same document": masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__,
    "within documents": masking_utils.remap_positions_for_packed_sequence(
        masking_utils.causal_mask_function, torch.empty(0)
    ).__code__,
}


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees, for the layers of one forward pass.

    n_keys: Tk. kv_lens: int32 (B,), valid keys of each row, None for all. keys_from: int64 (B, Tk), the key that comes
    to stand at each place, which puts a row's real keys first; None for no change. queries_from, outputs_from: int64
    (B, Tq), the same for queries, whose real ones come last, and the way back. cu_seqlens: int32 (documents + 1,) of
    the batch's rows laid end to end. unpadded: no padding mask was given, so that positions may show documents.
    """

    causal: bool
    n_keys: int
    window: int | None = None
    kv_lens: Tensor | None = None
    keys_from: Tensor | None = None
    queries_from: Tensor | None = None
    outputs_from: Tensor | None = None
    cu_seqlens: Tensor | None = None
    unpadded: bool = False

    def to(self, *args: Any, **kwargs: Any) -> "Visibility":
        moved: dict[str, Any] = {}
        moved |= {name: x.to(*args, **kwargs) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


class EntmaxMask(Tensor):
    """The padding mask, bool (B, tokens seen), True for real tokens, with its Visibility.

    A 2-d tensor, since transformers makes a mask of a mask where `generate` has made one before the model does."""

    visibility: Visibility | None = None

    def to(self, *args: Any, **kwargs: Any) -> "EntmaxMask":  # type: ignore[override]
        """To another device, as where layers lie on several."""
        moved = super().to(*args, **kwargs)
        assert isinstance(moved, EntmaxMask)
        if moved is not self and self.visibility is not None:
            moved.visibility = self.visibility.to(moved.device)
        return moved


@torch.compiler.disable  # it looks into functions and at values: one graph break a mask, none a layer
def entmax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> EntmaxMask:
    """For AttentionMaskInterface, whose arguments these are. Query i stands at q_offset + i, key j at kv_offset + j.

    Raises: ValueError for masks that entmax_attention cannot represent.
    """
    causal, window, documents = _recognised(mask_function)
    seen = kv_offset + kv_length
    if attention_mask is None:
        real = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    else:
        real = attention_mask.as_subclass(Tensor).bool()
        real = torch.nn.functional.pad(real, (0, max(seen - real.shape[1], 0)))
    visibility = Visibility(causal, kv_length, window, unpadded=attention_mask is None)
    if documents is not None and bool((documents != documents[:, :1]).any()):
        visibility = replace(visibility, cu_seqlens=_boundaries(documents))
    elif causal:
        visibility = _causal(visibility, real, q_length, q_offset, kv_offset)
    elif attention_mask is not None:
        visibility = _bidirectional(visibility, real[:, kv_offset:seen])
    mask = real.as_subclass(EntmaxMask)
    mask.visibility = visibility
    return mask


def _recognised(function: Callable) -> tuple[bool, int | None, Tensor | None]:
    """Causal or bidirectional, window, and the document of each token (B, T), of a mask function."""
    if function is masking_utils.causal_mask_function:
        return True, None, None
    if function is masking_utils.bidirectional_mask_function:
        return False, None, None
    kind, inside = _parts(function)
    if kind == "and" and len(parts := inside["mask_functions"]) == 2:
        (first, kept), (second, mapped) = _parts(parts[0]), _parts(parts[1])
        if first == "window" and parts[1] is masking_utils.causal_mask_function:
            return True, kept["sliding_window"], None
        if first == "same document" and second == "within documents":
            causal, window, documents = _recognised(mapped["mask_function"])
            if documents is None and causal:
                return True, window, kept["packed_sequence_mask"]
    raise ValueError(
        "entmax attention takes causal and bidirectional masks, causal sliding windows, packed documents and padding, "
        f"got a mask by {getattr(function, '__qualname__', function)}: take attn_implementation='eager' for this model"
    )


def _parts(function: Callable) -> tuple[str | None, dict[str, Any]]:
    """Which of CODE a function is, and the variables that it holds."""
    code = getattr(function, "__code__", None)
    kind = next((name for name, known in CODE.items() if known is code), None)
    if code is None or kind is None:
        return None, {}
    cells = function.__closure__ or ()  # type: ignore[attr-defined]
    return kind, dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _boundaries(documents: Tensor) -> Tensor:
    """int32 (documents + 1,) of rows laid end to end; each row begins a document."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([documents.numel()])]).int()


def _causal(visibility: Visibility, real: Tensor, q_length: int, q_offset: int | Tensor, kv_offset: int) -> Visibility:
    """entmax_attention's last query stands at the last valid key: a row's real keys are put first, its real queries
    last. Where all padding stands behind what sees it nothing has to move."""
    n_keys, batch, device = visibility.n_keys, real.shape[0], real.device
    written = q_offset + q_length - kv_offset  # of the keys: a static cache has room behind them
    ahead = isinstance(written, Tensor) or written < n_keys
    padded = not visibility.unpadded
    if padded:
        tokens = real[:, kv_offset : kv_offset + int(written)]
        ended = bool((tokens[:, :-1] >= tokens[:, 1:]).all())
        padded = not (bool(tokens.all()) or (ended and tokens.shape[1] == q_length))
        starts = tokens.int().diff(dim=1, prepend=tokens.new_zeros(batch, 1).int()) == 1
        if padded and visibility.window is not None and bool((starts.sum(1) > 1).any()):
            raise ValueError(
                "attention_mask must have a row's real tokens side by side where a sliding window counts them, got "
                f"padding between them in row {int((starts.sum(1) > 1).int().argmax())}"
            )
    if not padded:
        lens = torch.as_tensor(written, dtype=torch.int32, device=device).expand(batch) if ahead else None
        return replace(visibility, kv_lens=lens)
    keys = real[:, kv_offset : kv_offset + n_keys]
    if ahead:
        keys = keys & (torch.arange(n_keys, device=device) < written)
    queries = real[:, torch.arange(q_length, device=device) + q_offset]
    queries_from = queries.byte().argsort(dim=1, stable=True)
    return replace(
        visibility,
        kv_lens=keys.sum(1, dtype=torch.int32),
        keys_from=(~keys).byte().argsort(dim=1, stable=True),
        queries_from=queries_from,
        outputs_from=queries_from.argsort(dim=1),
    )


def _bidirectional(visibility: Visibility, real: Tensor) -> Visibility:
    if not bool(real.all()):
        keys_from = (~real).byte().argsort(dim=1, stable=True)
        return replace(visibility, kv_lens=real.sum(1, dtype=torch.int32), keys_from=keys_from)
    return visibility
