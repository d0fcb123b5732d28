"""`kill` with asynchronous saving and another topology at every start: 1, 2 or 4 ranks, ZeRO 0 to 3.

python -m tests.faults kill_moving [--trials N --seed S]      N kills, 20 unless given

The promises are those of `kill`: nothing survives, every visible checkpoint verifies, the newest commit that was told of is
there, the next start continues after it. Sums over other ranks round differently, so the runs, without dropout, are compared
with the undisturbed one within a tolerance, and in their samples and learning rates exactly. An asynchronous save is told of
when it is committed, so a kill may cost the save under way beside one interval.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from dsgpt.train.state import read_metrics
from tests.faults._jobs import MAX_STEPS, SAVE_INTERVAL, SETTINGS, Reference, newest_commit, undisturbed
from tests.faults.kill import FSYNC_SECONDS, KILLS_PER_RUN, Tally, attack
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config

STAGES, WORLDS = ("zero0", "zero1", "zero2", "zero3"), (1, 2, 4)
LOSS_ERROR = 1e-3
LOSSES = "model.dropout"


def run(trials: int | None, seed: int) -> Outcome:
    """`trials` kills, spread over as many runs as they take."""
    trials, rng, tally = trials or 20, random.Random(seed), Tally()
    settings = {
        **SETTINGS,
        "checkpoint.asynchronous": True,
        LOSSES: {"embedding": 0.0, "attention": 0.0, "residual": 0.0},
    }
    topologies: list[tuple[int, str]] = []
    worst = [0.0]

    def draw() -> tuple[int, str]:
        """Never the one before."""
        choices = [
            (world, stage) for world in WORLDS for stage in STAGES if (world, stage) != (topologies or [None])[-1]
        ]
        topologies.append(rng.choice(choices))
        return topologies[-1]

    def compare(folder: Path, reference: Reference) -> list[str]:
        found, error = _differences(folder, reference)
        worst[0] = max(worst[0], error)
        return found

    with tempfile.TemporaryDirectory(prefix="dsgpt-kill-") as name:
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        reference = undisturbed(write_config(dataset, root, "straight", **settings), root / "straight", FSYNC_SECONDS)
        left = trials
        while left > 0 and tally.runs < 3 * trials:
            name = f"run-{tally.runs}"
            yaml = write_config(dataset, root, name, **settings)
            kills = min(left, rng.randint(*KILLS_PER_RUN))
            left -= attack(yaml, root / name, kills, reference, rng, tally, draw, compare)
    for line in tally.broken[:20]:
        print(line)
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(tally.kinds.items()))
    rows = [
        Row("kills", trials - left, at_least=trials, note=kinds),
        Row("starts, each on another topology", len(topologies), note=f"{len(set(topologies))} of 12 kinds"),
        Row("runs finished and compared", tally.runs, note="losses, learning rates, samples of every step"),
        Row("promises broken", len(tally.broken), at_most=0),
        Row(
            "most steps lost by a kill",
            tally.lost_steps,
            at_most=2 * SAVE_INTERVAL,
            note="one interval, and the save under way",
        ),
        Row("worst relative difference of a loss", worst[0], at_most=LOSS_ERROR),
    ]
    return Outcome(rows, trials - left)


def _differences(folder: Path, reference: Reference) -> tuple[list[str], float]:
    """(what a finished run logged otherwise than the undisturbed one, the largest relative difference of a loss)."""
    metrics, found, worst = read_metrics(folder / "metrics.jsonl"), [], 0.0
    if [line["step"] for line in metrics] != [*reference.steps]:
        found.append(f"the steps that count are {[line['step'] for line in metrics]}")
    for line in metrics:
        loss, rate, _, _, samples = (float.fromhex(text) for text in reference.steps[line["step"]][:5])
        if (line["learning_rate"], line["consumed_samples"]) != (rate, samples):
            found.append(f"step {line['step']}: another learning rate or other samples: {line}")
        worst = max(worst, abs(line["loss"] - loss) / loss)
    if worst > LOSS_ERROR:
        found.append(f"losses differ by {worst:.3g}")
    if newest_commit(folder) != MAX_STEPS:
        found.append(f"the newest commit is {newest_commit(folder)}")
    return found, worst
