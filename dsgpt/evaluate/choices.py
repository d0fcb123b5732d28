"""The likeliest of given answers, without generating: classification, routing, multiple choice.

    report = evaluate_choices(loaded.model, loaded.tokenizer, questions, writer)
    report.accuracy, report.macro_f1, report.majority

The likelihood of a choice is that of all its tokens after the prompt and of the end of the turn, as the model was taught
them: what it would say, of all it could say. A question is read once; its choices continue from the same keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsgpt.errors import ConfigError
from dsgpt.evaluate.likelihood import log_likelihoods
from dsgpt.evaluate.metrics import Number, bootstrap_within, macro_f1, mean
from dsgpt.evaluate.questions import PromptWriter, Question, groups_of
from dsgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceReport:
    """`chosen` and `answers` are texts, `losses` the nats of each right answer and `tokens` how many tokens those have.

    `chance` is the accuracy of guessing among the choices, `majority` that of always giving the most frequent answer of
    this file, and `majority_macro_f1` its macro-F1.
    """

    chosen: list[str]
    answers: list[str]
    losses: list[float]
    tokens: list[int]
    chance: float
    groups: list[str] | None = None

    @property
    def correct(self) -> list[float]:
        return [float(one == two) for one, two in zip(self.chosen, self.answers, strict=True)]

    @property
    def accuracy(self) -> Number:
        return mean(self.correct, self.groups)

    @property
    def macro_f1(self) -> Number:
        answers, chosen = np.array(self.answers), np.array(self.chosen)
        return bootstrap_within(lambda indices: macro_f1(answers[indices], chosen[indices]), self.answers)

    @property
    def majority(self) -> float:
        return Counter(self.answers).most_common(1)[0][1] / len(self.answers)

    @property
    def majority_macro_f1(self) -> float:
        """Always the most frequent answer: only that class has hits."""
        return 2 * self.majority / (1 + self.majority) / len(set(self.answers))

    @property
    def loss(self) -> float:
        """Nats per token of the right answers."""
        return sum(self.losses) / sum(self.tokens)


def evaluate_choices(
    model: Any, tokenizer: Tokenizer, questions: Sequence[Question], writer: PromptWriter, batch_size: int = 32
) -> ChoiceReport:
    """Choose among each question's own choices, or else among all answers of the file.

    Raises DataError as `PromptWriter.prompts`, and ConfigError for inputs in pieces, of which each would choose for itself.
    """
    if writer.long_input == "chunk_and_merge":
        raise ConfigError("a choice is made once, not for each piece of an input", do="--long-input lead, or refuse")
    everything = sorted({question.answer for question in questions})
    report = ChoiceReport([], [], [], [], 0.0)
    chances = []
    taught: dict[tuple[str, ...], tuple[int, list[list[int]]]] = {}  # the same after every question
    for question in questions:
        choices = list(question.choices) or everything
        key = tuple(choices)
        if key not in taught:
            taught[key] = writer.continuations(replace(question, messages=(), input="x"), choices)
        shared, answers = taught[key]
        writer.room = max(map(len, answers))
        ids = writer.prompts(question)[0].ids
        sums = log_likelihoods(model, ids[: len(ids) - shared], answers, batch_size)
        right = choices.index(question.answer)
        report.chosen.append(choices[int(np.argmax(sums))])
        report.answers.append(question.answer)
        report.losses.append(-sums[right])
        report.tokens.append(len(answers[right]))
        chances.append(1 / len(choices))
    return replace(report, chance=float(np.mean(chances)), groups=groups_of(questions))
