"""The gate: a pairwise-covering subset of the parity table, and proof that the comparison can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity import TOLERANCE, Case, covering_cases, differences, engine_loop, plain_loop
from tests.pool import ranks


def compare(case: Case) -> dict[str, float]:
    expected = plain_loop(replace(case, factor=1.0))
    assert expected["losses"][-1] < expected["losses"][0] - 0.5, "nothing was learned, so nothing was compared"
    return differences(case, ranks(case.ranks).run(engine_loop, case)[0], expected)


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_the_engine_computes_what_a_plain_loop_computes(case):
    found = compare(case)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_factor_of_two_in_the_averaging_is_caught(optimizer):
    found = compare(Case(2, 2, 2, "none", False, optimizer, 0.0, factor=2.0))
    assert found["gradients"] > 0.5 and found["norms"] > 0.5
    assert (found["parameters"] > 0.01) == (optimizer == "sgd"), "Adam hides a constant factor, SGD does not"
