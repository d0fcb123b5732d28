"""Full disks, lost permissions, EIO and ESTALE while a run saves: the checkpoints before stay, training goes on.

T201-T203, T205, T208 and T209 of the fault matrix, in runs of two ranks with DeepSpeed. Every second save is attacked: a file
may grow to a random byte only, on one rank or on both; the disk is full at a random byte (a small file system of its own,
where one can be mounted); fsync fails once, or as often as it is tried. After every step all checkpoints in the folder
must verify and nothing unfinished may lie there; every attack must be told of in events.jsonl, the ranks must agree, and
the number of open files must not grow. Last, a disk that needs longer than a rank may be silent is no hang while it saves.
"""

from __future__ import annotations

import errno
import math
import random
import tempfile
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from tests.faults._jobs import Job
from tests.faults._trouble import BadSync, FileLimit, FullDisk, Trouble, can_mount, events, small_disk, train, unsound
from tests.frame import Outcome, Row
from tests.pool import close_all, ranks
from tests.run_fixtures import make_dataset, write_config

SETTINGS = {"checkpoint.save_interval": 1, "checkpoint.keep_last": 2, "optimizer.warmup_steps": 0}
HANG_SECONDS = 8
# Calls of fsync in a save: the shard's on every rank; the manifest, its folder and the folder above on rank 0.
SYNCS = ((1, 1), (0, 1), (0, 2), (0, 3), (0, 4))


def every_second(values: list[Any]) -> dict[int, Any]:
    """{step: value} for steps 2, 4, …: never three in a row, which would end the run."""
    return {2 * number: value for number, value in enumerate(values, 1)}


def attack(dataset: Path, folder: Path, name: str, trouble: Trouble, **overrides: Any) -> tuple[list[str], list[dict]]:
    """A run with trouble in it up to a step after the last; (what is wrong with it, how each rank ended)."""
    last = max(trouble.at) + 1
    yaml = write_config(dataset, folder, name, **{**SETTINGS, "training.max_steps": last, **overrides})
    trouble.watched = folder / name
    ends = ranks(2).run(train, yaml, [], "a", trouble, timeout=60 + last)
    found = [
        f"a rank ended with {end['code']} at step {end['step']}: {end['text']}" for end in ends if end["step"] != last
    ]
    return found + ends[0]["found"] + unsound(folder / name), ends


def failed_saves(run: Path) -> list[int]:
    return [event["step"] for event in events(run, "save_failed")]


def leaked(ends: list[dict]) -> int:
    """How many more files are open at the end than after the first steps, on the rank with more."""
    return max(end["open_files"][-1] - end["open_files"][3] for end in ends)


def shard_bytes(dataset: Path, folder: Path) -> int:
    """Size of the smallest shard of a run of these settings."""
    attack(dataset, folder, "sizes", Trouble({1: None}))
    _, newest = commit.list_committed(folder / "sizes/checkpoints")[-1]
    return min(entry["bytes"] for entry in commit.read_manifest(newest)["files"].values())


def random_limits(number: int, size: int, rng: random.Random) -> dict[int, tuple[int | None, int]]:
    return every_second([(rng.choice((0, 1, None)), rng.randrange(size)) for _ in range(number)])


def random_syncs(number: int, rng: random.Random) -> dict[int, tuple[int, int, int, float]]:
    """Each one call of fsync that fails once."""
    return every_second(
        [(rank, rng.choice((errno.EIO, errno.ESTALE)), call, 1) for rank, call in rng.choices(SYNCS, k=number)]
    )


def limits(dataset: Path, root: Path, trials: int, size: int, rng: random.Random) -> list[Row]:
    trouble = FileLimit(random_limits(trials, size, rng))
    wrong, ends = attack(dataset, root, "limits", trouble)
    failed = failed_saves(root / "limits")
    untold = len(set(trouble.at) ^ set(failed)) + len(failed) - len(set(failed))
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    return [
        Row("saves cut off at a random byte", trials, note="rank 0, rank 1 or both"),
        Row("wrong after a step or at the end", len(wrong), at_most=0),
        Row("attacks without their event", untold, at_most=0),
        Row("files left open", leaked(ends), at_most=0, note=f"after {2 * trials + 1} saves, {trials} of them failed"),
    ]


def full_disks(dataset: Path, root: Path, trials: int, size: int, rng: random.Random) -> list[Row]:
    if not can_mount():
        return [Row("saves on a full disk", 0, note="not tried: nothing can be mounted here")]
    with small_disk(root / "disk", f"size={16 * size}") as disk:
        trouble = FullDisk(every_second([rng.randrange(2 * size) for _ in range(trials)]), disk)
        wrong, _ = attack(dataset, disk, "full", trouble)
        failed = failed_saves(disk / "full")
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    return [
        Row("saves on a full disk", trials, note="ENOSPC at a random byte of the save"),
        Row("wrong of these", len(wrong), at_most=0),
        Row("of these without their event", len(set(trouble.at) ^ set(failed)), at_most=0),
    ]


def bad_syncs(dataset: Path, root: Path, trials: int, rng: random.Random) -> list[Row]:
    once = BadSync(random_syncs(trials, rng))
    wrong, _ = attack(dataset, root, "once", once)
    told = {event["step"]: event["retries"] for event in events(root / "once", "save_retried")}
    forever = BadSync(every_second([(rank, errno.EIO, call, math.inf) for rank, call in SYNCS[:4]]))
    wrong += attack(dataset, root, "forever", forever)[0]
    silent = len(set(forever.at) ^ set(failed_saves(root / "forever")))
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    return [
        Row("calls of fsync that failed once", trials, note="EIO or ESTALE, any call of a save"),
        Row("saves tried again once", list(told.values()).count(1), at_least=trials),
        Row("saves that failed of these", len(failed_saves(root / "once")), at_most=0),
        Row("saves whose fsync never worked", len(forever.at), note="EIO at any call before the rename"),
        Row("of these without their event", silent, at_most=0),
        Row("wrong in these runs", len(wrong), at_most=0),
    ]


def slow_disk(dataset: Path, root: Path) -> list[Row]:
    """T208: real processes with their watchdogs, whose saves take longer than a step may, but not three times as long."""
    settings = {**SETTINGS, "training.max_steps": 2, "run.hang_timeout_seconds": HANG_SECONDS}
    yaml = write_config(dataset, root, "slow", **{**settings, "checkpoint.save_interval": 2})
    with Job(yaml, fsync_seconds=0.35 * HANG_SECONDS) as job:
        job.wait_until_gone(300)
        codes = job.codes()
    seconds = [event["seconds"] for event in events(root / "slow", "committed")]
    note = f"a step may take {HANG_SECONDS} s, a save three times as long"
    return [
        Row("longest save on a slow disk", max(seconds, default=0), "s", at_least=HANG_SECONDS, note=note),
        Row("ranks that ended with 0", codes.count(0), at_least=2),
    ]


def run(trials: int | None, seed: int) -> Outcome:
    """`trials` counts the saves that are cut off (100 unless given); a quarter as many of the other kinds."""
    trials = 100 if trials is None else trials
    some, rng = max(4, trials // 4), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="dsgpt-storage-") as name:
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        size = shard_bytes(dataset, root)
        rows = limits(dataset, root, trials, size, rng)
        rows += full_disks(dataset, root, some, size, rng)
        rows += bad_syncs(dataset, root, some, rng)
        close_all()
        rows += slow_disk(dataset, root)
    return Outcome(rows, trials + 2 * some + 5)
