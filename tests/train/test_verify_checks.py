"""What verify-resume concludes from made-up metrics, where it is known what the answer must be."""

from __future__ import annotations

import json
import math

import pytest

from dsgpt.train.verify_checks import Report, drift, first_difference, loss_checks, why_unlike


def lines(**changes):
    """Steps 1 to 6 with loss 6 - step; changes such as s3={"loss": 1.0}, or s3=None for a line that is missing."""
    made = {
        step: {"step": step, "loss": 6.0 - step, "gradient_norm": 1.0, "data_crc": 7 * step} for step in range(1, 7)
    }
    for name, change in changes.items():
        step = int(name[1:])
        made = {**made, step: {**made[step], **change}} if change is not None else made
        if change is None:
            del made[step]
    return made


def test_equal_lines_have_no_difference_and_times_do_not_count():
    assert first_difference(lines(), lines(s2={"time": 3.0, "tokens_per_second": 1.0}), range(1, 7)) is None


def test_the_first_differing_step_is_named_with_both_values_down_to_the_last_bit():
    other = math.nextafter(2.0, 3.0)
    found = first_difference(lines(), lines(s4={"loss": other}, s5={"data_crc": 0}), range(1, 7))
    assert (found.step, found.values) == (4, {"loss": (2.0, other)})
    assert str(found) == "step 4: loss 2.0 against 2.0000000000000004"


def test_a_missing_line_is_a_difference_and_so_is_one_missing_on_both_sides():
    assert first_difference(lines(), lines(s3=None), range(1, 7)).step == 3
    assert first_difference(lines(s3=None), lines(s3=None), range(1, 7)).step == 3


def test_a_loss_that_is_not_finite_on_one_side_differs_and_on_both_sides_not():
    # metrics.jsonl has null for it
    assert first_difference(lines(s2={"loss": None}), lines(s2={"loss": None}), range(1, 7)) is None
    assert first_difference(lines(), lines(s2={"loss": None}), range(1, 7)).step == 2
    apart = drift(lines(), lines(s5={"loss": None}), range(4, 7), 1e-5)
    assert (apart.worst, apart.worst_step) == (math.inf, 5)
    told = Report("", False, None, [], 5, {"step": 5, "largest": math.nan}, apart).as_dict()
    assert "null" in json.dumps(told, allow_nan=False), "JSON has no infinity"


def test_zero_is_not_minus_zero_and_only_the_steps_asked_for_count():
    assert first_difference(lines(s2={"loss": 0.0}), lines(s2={"loss": -0.0}), range(1, 7)).step == 2
    assert first_difference(lines(s2={"loss": 0.0}), lines(s2={"loss": -0.0}), range(3, 7)) is None


def test_drift_tells_the_first_the_worst_and_where_the_tolerance_is_left():
    found = drift(lines(), lines(s5={"loss": 1.01}, s6={"loss": 1e-9}), range(4, 7), 1e-5)
    assert (found.first, found.beyond) == (0.0, 5)
    found = drift(lines(), lines(s4={"loss": 2.1}, s5={"loss": 1.01}), range(4, 6), 1e-5)
    assert found.first == found.worst == pytest.approx(0.05) and (found.worst_step, found.beyond) == (4, 4)


@pytest.mark.parametrize(
    ("relative", "dtype", "unlike", "passed"),
    [
        (0.9e-5, "fp32", "", [True, True]),
        (1.1e-5, "fp32", "", [False, True]),
        (1.1e-5, "bf16", "", [True, True]),
        (0.09, "fp32", "dropout", [None, True]),
        (0.11, "fp32", "dropout", [None, False]),
    ],
)
def test_the_first_loss_is_held_to_the_tolerance_of_its_precision_and_all_to_the_absurd(
    relative, dtype, unlike, passed
):
    found = drift({1: {"loss": 4.0}}, {1: {"loss": 4.0 * (1 + relative)}}, [1], 1e-5)
    assert [check.passed for check in loss_checks(found, dtype, unlike, 1)] == passed


def test_dropout_and_batch_norm_depend_on_how_the_batch_is_split_and_nothing_else_does():
    assert why_unlike((2, 4), (2, 4), True, True) == ""
    assert why_unlike((2, 4), (1, 4), False, False) == ""
    assert "dropout" in why_unlike((2, 4), (1, 4), True, False)
    assert "batch norm" in why_unlike((2, 4), (2, 2), False, True)


def test_masks_of_dropout_follow_from_rank_and_micro_step():
    """The reason why the first loss is not judged there: the same sample has another mask on another rank."""
    import torch

    from dsgpt.train.step import seed_micro_step

    masks = {}
    for rank, micro_step in ((0, 0), (0, 1), (1, 0)):
        seed_micro_step(5, 10, rank, micro_step)
        masks[rank, micro_step] = json.dumps(torch.rand(64).tolist())
    assert len(set(masks.values())) == 3
