"""Bits flipped, files cut, shards lost and swapped: a damaged checkpoint is found before any tensor of it is used.

T301-T304 of the fault matrix. The checkpoints are real: two ranks with DeepSpeed, ZeRO 1 and ZeRO 3. One random bit of one
random file is flipped, the manifest's as likely as a shard's, and `commit.verify` must tell; then the files are cut,
deleted, swapped and replaced by those of other checkpoints. Last, whole runs go on from such a folder: they must pass over
the damaged checkpoint, tell of it, and end with the bits of a run that nothing happened to.

Controls: a flip that the file formats themselves would notice proves little, so those that safetensors and JSON read
without a word are counted. What nothing vouches for: `evaluation.json`, written after the commit, of which no tensor is made.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.reader import CheckpointReader, partition_file
from dsgpt.errors import CheckpointError
from tests.faults._trouble import Trouble, events, hashes, train
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks
from tests.run_fixtures import make_dataset, write_config

STAGES = ("zero1", "zero3")
OLDER, NEWEST, LAST = 2, 4, 6  # steps: two checkpoints, and where the run would end
SETTINGS = {"training.max_steps": LAST, "checkpoint.save_interval": OLDER, "checkpoint.keep_last": 0}
FILES = (commit.MANIFEST, partition_file(0), partition_file(1))
CUTS: dict[str, Callable[[int], int]] = {
    "to nothing": lambda size: 0,
    "to 1 byte": lambda size: 1,
    "to half": lambda size: size // 2,
    "by 1 byte": lambda size: size - 1,
}


def half_a_run(dataset: Path, folder: Path, name: str, **overrides: object) -> Path:
    """Train up to the newest of two checkpoints, as a preempted job does; the run's folder."""
    yaml = write_config(dataset, folder, name, **{**SETTINGS, **overrides})
    ends = ranks(2).run(train, yaml, [], "first", Trouble(stop_at=NEWEST))
    if [end["code"] for end in ends] != [75, 75]:
        raise RuntimeError(f"the run that makes the checkpoints failed: {ends}")
    return folder / name


def checkpoint(run: Path, step: int = NEWEST) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def copy_of(run: Path, dataset: Path, folder: Path, name: str, **overrides: object) -> Path:
    """A run's folder again, under another name, with the YAML that continues it; the YAML."""
    shutil.copytree(run, folder / name, symlinks=True)
    return write_config(dataset, folder, name, **{**SETTINGS, **overrides})


@contextlib.contextmanager
def restored(path: Path) -> Iterator[bytearray]:
    """The bytes of a file, which are written back at the end."""
    whole = path.read_bytes()
    try:
        yield bytearray(whole)
    finally:
        path.write_bytes(whole)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_random_bits(checkpoints: list[Path], trials: int, rng: random.Random) -> tuple[list[str], int, int]:
    """(flips that were not detected, flips in a manifest, flips that the formats alone would have taken)."""
    missed, in_manifest, taken = [], 0, 0
    for _ in range(trials):
        folder, name = rng.choice(checkpoints), rng.choice(FILES)
        bit = rng.randrange(8 * (folder / name).stat().st_size)
        with restored(folder / name):
            flip(folder / name, bit)
            in_manifest += name == commit.MANIFEST
            taken += is_readable(folder, name)
            if not commit.verify(folder, mode="hash"):
                missed.append(f"{folder.parent.parent.name}: bit {bit} of {name}")
    return missed, in_manifest, taken


def is_readable(folder: Path, name: str) -> bool:
    """Whether the file's own format takes it: what there is without hashes."""
    try:
        if name == commit.MANIFEST:
            json.loads((folder / name).read_bytes())
            return True
        from safetensors.torch import load_file

        load_file(folder / name)
        return True
    except Exception:  # whatever a library makes of a broken file
        return False


def cut_files(folder: Path) -> list[str]:
    """Every kind of file cut to every length; the cuts that were not detected."""
    missed = []
    for name in FILES:
        for how, length in CUTS.items():
            path = folder / name
            with restored(path) as data:
                path.write_bytes(data[: length(len(data))])
                for mode in ("hash", "size"):
                    missed += [] if commit.verify(folder, mode) else [f"{name} cut {how}, verified by {mode}"]
    return missed


def _replace(name: str, of: Callable[[Path, Path], Path]) -> Callable[[Path, Path], None]:
    return lambda run, foreign: shutil.copyfile(of(run, foreign), checkpoint(run) / name) and None


def _swap(run: Path, foreign: Path) -> None:
    one, other = (checkpoint(run) / partition_file(rank) for rank in range(2))
    one.rename(one.with_suffix(".tmp"))
    other.rename(one)
    one.with_suffix(".tmp").rename(other)


def _rename_older(run: Path, foreign: Path) -> None:
    shutil.rmtree(checkpoint(run))
    shutil.copytree(checkpoint(run, OLDER), checkpoint(run))


# What is done to the newest checkpoint of a run; `foreign` is another run with the same model and data.
DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "a bit of a shard": lambda run, foreign: flip(checkpoint(run) / FILES[2], 8 * 9001 + 3),
    "a bit of the manifest": lambda run, foreign: flip(checkpoint(run) / FILES[0], 8 * 40),
    "a shard cut": lambda run, foreign: (checkpoint(run) / FILES[1]).write_bytes(b"x") and None,
    "an empty manifest": lambda run, foreign: (checkpoint(run) / FILES[0]).write_bytes(b"") and None,
    "a shard deleted": lambda run, foreign: (checkpoint(run) / FILES[2]).unlink(),
    "two shards swapped": _swap,
    "a shard of an older step": _replace(FILES[1], lambda run, foreign: checkpoint(run, OLDER) / FILES[1]),
    "a shard of another run": _replace(FILES[1], lambda run, foreign: checkpoint(foreign) / FILES[1]),
    "a manifest of another run": _replace(FILES[0], lambda run, foreign: checkpoint(foreign) / FILES[0]),
    "an older checkpoint under its name": _rename_older,
}


def go_on(yaml: Path, run: Path, expected: dict[str, str], passed_over: bool = True) -> list[str]:
    """Continue a run whose newest checkpoint is damaged (or, with `passed_over` False, only looks so); what is wrong."""
    ends = ranks(2).run(train, yaml, [], "second")
    if [(end["code"], end["step"]) for end in ends] != [(0, LAST)] * 2:
        return [f"ended with {[end['text'] or end['step'] for end in ends]}"]
    told = [event["event"] for event in events(run, "checkpoint_rejected", "resumed") if event["attempt"] == "second"]
    found = []
    if told != ["checkpoint_rejected", "resumed"][not passed_over :]:
        found.append(f"told of {told}")
    if (step := events(run, "resumed")[-1]["step"]) != (OLDER if passed_over else NEWEST):
        found.append(f"went on from step {step}")
    if hashes(run, LAST) != expected:
        found.append("ended with other bits than the undisturbed run")
    if commit.verify(checkpoint(run, OLDER)):
        found.append("the older checkpoint is damaged")
    return found


def undisturbed(run: Path, dataset: Path, folder: Path, **overrides: object) -> dict[str, str]:
    """The hashes of the last checkpoint of a run that goes on without damage."""
    yaml = copy_of(run, dataset, folder, f"{run.name}-undisturbed", **overrides)
    wrong = [end for end in ranks(2).run(train, yaml, [], "second") if end["code"]]
    if wrong:
        raise RuntimeError(f"the undisturbed run failed: {wrong}")
    return hashes(folder / f"{run.name}-undisturbed", LAST)


def add_foreign_shards(run: Path, foreign: Path) -> None:
    """What another world size or another program would have left in the folder."""
    for rank in (2, 3):
        shutil.copyfile(checkpoint(foreign) / partition_file(1), checkpoint(run) / partition_file(rank))
    (checkpoint(run) / "mp_rank_00_model_states.pt").write_bytes(b"\x80\x04N.")


def damage_and_go_on(runs: dict[str, Path], foreign: Path, dataset: Path, folder: Path) -> tuple[int, list[str]]:
    """Every damage at every stage in a whole run; (runs, what went wrong)."""
    number, wrong = 0, []
    for stage, run in runs.items():
        expected = undisturbed(run, dataset, folder, deepspeed=stage)
        for what, damage in {**DAMAGES, "shards of more ranks": add_foreign_shards}.items():
            number += 1
            yaml = copy_of(run, dataset, folder, f"{stage}-{number}", deepspeed=stage)
            damage(folder / f"{stage}-{number}", foreign)
            found = go_on(yaml, folder / f"{stage}-{number}", expected, damage is not add_foreign_shards)
            wrong += [f"{stage}, {what}: {one}" for one in found]
    return number, wrong


def is_refused_by_reader(folder: Path) -> bool:
    """Whether a reader that is handed a checkpoint with a damaged manifest gives out no tensor at all."""
    with restored(folder / commit.MANIFEST):
        flip(folder / commit.MANIFEST, 8 * 40)
        try:
            CheckpointReader(folder)
            return False
        except CheckpointError:
            return True


def run(trials: int | None, seed: int) -> Outcome:
    """`trials` counts the flips (1,000 unless given)."""
    trials = 1000 if trials is None else trials
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="dsgpt-corruption-") as name:
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        runs = {stage: half_a_run(dataset, root, stage, deepspeed=stage) for stage in STAGES}
        foreign = half_a_run(dataset, root, "foreign", **{"run.seed": 6})
        newest = [checkpoint(run) for run in runs.values()]
        missed, in_manifest, taken = flip_random_bits(newest, trials, rng)
        uncut = [text for folder in newest for text in cut_files(folder)]
        refused = sum(is_refused_by_reader(folder) for folder in newest)
        went_on, wrong = damage_and_go_on(runs, foreign, dataset, root)
    close_all()
    for line in [*missed, *uncut, *wrong][:20]:
        print(line)
    cuts = len(newest) * len(FILES) * len(CUTS) * 2
    rows = [
        Row("flips detected", trials - len(missed), at_least=trials, note=f"of {trials}; {in_manifest} in a manifest"),
        Row("flips the formats take", taken, at_least=1, note="control: found by hashes alone"),
        Row("cuts detected", cuts - len(uncut), at_least=cuts, note="0 B, 1 B, half, -1 B; by hash and by size"),
        Row("damaged manifests a reader refuses", refused, at_least=len(newest)),
        Row("runs that went on", went_on, note=f"{len(DAMAGES) + 1} kinds of damage, ZeRO 1 and 3"),
        Row("wrong ends of them", len(wrong), at_most=0, note="older checkpoint, event, bits of an undisturbed run"),
    ]
    return Outcome(rows, trials + cuts + went_on)
