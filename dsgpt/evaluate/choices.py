"""The likeliest of given answers, without generating: classification, routing, multiple choice.

    report = evaluate_choices(loaded.model, loaded.tokenizer, questions, writer)
    report.accuracy, report.macro_f1, report.majority

The likelihood of a choice is that of all its tokens after the prompt and of the end of the turn, as the model was taught
them: what it would say, of all it could say. Beside it stands the choice by pointwise mutual information: by how much the
input makes it likelier than the question without input does (Holtzman et al. 2021, "Surface Form Competition", section 3),
because a weak model prefers some answers whatever is asked. A question is read once; its choices continue from the same keys
and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dsgpt.errors import ConfigError
from dsgpt.evaluate.likelihood import log_likelihoods
from dsgpt.evaluate.metrics import Number, bootstrap_within, macro_f1, mean
from dsgpt.evaluate.questions import PromptWriter, Question, groups_of
from dsgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceReport:
    """`chosen` (by likelihood), `chosen_pmi` and `answers` are texts, `losses` the nats of each right answer and `tokens` how
    many tokens those have.

    `chance` is the accuracy of guessing among the choices, `majority` that of always giving the most frequent answer of
    this file, and `majority_macro_f1` its macro-F1.
    """

    chosen: list[str]
    answers: list[str]
    losses: list[float]
    tokens: list[int]
    chance: float
    groups: list[str] | None = None
    chosen_pmi: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> Number:
        return self._accuracy(self.chosen)

    @property
    def accuracy_pmi(self) -> Number:
        return self._accuracy(self.chosen_pmi)

    @property
    def macro_f1(self) -> Number:
        return self._macro_f1(self.chosen)

    @property
    def macro_f1_pmi(self) -> Number:
        return self._macro_f1(self.chosen_pmi)

    def _accuracy(self, chosen: list[str]) -> Number:
        return mean([float(one == two) for one, two in zip(chosen, self.answers, strict=True)], self.groups)

    def _macro_f1(self, chosen: list[str]) -> Number:
        answers, found = np.array(self.answers), np.array(chosen)
        return bootstrap_within(lambda indices: macro_f1(answers[indices], found[indices]), self.answers)

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
    known: dict[tuple[str, ...], tuple[int, list[list[int]], np.ndarray]] = {}  # the same after every question
    for question in questions:
        choices = list(question.choices) or everything
        key = (question.instruction, *choices)
        if key not in known:
            known[key] = _without_input(model, question, choices, writer, batch_size)
        shared, answers, prior = known[key]
        writer.room = max(map(len, answers))
        ids = writer.prompts(question)[0].ids
        sums = np.array(log_likelihoods(model, ids[: len(ids) - shared], answers, batch_size))
        right = choices.index(question.answer)
        report.chosen.append(choices[int(sums.argmax())])
        report.chosen_pmi.append(choices[int((sums - prior).argmax())])
        report.answers.append(question.answer)
        report.losses.append(-float(sums[right]))
        report.tokens.append(len(answers[right]))
        chances.append(1 / len(choices))
    return replace(report, chance=float(np.mean(chances)), groups=groups_of(questions))


def _without_input(
    model: Any, question: Question, choices: list[str], writer: PromptWriter, batch_size: int
) -> tuple[int, list[list[int]], np.ndarray]:
    """How the choices continue a prompt (`PromptWriter.continuations`), and their nats where there is no input."""
    asked = replace(question, messages=(), input="" if question.instruction else "?")
    shared, answers = writer.continuations(replace(asked, input="x"), choices)
    alone = writer.write(asked, asked.input).ids
    return shared, answers, np.array(log_likelihoods(model, alone[: len(alone) - shared], answers, batch_size))
