"""Metrics against rouge-score itself, scikit-learn, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dsgpt.evaluate.answers import score
from dsgpt.evaluate.choices import ChoiceReport
from dsgpt.evaluate.metrics import (
    bootstrap,
    bootstrap_within,
    exact_match,
    macro_f1,
    mean,
    mean_difference,
    rouge,
    token_f1,
)


def test_rouge_is_that_of_the_library():
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("the cat sat on the mat", "a cat sat on mats"), ("one two three", ""), ("same", "same")]
    found = rouge(*zip(*pairs, strict=True))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for i, pair in enumerate(pairs):
        assert {name: values[i] for name, values in found.items()} == {
            name: score.fmeasure for name, score in scorer.score(*pair).items()
        }


def test_of_several_references_the_nearest_counts():
    from rouge_score.rouge_scorer import RougeScorer

    references = [("the cat sat on the mat", "a dog lay there"), ("one",), ("two three", "four", "two")]
    answers = ["the dog lay on a mat", "one", "two"]
    found = score(references, answers)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for i, (its, answer) in enumerate(zip(references, answers, strict=True)):
        expected = {name: number.fmeasure for name, number in scorer.score_multi(its, answer).items()}
        assert {name: found[name][i] for name in expected} == expected
    assert found["exact_match"] == [0.0, 1.0, 1.0] and found["token_f1"] == pytest.approx([2 * 2 / 7, 1.0, 1.0])


@pytest.mark.parametrize(
    "reference, answer, f1, exact",
    [
        ("The cat sat.", "a cat SAT", 1.0, 1.0),
        ("the red car", "red bus", 0.5, 0.0),
        ("b b c", "b d", 2 * 1 / (3 + 2), 0.0),
        ("the", "", 1.0, 1.0),
        ("x", "", 0.0, 0.0),
    ],
)
def test_words_are_compared_as_squad_does(reference, answer, f1, exact):
    assert token_f1(reference, answer) == pytest.approx(f1) and exact_match(reference, answer) == exact


def test_macro_f1_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    answers, chosen = generator.integers(5, size=(2, 60))
    labels = np.unique(answers)
    expected = sklearn.f1_score(answers, chosen, labels=labels, average="macro", zero_division=0)
    assert macro_f1(answers, chosen) == pytest.approx(expected)


def test_the_majoritys_numbers_are_those_of_always_giving_it():
    answers = ["a"] * 6 + ["b"] * 3 + ["c"]
    always = ChoiceReport(["a"] * 10, answers, [1.0] * 10, [1] * 10, 1 / 3)
    assert always.majority == always.accuracy.value == 0.6
    assert always.majority_macro_f1 == pytest.approx(macro_f1(np.array(answers), np.array(["a"] * 10)))


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Of 300 samples of 40 draws from a known distribution, about 95 % of the intervals contain its mean."""
    generator, inside = np.random.default_rng(7), 0
    for number in range(300):
        found = mean(generator.exponential(size=40), seed=number)
        assert found.low <= found.value <= found.high
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 300 <= 0.98
    scipy = pytest.importorskip("scipy.stats")
    values = generator.normal(size=50)
    theirs = scipy.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, random_state=0
    ).confidence_interval
    ours = bootstrap(lambda indices: float(values[indices].mean()), 50, resamples=5000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_differences_are_of_the_same_questions():
    ours, theirs = np.arange(20) + 0.5, np.arange(20)
    found = mean_difference(ours, theirs)
    assert found.value == found.low == found.high == 0.5


def test_groups_are_drawn_whole_and_questions_of_one_group_are_no_more_than_one():
    """Ten groups whose questions all say the same: the interval is that of ten numbers, however many questions each has."""
    values = np.random.default_rng(3).normal(size=10)
    alone = mean(values)
    repeated = mean(np.repeat(values, 7), groups=[f"g{i}" for i in range(10) for _ in range(7)])
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx(
        (alone.value, alone.low, alone.high), abs=0.15
    )
    blind = mean(np.repeat(values, 7))
    assert blind.high - blind.low < 0.6 * (repeated.high - repeated.low)


def test_the_interval_of_macro_f1_of_the_majority_is_a_point():
    answers = ["Other"] * 95 + ["a", "a", "b", "c", "d"]
    always = ChoiceReport(["Other"] * 100, answers, [1.0] * 100, [1] * 100, 0.2)
    found = always.macro_f1
    assert found.low == found.high == found.value == pytest.approx(always.majority_macro_f1)
    drawn = bootstrap_within(lambda indices: float(len(indices)), answers)
    assert (drawn.low, drawn.high) == (100, 100)
