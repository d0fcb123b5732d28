"""Which token comes next: repetition penalty, temperature, top-k and top-p, in this order, as transformers applies them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsgpt.errors import NumericalError

_GREEDY = 1e-4  # below this temperature the likeliest token has all of the probability, or nearly


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    max_new_tokens       at most; what the context has room for is another limit
    temperature          logits are divided by it; 0 takes the most likely token
    top_k                only the k most likely tokens; 0 is all
    top_p                only the most likely tokens that make up this probability (Holtzman et al. 2020, section 3.1)
    repetition_penalty   what was there already: positive logits are divided by it, negative ones multiplied
                         (Keskar et al. 2019, section 4.1); 1 is none
    stop                 strings that end the text, and are not part of it
    seed                 of this row alone: it gives the same tokens whatever else is in the batch
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Sampler:
    """The choices of one row: its random numbers, and what it has said."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int, device: torch.device):
        self._sampling = sampling
        # Random numbers of the CPU: the same on every device.
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[prompt] = True

    def choose(self, logits: Tensor) -> int:
        """The next token, given its logits (V,) in fp32. Raises NumericalError where they are no numbers."""
        penalty = self._sampling.repetition_penalty
        if self._seen is not None:
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        # What is not a number counts as the largest, to argmax as to topk; where that is infinite, all others are lost.
        largest = logits.argmax()
        if not logits[largest].isfinite():
            raise NumericalError("the model's logits are not numbers", do="evaluate it: its weights may have diverged")
        token = int(largest) if self._sampling.temperature < _GREEDY else self._draw(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, logits: Tensor) -> int:
        top_k = min(self._sampling.top_k or logits.numel(), logits.numel())
        values, ids = logits.topk(top_k)
        probabilities = ((values - values[0]) / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            more_likely = probabilities.cumsum(-1) - probabilities
            more_likely[0] = -1.0  # the likeliest stays, however small top_p is
            probabilities = probabilities.masked_fill(more_likely >= self._sampling.top_p, 0.0)
        return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=self._generator)])
