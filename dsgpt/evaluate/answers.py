"""Answers that a model writes, compared with those of the records.

    report = evaluate_answers(loaded.model, loaded.tokenizer, questions, writer, batch_size=16)
    print(report.numbers["rougeL"])                 # 0.213 [0.196, 0.231]

Answers are greedy, so that the same model gives the same numbers. Trade-off: metrics of words; whether an answer is true or
helpful they do not know. The perplexity of the references tells whether the model would have said the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsgpt.evaluate.likelihood import reference_losses
from dsgpt.evaluate.metrics import Number, bootstrap, exact_match, mean, rouge, token_f1
from dsgpt.evaluate.questions import PromptWriter, Question, groups_of
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import Prompt, complete
from dsgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerReport:
    """`scores` has for each metric one number a question, in their order; `numbers` their means with intervals.

    `losses` are nats of the references and `reference_tokens` how many tokens those have: nan and 0 where one is too long.
    """

    answers: list[str]
    scores: dict[str, list[float]]
    tokens: int  # that were generated
    losses: list[float]
    reference_tokens: list[int]
    groups: list[str] | None = None

    @property
    def numbers(self) -> dict[str, Number]:
        return {name: mean(values, self.groups) for name, values in self.scores.items()}

    @property
    def perplexity(self) -> Number | None:
        """exp of the mean loss of a reference's token; None where all references are too long."""
        measured = [place for place, count in enumerate(self.reference_tokens) if count]
        if not measured:
            return None
        losses, tokens = np.array(self.losses)[measured], np.array(self.reference_tokens)[measured]
        groups = self.groups and [self.groups[place] for place in measured]
        return bootstrap(lambda drawn: float(np.exp(losses[drawn].sum() / tokens[drawn].sum())), len(measured), groups)


def evaluate_answers(
    model: Any, tokenizer: Tokenizer, questions: Sequence[Question], writer: PromptWriter, batch_size: int = 16
) -> AnswerReport:
    """Ask every question, and score what is said. Raises DataError as `PromptWriter.prompts`."""
    answers, tokens = write_answers(model, tokenizer, questions, writer, batch_size)
    scores = score([question.references for question in questions], answers)
    losses, reference_tokens = reference_losses(model, questions, writer)
    return AnswerReport(answers, scores, tokens, losses, reference_tokens, groups_of(questions))


def score(references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, list[float]]:
    """Of each answer: ROUGE-1, -2 and -L, token F1 and exact match, each with that of its references which it is nearest to
    (Rajpurkar et al. 2016, section 6.1)."""
    pairs = [(one, answer) for its, answer in zip(references, answers, strict=True) for one in its]
    numbers = rouge([one for one, _ in pairs], [answer for _, answer in pairs])
    numbers["token_f1"] = [token_f1(*pair) for pair in pairs]
    numbers["exact_match"] = [exact_match(*pair) for pair in pairs]
    of_each = {name: iter(values) for name, values in numbers.items()}
    return {name: [max(itertools.islice(values, len(its))) for its in references] for name, values in of_each.items()}


def write_answers(
    model: Any, tokenizer: Tokenizer, questions: Sequence[Question], writer: PromptWriter, batch_size: int
) -> tuple[list[str], int]:
    """(the answers, how many tokens were generated for them); inputs in pieces are merged until one answer is left."""
    sampling = Sampling(writer.room, temperature=0)
    answers, tokens = [""] * len(questions), 0
    open_ones: list[tuple[int, list[Prompt]]] = [
        (number, writer.prompts(question)) for number, question in enumerate(questions)
    ]
    while open_ones:
        asked = [prompt for _, prompts in open_ones for prompt in prompts]
        said = iter(complete(model, tokenizer, asked, sampling, batch_size))
        rest: list[tuple[int, list[Prompt]]] = []
        for number, prompts in open_ones:
            parts = [next(said) for _ in prompts]
            tokens += sum(part.tokens for part in parts)
            merged = "\n".join(text for part in parts if (text := part.text.strip()))
            if len(parts) == 1 or not merged:  # or nothing was said of any piece
                answers[number] = merged
                continue
            further = writer.prompts(questions[number], merged)
            if len(further) >= len(prompts):  # answers as long as their pieces: this would not end
                writer.counts["merged in part"] += 1
                further = further[:1]
            rest.append((number, further))
        open_ones = rest
    return answers, tokens
