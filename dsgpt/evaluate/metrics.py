"""The numbers of answers and choices, each with an interval, and differences of two models on the same questions.

ROUGE is rouge-score's, with stemming, as papers report it; token F1 and exact match are those of SQuAD (Rajpurkar et al.
2016, section 6.1): without case, punctuation and articles. Intervals are percentiles of 1,000 bootstrap resamples (Efron and
Tibshirani 1993, section 13.3), seeded: of the questions, or their groups where they have such; for macro-F1 within classes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsgpt.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Number:
    """A mean over questions and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    number: Callable[[np.ndarray], float],
    num_questions: int,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Number:
    """`number(indices)` is computed of all questions, and of `resamples` drawings of as many with replacement.

    With `groups`, one name a question, whole groups are drawn: questions on one document are no independent ones.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        draws: Iterable[np.ndarray] = rng.integers(num_questions, size=(resamples, num_questions))
    else:
        names, inverse = np.unique(np.asarray(groups), return_inverse=True)
        members = [np.flatnonzero(inverse == place) for place in range(len(names))]
        drawn = rng.integers(len(names), size=(resamples, len(names)))
        draws = (np.concatenate([members[place] for place in draw]) for draw in drawn)
    low, high = np.percentile([number(draw) for draw in draws], (2.5, 97.5))
    return Number(float(number(np.arange(num_questions))), float(low), float(high))


def bootstrap_within(
    number: Callable[[np.ndarray], float], classes: Sequence[str], seed: int = 0, resamples: int = _RESAMPLES
) -> Number:
    """As many of each class are drawn as there are, for numbers in which every class counts."""
    rng = np.random.default_rng(seed)
    _, inverse = np.unique(np.asarray(classes), return_inverse=True)
    members = [np.flatnonzero(inverse == place) for place in range(inverse.max() + 1)]
    found = [number(np.concatenate([rng.choice(its, len(its)) for its in members])) for _ in range(resamples)]
    low, high = np.percentile(found, (2.5, 97.5))
    return Number(float(number(np.arange(len(classes)))), float(low), float(high))


def mean(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> Number:
    found = np.asarray(values, np.float64)
    return bootstrap(lambda indices: float(found[indices].mean()), len(found), groups, seed)


def mean_difference(ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str] | None = None) -> Number:
    """Of two models on the same questions, which are drawn in pairs."""
    return mean([one - two for one, two in zip(ours, theirs, strict=True)], groups)


def rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, list[float]]:
    """F-measures of each answer. Raises ConfigError where rouge-score is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ConfigError("rouge-score is not installed", do="pip install 'dsgpt[eval]'") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return {name: [float(score[name].fmeasure) for score in scores] for name in ROUGE}


def normalise(text: str) -> str:
    """As SQuAD compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(reference: str, answer: str) -> float:
    return float(normalise(reference) == normalise(answer))


def token_f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words; 1 where both are empty."""
    expected, said = normalise(reference).split(), normalise(answer).split()
    if not expected or not said:
        return float(expected == said)
    common = sum((Counter(expected) & Counter(said)).values())
    return 2 * common / (len(expected) + len(said))


def macro_f1(answers: np.ndarray, choices: np.ndarray) -> float:
    """Mean over the classes that occur among the answers of 2 TP / (2 TP + FP + FN)."""
    found = []
    for label in np.unique(answers):
        hits = np.sum((answers == label) & (choices == label))
        found.append(2 * hits / (np.sum(answers == label) + np.sum(choices == label)))
    return float(np.mean(found))
