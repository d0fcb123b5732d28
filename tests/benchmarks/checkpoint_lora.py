"""What checkpoints of a LoRA run take on the disk against those of a run that trains everything, by the disk's own count.

Real runs on two CPU ranks, ZeRO 2, of a native GPT of 21 M parameters, adapters of rank 8 at all linear layers; three steps
and a commit after each, then another start and three more. Counted is what a checkpoint's files occupy (st_blocks) and no
checkpoint before it holds: what is frozen is written with the first one and linked by the later ones. What a user sees is
all of it together; with keep_last=3 the three that stay share one copy.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path

from dsgpt.distributed import World
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks

WAYS = {"full": "all", "LoRA": "lora"}
MODEL = {
    "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 4096,
    "max_position_embeddings": 32, "dropout": {},
}  # fmt: skip
STEPS, KEPT = 3, 3


def run(trials: int | None, seed: int) -> Outcome:
    """fp32 and bf16, once each: sizes do not depend on chance."""
    from tests.run_fixtures import make_dataset, write_config

    rows = []
    with tempfile.TemporaryDirectory(prefix="dsgpt-lora-") as name:
        folder = Path(name)
        try:
            dataset = make_dataset(folder / "dataset")
            training = {"seq_length": 32, "global_batch_size": 2, "micro_batch_size_per_gpu": 1, "max_steps": 2 * STEPS}
            common = {"training": training, "checkpoint": {"save_interval": 1, "keep_last": 0}, "deepspeed": "zero2"}
            base = write_config(dataset, folder, "base", **common, model=MODEL)
            ranks(2).run(train, base, ["run.stop_at_step=1"], timeout=900)
            for dtype in ("fp32", "bf16"):
                sizes = {}
                for way, train_what in WAYS.items():
                    changes = {**common, "model": {"init_from": f"checkpoint:{folder / 'base'}"}}
                    yaml = write_config(dataset, folder, f"{way}-{dtype}", **changes, fine_tuning={"train": train_what})
                    for stop in (STEPS, 2 * STEPS):
                        ranks(2).run(train, yaml, [f"run.stop_at_step={stop}", f"training.dtype={dtype}"], timeout=900)
                    sizes[way] = added(folder / f"{way}-{dtype}/checkpoints")
                rows += _rows(dtype, sizes["full"], sizes["LoRA"])
        finally:
            close_all()
    return Outcome(rows, len(rows))


def _rows(dtype: str, full: list[int], lora: list[int]) -> list[Row]:
    each = statistics.mean(full)

    def row(label: str, value: float, against: float, must: float | None = None) -> Row:
        return Row(
            f"{dtype}: {label}", value / against, "x", at_most=must, note=f"{value / 1e6:.1f} of {against / 1e6:.1f} MB"
        )

    return [
        row("each checkpoint but the first", max(lora[1:STEPS]), each, 0.1),
        row("first checkpoint of another start", lora[STEPS], each, 0.1),
        row("first checkpoint, with all that is frozen", lora[0], each),
        row(f"all of a run that keeps {KEPT}", sum(lora[:KEPT]), sum(full[:KEPT])),
    ]


def train(world: World, yaml: Path, overrides: list[str]) -> None:
    from dsgpt.config import load_config
    from dsgpt.errors import Stopped
    from dsgpt.process import StopRequest
    from dsgpt.train.loop import train as train_run
    from dsgpt.train.resolve import resolve_run

    world.attempt = overrides[0].replace("=", "-")
    plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
    with contextlib.suppress(Stopped):
        train_run(plan, world, StopRequest())


def added(checkpoints: Path) -> list[int]:
    """Bytes on the disk of each checkpoint that no earlier one holds, in the order of their steps."""
    seen: set[int] = set()
    found = []
    for folder in sorted(checkpoints.glob("step-*")):
        files = [file.stat() for file in folder.iterdir()]
        found.append(512 * sum(one.st_blocks for one in files if one.st_ino not in seen))
        seen |= {one.st_ino for one in files}
    return found
