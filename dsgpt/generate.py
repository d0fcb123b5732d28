"""Text from a trained model: sampling with temperature and top-k, keys and values cached.

    dsgpt generate runs/my-run --prompt "def main(" --max-new-tokens 100

Trade-off: one sequence at a time, on one device; serving many users at once is a job for an export and a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the most likely token; `top_k` 0 considers all."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


@torch.no_grad()
def generate_ids(model: Any, prompt: list[int], sampling: Sampling, eos_id: int | None) -> Iterator[int]:
    """Yield new token ids until EOS or `max_new_tokens`. The oldest tokens leave the context when it is full."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    context = model.config.max_position_embeddings
    ids, cache = list(prompt), model.new_cache()
    feed = ids[-context:]
    for _ in range(sampling.max_new_tokens):
        if cache.length + len(feed) > context:
            # Positions are absolute in the cache: start over with the newer half of the context.
            cache, feed = model.new_cache(), ids[-max(1, context // 2) :]
        logits = model(torch.tensor([feed], device=device), cache=cache)[0, -1].float()
        token = _sample(logits, sampling, generator)
        if token == eos_id:
            return
        ids.append(token)
        feed = [token]
        yield token


def _sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature <= 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def generate_text(model: Any, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> tuple[str, int]:
    """The continuation of `prompt` as text, and how many tokens it took."""
    ids = ([tokenizer.bos_id] if tokenizer.bos_id is not None else []) + list(tokenizer.encode(prompt))
    if not ids:
        ids = [tokenizer.eos_id or 0]
    new = list(generate_ids(model, ids, sampling, tokenizer.eos_id))
    # Decoded together with the prompt: a token's text can depend on the one before it.
    whole, start = (
        tokenizer.decode(ids + new, skip_special_tokens=True),
        tokenizer.decode(ids, skip_special_tokens=True),
    )
    return whole[len(start) :], len(new)
