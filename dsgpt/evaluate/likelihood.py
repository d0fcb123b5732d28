"""How likely a model finds given answers, without generating.

    log_likelihoods(model, prompt, answers, batch_size=32)         # nats of each of several answers to one prompt
    losses, tokens = reference_losses(model, questions, writer)    # of the right answer to each question

A prompt is read once; its answers continue from the same keys and values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dsgpt.errors import DataError
from dsgpt.evaluate.questions import PromptWriter, Question
from dsgpt.generate.decoder import Decoder
from dsgpt.model.functional import IGNORE_INDEX


@torch.no_grad()
def log_likelihoods(
    model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Nats of each answer after the prompt; both together fit into the context."""
    device = next(model.parameters()).device
    start = Decoder(model).new_cache()
    first = model(torch.tensor([prompt], device=device), cache=start, last_only=True)[0, -1].float().log_softmax(-1)
    sums: list[float] = []
    for begin in range(0, len(answers), batch_size):
        part = answers[begin : begin + batch_size]
        width = max(1, max(len(answer) for answer in part) - 1)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        labels = torch.full((len(part), width), IGNORE_INDEX)
        for row, answer in enumerate(part):
            ids[row, : len(answer) - 1] = torch.tensor(answer[:-1], dtype=torch.long)
            labels[row, : len(answer) - 1] = torch.tensor(answer[1:], dtype=torch.long)
        ids, labels = ids.to(device), labels.to(device)
        logits = model(ids, cache=start.repeat(len(part))).float().log_softmax(-1)
        picked = logits.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
        rest = torch.where(labels == IGNORE_INDEX, 0.0, picked).sum(1)
        sums += [float(first[answer[0]] + its) for answer, its in zip(part, rest, strict=True)]
    return sums


def reference_losses(model: Any, questions: Sequence[Question], writer: PromptWriter) -> tuple[list[float], list[int]]:
    """(nats of each question's own answer, end of the turn included; how many tokens it has).

    Of an input that is too long the lead is read. An answer that leaves no room for its question has nan and 0 tokens.
    """
    losses, tokens = [], []
    for question in questions:
        shared, (answer,) = writer.continuations(replace(question, messages=(), input="x"), [question.answer])
        room = min(len(answer), writer.context - 1)
        try:
            prompt = replace(writer, room=room, long_input="lead", counts=Counter()).prompts(question)[0].ids
        except DataError:
            losses.append(math.nan)
            tokens.append(0)
            continue
        losses.append(-log_likelihoods(model, prompt[: len(prompt) - shared], [answer], 1)[0])
        tokens.append(len(answer))
    return losses, tokens
