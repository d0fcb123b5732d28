"""One run on 2 ranks, then 1, then 4, at another ZeRO stage each time, beside the same run left in place: the loss curve.

The quickstart's model and text, 150 steps, `dsgpt train` throughout; each move is the same command with other ranks and
another `deepspeed`. The samples of a step are the same on any number of ranks, so the losses are too, but for the order of
sums, whose effect grows from step to step in any training. Takes 5 minutes on 2 cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsgpt.train.state import read_metrics
from tests.benchmarks.norms import dsgpt, prepare_data
from tests.frame import Outcome, Row

STEPS = 150
MOVES = ((2, "zero1", 50), (1, "zero3", 100), (4, "zero2", STEPS))  # ranks, DeepSpeed config, until step
HEIGHT, WIDTH = 12, 75


def run(trials: int | None, seed: int) -> Outcome:
    """Both runs once; prints the curve."""
    with tempfile.TemporaryDirectory(prefix="dsgpt-moved-") as name:
        folder = Path(name)
        prepare_data(folder)
        _train(folder, "stays", seed, 2, "zero1", STEPS)
        for ranks, deepspeed, until in MOVES:
            _train(folder, "moves", seed, ranks, deepspeed, until)
        stays, moves = (
            {line["step"]: line["loss"] for line in read_metrics(folder / name / "metrics.jsonl")}
            for name in ("stays", "moves")
        )
    print(chart(stays, moves))
    apart = {step: abs(moves[step] - loss) / loss for step, loss in stays.items()}
    rows = [Row(f"relative difference of the losses up to step {until}", max(apart[s] for s in apart if s <= until),
                note=f"{ranks} ranks, {deepspeed}") for ranks, deepspeed, until in MOVES]  # fmt: skip
    for _, _, until in MOVES[:-1]:
        rows.append(Row(f"of the first loss after step {until}", apart[until + 1], at_most=1e-5))
    return Outcome(rows, 1)


def _train(folder: Path, name: str, seed: int, ranks: int, deepspeed: str, until: int) -> None:
    settings = {
        "run.output_dir": folder / name, "run.seed": seed, "run.stop_at_step": until, "data.train.0.path": folder / "data",
        "training.max_steps": STEPS, "training.micro_batch_size_per_gpu": 4, "deepspeed": deepspeed, "device": "cpu",
        "logging.log_interval": 1,
    }  # fmt: skip
    dsgpt("train", "quickstart", *(f"{key}={value}" for key, value in settings.items()), "--num-processes", ranks)


def chart(stays: dict[int, float], moves: dict[int, float]) -> str:
    """Losses over steps: the run that moves as its number of ranks, the other one as a dot where it lies elsewhere."""
    low, high = min(stays.values()), max(stays.values())
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]

    def put(losses: dict[int, float], step: int, mark: str) -> None:
        row = round((high - losses[step]) / (high - low) * (HEIGHT - 1))
        grid[min(max(row, 0), HEIGHT - 1)][(step - 1) * WIDTH // STEPS] = mark

    for step in range(1, STEPS + 1):
        put(stays, step, ".")
    for step in range(1, STEPS + 1):
        put(moves, step, str(next(ranks for ranks, _, until in MOVES if step <= until)))
    labels = [high - (high - low) * row / (HEIGHT - 1) for row in range(HEIGHT)]
    lines = [f"{label:5.2f} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    axis = "".join(
        f"{until:>{(until - before) * WIDTH // STEPS}}" for before, until in ((0, 50), (50, 100), (100, STEPS))
    )
    return "\n".join([*lines, "      +" + "-" * WIDTH, f"       {axis}  steps"])
