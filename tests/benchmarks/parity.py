"""The parity table: what DeepSpeed computes against a plain PyTorch loop, over every axis, 384 cases (about 10 minutes).

Each case trains 20 steps; the figure is the largest relative difference of losses, gradient norms, first gradients and
final parameters. `--trials N` runs N cases drawn with `--seed` instead of all.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

from rich.progress import track

from tests.frame import Outcome, Row
from tests.parity import TOLERANCE, Case, all_cases, differences, engine_loop, plain_loop
from tests.pool import close_all, ranks


@cache
def _expected(case: Case) -> dict:
    return plain_loop(case)


def run(trials: int | None, seed: int) -> Outcome:
    """All cases, or `trials` of them drawn at random."""
    cases = all_cases()
    if trials:
        cases = random.Random(seed).sample(cases, min(trials, len(cases)))
    # Cases of one pool after another, so that ranks are started twice, not hundreds of times.
    cases.sort(key=lambda case: case.ranks)
    rows = []
    for case in track(cases, description="parity"):
        # The plain loop knows neither stage nor ranks, accumulation or recomputation.
        expected = _expected(replace(case, stage=0, ranks=1, accumulation=1, recompute="none"))
        found = differences(case, ranks(case.ranks).run(engine_loop, case)[0], expected)
        learned = expected["losses"][0] - expected["losses"][-1]
        worst = max(found, key=lambda key: found[key])
        note = f"worst: {worst}; the loss fell by {learned:.2f}"
        rows.append(Row(str(case), found[worst], at_most=TOLERANCE, note=note))
    close_all()
    return Outcome(rows, len(rows))
