"""Rows of different lengths decoded together: each step gives every row one token, and rows join and leave between steps.

    decoder = Decoder(model)
    row = decoder.add(prompt, Sampling(temperature=0), end_ids={2})    # reads the prompt, chooses the first token
    while decoder.rows:
        for row in decoder.step(): ...                                 # row.new[-1]; row.finish once it has ended

Trade-off: prompts are read one at a time, while the other rows wait, but nothing is computed twice or for padding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsgpt.errors import DataError, NumericalError
from dsgpt.generate.sampling import Sampler, Sampling
from dsgpt.model.cache import KeyValueCache
from dsgpt.model.gpt import GPT

Finish = Literal["stop", "length"]


@dataclass
class Row:
    """A prompt and its continuation so far. `finish`: "stop" at an end token or string, "length" where the limit or the
    context ended it, None while it goes on; the end token is not part of `new`."""

    prompt: list[int]
    limit: int
    end_ids: Collection[int]
    sampler: Sampler
    new: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: NumericalError | None = None  # what ended it, where that was no end

    def choose(self, logits: Tensor) -> None:
        """Take the next token, given its logits (V,). An error ends this row alone."""
        try:
            token = self.sampler.choose(logits.float())
        except NumericalError as error:
            self.error, self.finish = error, "stop"
            return
        if token in self.end_ids:
            self.finish = "stop"
            return
        self.new.append(token)
        if len(self.new) == self.limit:
            self.finish = "length"


def refuse_prompt(num_tokens: int, context: int, name: str = "the prompt") -> None:
    """Raise DataError for a prompt that is empty or leaves no room for a token."""
    if not num_tokens:
        what = f"{name} is empty, and the tokenizer has no token that begins a text"
        raise DataError(what, do="give at least a word")
    if num_tokens >= context:
        raise DataError(
            f"{name} does not fit into the model's context",
            seen=f"{num_tokens} tokens, context {context}",
            do=f"shorten it to {context - 1} tokens at most",
        )


class Decoder:
    """Decodes with a model in evaluation mode, on the device it is on. Raises ConfigError where that keeps no such cache."""

    def __init__(self, model: Any):
        if not isinstance(model, GPT):
            from dsgpt.model.hf_cache import check_cache

            check_cache(model)
        self._model = model
        self._device = next(model.parameters()).device
        self.context: int = model.config.max_position_embeddings
        self.rows: list[Row] = []
        self._cache: KeyValueCache = model.new_cache()

    @torch.no_grad()
    def add(self, prompt: list[int], sampling: Sampling, end_ids: Collection[int] = ()) -> Row:
        """A new row, with its first token. Raises DataError as `refuse_prompt`, and then changes nothing."""
        refuse_prompt(len(prompt), self.context)
        self._drop_finished()
        sampler = Sampler(sampling, prompt, self._model.config.vocab_size, self._device)
        row = Row(list(prompt), min(sampling.max_new_tokens, self.context - len(prompt)), end_ids, sampler)
        cache = self._model.new_cache()
        logits = self._model(torch.tensor([prompt], device=self._device), cache=cache, last_only=True)
        row.choose(logits[0, -1])
        if self.rows:
            self._cache.join(cache)
        else:
            self._cache = cache
        self.rows.append(row)
        return row

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One more token for each row that has not ended; these rows, of which some may have ended now."""
        self._drop_finished()
        if not self.rows:
            return []
        last = torch.tensor([[row.new[-1]] for row in self.rows], device=self._device)
        logits = self._model(last, cache=self._cache, last_only=True)[:, -1]
        for row, its in zip(self.rows, logits, strict=True):
            row.choose(its)
        return list(self.rows)

    def new_cache(self) -> KeyValueCache:
        """An empty one of this model, which was checked to keep it."""
        return self._model.new_cache()

    def clear(self) -> None:
        """Forget all rows, as after a failure."""
        self.rows, self._cache = [], self._model.new_cache()

    def _drop_finished(self) -> None:
        kept = [number for number, row in enumerate(self.rows) if row.finish is None]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[number] for number in kept]
            if kept:
                self._cache.keep(kept)
            else:
                self._cache = self._model.new_cache()
