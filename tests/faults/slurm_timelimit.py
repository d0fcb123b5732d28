"""Jobs on a real SLURM reach their time limit, commit, requeue themselves and finish with the bits of an undisturbed job.

python -m tests.faults slurm_timelimit [--trials N --seed S]      N runs, 5 unless given; about three minutes each

SLURM's own clock and its own signal: two nodes, a rank each, a model of the quickstart's size, two minutes a time. Without
SLURMLAB_DIR it brings up a cluster of its own (root, Debian's packages: see tests/slurm/cluster.sh).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config
from tests.slurm import lab, loops


def run(trials: int | None, seed: int) -> Outcome:
    trials, broken, requeues, stopped = trials or 5, [], [], 0
    with tempfile.TemporaryDirectory(prefix="dsgpt-limit-") as name, lab.own_cluster():
        root = Path(name)
        dataset = make_dataset(root / "dataset")

        def make(run: str, **more: object) -> Path:
            return write_config(dataset, root, run, **{**loops.SETTINGS, **more})

        settings = loops.cut_by_a_limit(make, **{"run.seed": seed})
        reference = loops.straight(make("straight", **settings))
        for number in range(trials):
            options = (*loops.TWO_NODES, "--time=2", "--signal=USR1@60")
            with loops.Loop(make(f"run-{number}", **settings), options) as loop:
                loop.finish()
                broken += loop.broken(reference, lossless=True, requeues=range(1, 20))
                codes = [one.exit_code if one else None for one in loop.verdicts()]
            requeues.append(len(codes) - 1)
            stopped += codes[:-1].count(75)
    for line in broken[:20]:
        print(line)
    rows = [
        Row("runs that met their limit", sum(1 for one in requeues if one), at_least=trials),
        Row("limits met with a commit", stopped, at_least=sum(requeues), note=f"requeues {requeues}"),
        Row(
            "promises broken",
            len(broken),
            at_most=0,
            note="bits of every step and of the last checkpoint; no step twice",
        ),
    ]
    return Outcome(rows, trials)
