"""Controls inside pooled ranks: a resume that forgets one piece of state, and a commit that waits for nobody. No entry.

Each mutation patches what a restart reads, in a started rank, and takes the patch back. The comparison with a straight run
must then fail; a comparison that still holds would see nothing of such a defect. Running statistics need a model with batch
norm and the loss scale a run in fp16, which CPU ranks compute when DeepSpeed is told that they can.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dsgpt.checkpoint import commit, saver
from dsgpt.checkpoint.reader import MASTER, CheckpointReader
from dsgpt.config import fill_deepspeed, load_config
from dsgpt.distributed import World
from dsgpt.errors import Preempted
from dsgpt.process import StopRequest
from dsgpt.train import loop, resume, step
from dsgpt.train.resolve import resolve_run
from tests.faults._jobs import Reference, differences
from tests.pool import RankPool

STOP_STEP, STEPS = 7, 20
SETTINGS = {"training.max_steps": STEPS}
VARIANTS = {
    "plain": {},
    "batch norm": {"model.norm": "batchnorm"},
    "fp16": {},
    "spike": {
        "training.loss_spike.window": STOP_STEP - 1,
        "training.loss_spike.action": "rollback",
        "training.loss_spike.skip_steps": 1,
        "checkpoint.save_interval": STOP_STEP - 1,
    },
}
FP16_KEYS = {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 2, "hysteresis": 2}


def forgetting(change: Callable[[Any], None]) -> Any:
    """A patch of the reader that a resume opens: `change` may alter it before anything is read."""

    class Forgetful(CheckpointReader):
        def __init__(self, checkpoint: Path, check: bool = True):
            super().__init__(checkpoint, check)
            change(self)

    return mock.patch.object(resume, "CheckpointReader", Forgetful)


def _read_as(kind: str, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def change(reader: Any) -> None:
        read = reader.read
        reader.read = lambda name, k, *place: convert(read(name, k, *place)) if k == kind else read(name, k, *place)

    return forgetting(change)


def _counter(name: str) -> Any:
    return forgetting(lambda reader: reader.manifest["counters"].update({name: 0}))


def _fresh_statistics(reader: Any) -> None:
    values = reader.buffers()
    fresh = {name: torch.ones_like(v) if name.endswith("var") else torch.zeros_like(v) for name, v in values.items()}
    assert any(not torch.equal(fresh[name], values[name]) for name in values), "nothing is forgotten"
    reader.buffers = lambda: fresh


def _learning_rate_anew() -> Any:
    original = loop.learning_rate
    return mock.patch.object(loop, "learning_rate", lambda o, at, last: original(o, at - STOP_STEP, last))


def _dropout_anew() -> Any:
    original = step.seed_micro_step
    return mock.patch.object(step, "seed_micro_step", lambda seed, at, *rest: original(seed, at - STOP_STEP, *rest))


# what is forgotten -> (the variant it exists in, the patch)
MUTATIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "exp_avg": ("plain", lambda: _read_as("exp_avg", torch.zeros_like)),
    "exp_avg_sq": ("plain", lambda: _read_as("exp_avg_sq", torch.zeros_like)),
    "optimizer step count": ("plain", lambda: _counter("optimizer_steps")),
    "step counter": ("plain", lambda: _counter("step")),
    "learning rate": ("plain", _learning_rate_anew),
    "data cursor": ("plain", lambda: _counter("consumed_samples")),
    "dropout seed": ("plain", _dropout_anew),
    # As where only the low-precision copy is kept: harder to see than no weights at all.
    "master weights, to bf16": ("plain", lambda: _read_as(MASTER, lambda values: values.bfloat16().float())),
    "running statistics": ("batch norm", lambda: forgetting(_fresh_statistics)),
    "losses before a spike": (
        "spike",
        lambda: forgetting(lambda reader: reader.manifest.update(recent_losses=[])),
    ),
    "fp16 loss scale": ("fp16", lambda: forgetting(lambda reader: reader.manifest.update(loss_scale=None))),
}


class _StopAfter(StopRequest):
    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def poll(self) -> bool:
        self.left -= 1
        return self.left == 0


def train_here(world: World, yaml: Path, folder: Path, variant: str, mutation: str = "", stop_after: int = 0) -> int:
    """One start of a run in a pooled rank, with a mutation in force; the step it reached."""
    world.attempt = f"{folder.name}-{stop_after}"
    overrides = [f"run.output_dir={folder}", *(f"{key}={value}" for key, value in VARIANTS[variant].items())]
    plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
    if variant == "fp16":
        config = plan.config.model_copy(update={"training": plan.config.training.model_copy(update={"dtype": "fp16"})})
        plan = replace(plan, config=config, deepspeed=fill_deepspeed(config, world.size) | {"fp16": FP16_KEYS})
    spoiled = _spoiled(STOP_STEP + 1) if variant == "spike" else contextlib.nullcontext()
    forgotten = MUTATIONS[mutation][1]() if mutation else contextlib.nullcontext()
    with _fp16_allowed(variant == "fp16"), spoiled, forgotten:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return loop.train(plan, world, _StopAfter(stop_after)).step
        except Preempted:
            return stop_after


@contextlib.contextmanager
def _fp16_allowed(wanted: bool) -> Iterator[None]:
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    with mock.patch.object(accelerator, "is_fp16_supported", lambda: True) if wanted else contextlib.nullcontext():
        yield


def _spoiled(at: int) -> Any:
    """The samples of step `at`, as they come first, give ten times the loss."""
    original, bad = loop.train_step, []

    def train_step(*arguments: Any, **named: Any) -> Any:
        report = original(*arguments, **named)
        if not bad and named["step"] == at:
            bad.append(report.data_crc)
        return replace(report, loss=10 * report.loss) if report.data_crc in bad else report

    return mock.patch.object(loop, "train_step", train_step)


def forget(pool: RankPool, yaml: Path, root: Path, mutations: list[str]) -> dict[str, list[str]]:
    """T002: {mutation: what the comparison found}; under a variant's name what it found in a whole resume (nothing)."""
    found: dict[str, list[str]] = {}
    for variant in VARIANTS:
        chosen = [name for name in mutations if MUTATIONS[name][0] == variant]
        if not chosen:
            continue
        straight, part = root / f"{variant}-straight", root / f"{variant}-part"
        pool.run(train_here, yaml, straight, variant)
        pool.run(train_here, yaml, part, variant, "", STOP_STEP)
        reference = Reference.of(straight)
        for name in ("", *chosen):
            folder = root / f"{variant}-{name.replace(' ', '-').replace(',', '')}"
            shutil.copytree(part, folder)
            pool.run(train_here, yaml, folder, variant, name)
            found[name or variant] = differences(folder, reference)
    return found


# ---- a commit without a barrier -------------------------------------------------------------------------------------


def save_with_a_slow_rank(world: World, yaml: Path, folder: Path, barrier: bool) -> list[str]:
    """T003, T105: rank 1 is slow to write; what rank 0 finds missing in the moment a checkpoint becomes visible.

    Without `barrier` rank 0 takes its own part for the whole, as a protocol does that commits before all have told.
    """
    found: list[str] = []
    gather, write, rename = World.gather_objects, saver.write_file, commit.commit

    def own_part_only(self: World, value: Any) -> Any:
        if not isinstance(value, saver._Part):
            return gather(self, value)
        return [value] * self.size if self.is_main else None

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5 if world.rank else 0.0)
        return write(*arguments)

    def look(*arguments: Any) -> Path:
        path = rename(*arguments)
        found.extend(missing_parts(path, world.size))
        return path

    world.attempt = folder.name
    overrides = [f"run.output_dir={folder}", "training.max_steps=1", "optimizer.warmup_steps=0"]
    plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
    with (
        mock.patch.object(World, "gather_objects", gather if barrier else own_part_only),
        mock.patch.object(saver, "write_file", slowly),
        mock.patch.object(commit, "commit", look),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        loop.train(plan, world, StopRequest())
    return found


def missing_parts(checkpoint: Path, world_size: int) -> list[str]:
    """What a visible checkpoint lacks: it must list every rank's file, and all must verify."""
    listed = commit.read_manifest(checkpoint)["files"]
    names = [name for name in (f"rank-{rank:05d}.safetensors" for rank in range(world_size)) if name not in listed]
    return [f"{name} is not in the manifest" for name in names] + [
        str(problem) for problem in commit.verify(checkpoint)
    ]
