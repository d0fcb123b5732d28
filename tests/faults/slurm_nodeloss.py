"""Nodes of a real SLURM lose their power or their network while a job trains; it is requeued, resumes and finishes.

python -m tests.faults slurm_nodeloss [--trials N --seed S]      N runs, 5 unless given; about two minutes each

By turns the power of the last node, of the node with the batch script, and the network of the last node. Behind a pulled
cable the old rank lives on while the next attempt trains elsewhere (a third node is there for it): it is plugged in again in
the middle of that, and nothing the old one writes may count. Without SLURMLAB_DIR it brings up a cluster of its own.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config
from tests.slurm import lab, loops

KINDS = ("power", "power of the batch host", "network")


def run(trials: int | None, seed: int) -> Outcome:
    trials, rng, broken, again = trials or 5, random.Random(seed), [], []
    kinds = [KINDS[number % len(KINDS)] for number in range(trials)]
    interval = loops.SETTINGS["checkpoint.save_interval"]
    with tempfile.TemporaryDirectory(prefix="dsgpt-nodeloss-") as name, lab.own_cluster():
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        reference = loops.straight(write_config(dataset, root, "straight", **loops.SETTINGS))
        for number, kind in enumerate(kinds):
            with loops.Loop(write_config(dataset, root, f"run-{number}", **loops.SETTINGS)) as loop:
                loop.wait_step(rng.randint(1, 180))
                loops.lose_node(loop, kind)
                broken += [f"{kind}: {one}" for one in loop.broken(reference, requeues=loops.NODE_LOSS_REQUEUES)]
                steps = loop.steps()
                again.append(len(steps) - len(set(steps)))
            lab.mend()
    for line in broken[:20]:
        print(line)
    rows = [
        Row("nodes lost in the middle of a job", trials, note=", ".join(f"{kinds.count(one)} {one}" for one in KINDS)),
        Row("promises broken", len(broken), at_most=0, note="requeued, resumed, finished, the bits of every step"),
        Row(
            "most steps done again",
            max(again),
            at_most=2 * interval,
            note="one save interval, and what a cut-off rank did",
        ),
    ]
    return Outcome(rows, trials)
