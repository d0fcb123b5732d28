"""Keys and values of the positions already seen, for generation, of rows that begin and leave at different times.

    cache = model.new_cache()
    logits = model(prompt, cache=cache)             # (1, T, V)
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


class KeyValueCache:
    """One pair (B, K, S, D) per layer, of B rows; `starts` is empty where no row has padding."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.starts: list[int] = []

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def num_rows(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add columns to a layer; all its keys and values."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = (torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2))
        return self.layers[layer]

    def first_columns(self, device: torch.device) -> Tensor | None:
        """(B,) where each row begins; None where all begin with the first column."""
        return torch.tensor(self.starts, device=device) if self.starts else None

    def positions(self, input_ids: Tensor) -> Tensor:
        """(B, T) of the tokens that come next: each row counts from its own beginning."""
        here = torch.arange(self.length, self.length + input_ids.shape[1], device=input_ids.device)[None]
        starts = self.first_columns(input_ids.device)
        return here.expand_as(input_ids) if starts is None else here - starts[:, None]

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
