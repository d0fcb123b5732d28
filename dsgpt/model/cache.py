"""Keys and values of the positions already seen, for generation, of rows that begin and leave at different times.

    cache = model.new_cache()
    logits = model(prompt, cache=cache)             # (1, T, V)
    several = cache.repeat(4)                       # to go on from it in four ways
    cache.join(other)                               # the rows of another cache come after its own
    cache.keep([0, 2])                              # the others have ended

Rows end together: of S columns row b fills the last S - starts[b], and the columns before are padding that nothing looks at.
So one step of all rows adds one column to all.

Trade-off: a joining row is copied once, and a row that is shorter than the longest costs memory as if it were as long; pages
of a fixed size would not, but need an attention kernel of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SPARE_COLUMNS = 64  # added whenever a layer is full, so that a step copies nothing but its own column


class KeyValueCache:
    """One pair (B, K, S, D) per layer, of B rows; `starts` is empty where no row has padding."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []  # with columns to spare
        self._filled: list[int] = []
        self.starts: list[int] = []

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._buffers, self._filled, strict=True)
        return [(keys[:, :, :filled], values[:, :, :filled]) for (keys, values), filled in pairs]

    @layers.setter
    def layers(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._buffers, self._filled = pairs, [keys.shape[2] for keys, _ in pairs]

    @property
    def length(self) -> int:
        return self.length_of(0)

    def length_of(self, layer: int) -> int:
        """Columns of a layer, which in the middle of a forward pass has those of this pass or not yet."""
        return self._filled[layer] if layer < len(self._filled) else 0

    @property
    def num_rows(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add columns to a layer; all its keys and values."""
        if layer == len(self._buffers):
            self._buffers.append((keys, values))
            self._filled.append(keys.shape[2])
            return keys, values
        old, end = self._filled[layer], self._filled[layer] + keys.shape[2]
        if end > self._buffers[layer][0].shape[2]:
            more = end - old + _SPARE_COLUMNS
            self._buffers[layer] = tuple(F.pad(x[:, :, :old], (0, 0, 0, more)) for x in self._buffers[layer])
        for buffer, new in zip(self._buffers[layer], (keys, values), strict=True):
            buffer[:, :, old:end] = new
        self._filled[layer] = end
        all_keys, all_values = self._buffers[layer]
        return all_keys[:, :, :end], all_values[:, :, :end]

    def first_columns(self, device: torch.device) -> Tensor | None:
        """(B,) where each row begins; None where all begin with the first column."""
        return torch.tensor(self.starts, device=device) if self.starts else None

    def positions(self, input_ids: Tensor) -> Tensor:
        """(B, T) of the tokens that come next: each row counts from its own beginning."""
        here = torch.arange(self.length, self.length + input_ids.shape[1], device=input_ids.device)[None]
        starts = self.first_columns(input_ids.device)
        return here.expand_as(input_ids) if starts is None else here - starts[:, None]

    def repeat(self, times: int) -> KeyValueCache:
        """Another cache, in which the one row of this one stands so often."""
        other = type(self)()
        for layer, pair in enumerate(self.layers):
            other.append(layer, *(x.expand(times, -1, -1, -1) for x in pair))
        return other

    def join(self, other: KeyValueCache) -> None:
        """Take over the rows of another cache, after these."""
        length = max(self.length, other.length)
        starts = [length - one.length + start for one in (self, other) for start in one.starts or [0] * one.num_rows]
        pairs = zip(self.layers, other.layers, strict=True)
        self.layers = [
            (
                torch.cat((_pad(keys, length), _pad(more_keys, length))),
                torch.cat((_pad(values, length), _pad(more_values, length))),
            )
            for (keys, values), (more_keys, more_values) in pairs
        ]
        self._set_starts(starts)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns that only they filled."""
        starts = [self.starts[row] for row in rows] if self.starts else [0] * len(rows)
        first = min(starts, default=0)
        self.layers = [(keys[rows, :, first:], values[rows, :, first:]) for keys, values in self.layers]
        self._set_starts([start - first for start in starts])

    def _set_starts(self, starts: list[int]) -> None:
        self.starts = starts if any(starts) else []


def _pad(x: Tensor, length: int) -> Tensor:
    """(B, K, S, D) -> (B, K, length, D), with zeros before."""
    return F.pad(x, (0, 0, length - x.shape[2], 0)) if x.shape[2] < length else x
