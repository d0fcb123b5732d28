"""The keys and values of a model of transformers, and whether it keeps them as one expects."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsgpt.errors import ConfigError
from dsgpt.model.cache import KeyValueCache
from dsgpt.model.functional import MAX_DIFFERENCE


class HFCache(KeyValueCache):
    """The same for a model of transformers. Layers that see a window keep all columns too: the mask hides them."""

    @property
    def past(self) -> Any:
        """What the model is given; made anew each time, so that nothing but the caller holds the memory."""
        return _past_class()(self)


@cache
def _past_class() -> type:
    from transformers import DynamicCache

    class Past(DynamicCache):
        """Transformers' view of our buffers, which grow in place; its own copies all columns to add one."""

        def __init__(self, columns: KeyValueCache):
            super().__init__()
            self.columns = columns

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
        ) -> tuple[Tensor, Tensor]:
            return self.columns.append(layer_idx, key_states, value_states)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.columns.length_of(layer_idx)

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self.columns.length_of(layer_idx) + query_length, 0

    return Past


@torch.no_grad()
def check_cache(model: Any) -> None:
    """Compare two joined rows, decoded token by token, with one pass over each; once for a model.

    Raises ConfigError where an architecture keeps something else than keys and values, or nothing.
    """
    if model.cache_checked:
        return
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rows = [torch.randint(vocabulary, (1, length), generator=generator).to(parameter.device) for length in (9, 5)]
    try:
        caches = [model.new_cache() for _ in rows]
        for ids, cache in zip(rows, caches, strict=True):
            model(ids[:, :-2], cache=cache)
        caches[0].join(caches[1])
        steps = [model(torch.cat([ids[:, at, None] for ids in rows]), cache=caches[0])[:, -1] for at in (-2, -1)]
        whole = [torch.cat([model(ids)[:, at] for ids in rows]) for at in (-2, -1)]
        seen = max(float((one - two).abs().max() / two.std()) for one, two in zip(steps, whole, strict=True))
    except Exception as error:  # each architecture has its own
        raise ConfigError(
            "this architecture cannot generate here: it keeps no keys and values of the usual kind",
            seen=f"{type(model).__name__}: {error!r:.200}",
            do="its loss can be evaluated; to generate, export it and use transformers",
        ) from error
    if not seen <= MAX_DIFFERENCE[parameter.dtype]:
        raise ConfigError(
            "this architecture cannot generate here: from cached keys and values it gives other logits",
            seen=f"{type(model).__name__}: they differ by {seen:.2g} of their spread",
            do="its loss can be evaluated; to generate, export it and use transformers",
        )
    model.cache_checked = True
