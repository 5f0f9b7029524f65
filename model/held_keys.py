"""Memory of the keys and values that eviction leaves: heads together where they keep as many, else each by itself."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

SPARE = 256  # tokens that there is room for beyond those that are held, whenever memory is allocated


@dataclass
class HeldKeys:
    """Heads of one layer that hold as many keys as each other: the first `length` of keys and values, (g, slots, D).
    places: int64 (g, slots), their positions in the text, where ALiBi asks for them. own: no other cache's memory."""

    keys: Tensor
    values: Tensor
    places: Tensor | None
    length: int
    own: bool = False

    def append(self, k: Tensor, v: Tensor, place: int) -> None:
        """k, v: (g, D)."""
        if self.length == self.keys.shape[1]:
            self._move(slice(None))
        self.length += 1
        self.replace(self.length - 1, k, v, place)

    def replace(self, slot: int, k: Tensor, v: Tensor, place: int) -> None:
        """In place of a key that is forgotten. k, v: (g, D)."""
        self.keys[:, slot], self.values[:, slot] = k, v
        if self.places is not None:
            self.places[:, slot] = place

    def keep(self, kept: Tensor) -> list["HeldKeys"]:
        """What is left of it. kept: bool (g, length)."""
        counts = kept.sum(-1).tolist()
        if len(set(counts)) > 1:
            return [part for i in range(len(counts)) for part in self._head(i).keep(kept[i : i + 1])]
        if self.own and self.keys.shape[1] - counts[0] <= SPARE:
            self._close_up(kept)
        else:
            self._move(kept)
        return [self]

    def _head(self, i: int) -> "HeldKeys":
        places = None if self.places is None else self.places[i : i + 1]
        return HeldKeys(self.keys[i : i + 1], self.values[i : i + 1], places, self.length)

    def _move(self, kept: Tensor | slice) -> None:
        """Into memory of their own, with room."""

        def moved(x: Tensor) -> Tensor:
            held = x[:, : self.length]
            held = held if isinstance(kept, slice) else held[kept].unflatten(0, (len(x), -1))
            return pad(held, (0,) * (2 * x.dim() - 4) + (0, SPARE))

        length = self.length if isinstance(kept, slice) else int(kept[0].sum())
        places = None if self.places is None else moved(self.places)
        self.keys, self.values, self.places, self.length = moved(self.keys), moved(self.values), places, length
        self.own = True

    def _close_up(self, kept: Tensor) -> None:
        """Within its memory. kept: bool (g, length), as many of each head."""
        length = int(kept[0].sum())
        for x in self.tensors:
            x[:, :length] = x[:, : self.length][kept].unflatten(0, (len(x), -1))
        self.length = length

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values, self.places) if x is not None]
