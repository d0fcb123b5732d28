"""Bytes that one save writes per trained parameter, all files of the committed folder, manifest included: 25 M parameters.

A master and two moments in fp32 are 12; what is above are names, checksums and the manifest. Two ranks, each ZeRO stage, in
fp32 and bf16, with the first two of six blocks frozen: their file is written once, and later saves link it. The second save
is what counts, as in a run; the first one's frozen bytes are told in the note.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsgpt.distributed import World
from tests.benchmarks.save_stall import MODEL
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks

PER_PARAMETER = 12
CELLS = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in (0, 1, 2, 3) if stage or dtype == "fp32"]
FROZEN = ("blocks.0.", "blocks.1.")


def run(trials: int | None, seed: int) -> Outcome:
    """Every stage and precision once; there is nothing random in it."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="dsgpt-size-") as name:
        try:
            for stage, dtype in CELLS:
                told = ranks(2).run(save_twice, Path(name) / f"{stage}-{dtype}", stage, dtype, timeout=600)
                trained, frozen, written = told[0]
                note = f"{written / 1e6:.1f} MB for {trained / 1e6:.2f} M trained; {frozen / 1e6:.1f} MB of frozen ones linked"
                ratio = written / trained / PER_PARAMETER
                rows.append(Row(f"stage {stage}, {dtype}: bytes / 12 per parameter", ratio, at_most=1.03, note=note))
        finally:
            close_all()
    return Outcome(rows, len(rows))


def save_twice(world: World, folder: Path, stage: int, dtype: str) -> tuple[int, int, int]:
    """(trained parameters, bytes of files that the second save linked, bytes that it wrote)."""
    from dsgpt.checkpoint.saver import Saver
    from dsgpt.config import Dropout, ModelConfig, fill_deepspeed, load_config
    from dsgpt.config.schema import OptimizerSection
    from dsgpt.engine import Engine, construct
    from dsgpt.model.gpt import GPT
    from dsgpt.optimizer import build_optimizer
    from dsgpt.train.step import largest_micro_batch

    overrides = [f"training.dtype={dtype}", "training.micro_batch_size_per_gpu=1", "training.global_batch_size=2"]
    config = fill_deepspeed(load_config(["quickstart"], [*overrides, f"deepspeed=zero{stage}"]).config, world.size)
    model = construct(lambda: GPT(ModelConfig(**MODEL, dropout=Dropout())), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    engine = Engine(model, build_optimizer(model, OptimizerSection(learning_rate=1e-3)), config, world)
    engine.rehearse(largest_micro_batch(MODEL["vocab_size"], 16, 1, world.device))
    saver = Saver(engine, world, folder)
    for step in (1, 2):
        saver.begin({"step": step, "state_kinds": list(engine.state_kinds)}, "a")
        path = saver.finish().path
    files = [file.stat() for file in path.iterdir()]
    linked = sum(file.st_size for file in files if file.st_nlink > 1)
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.parameters())
    return trained, linked, sum(file.st_size for file in files) - linked
