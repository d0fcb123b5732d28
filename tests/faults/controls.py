"""Controls of the fault matrix: what the other entries compare repeats by itself, and every known defect is caught.

python -m tests.faults controls [--trials N --seed S]      N kills of bare DeepSpeed, 20 unless given; about five minutes

* T001: the same run twice, as processes, without a fault, has the same bits. Without this no comparison says anything.
* T002: one piece of state is forgotten on resume, one at a time, in real ranks; the comparison must fail every time. A
  resume that forgets nothing must pass it.
* T003: broken commit protocols must be caught: no atomic rename, manifest first, the only good one deleted (by killing),
  files or folders not forced to storage (by the order of the calls: killing a process does not drop the page cache),
  a commit before all ranks have told that they are done (by a slow rank).
* T004: kills as in `kill`, more of them within saves, on bare DeepSpeed and its `latest`. It is context, whatever it shows;
  nothing must hold there.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from dsgpt.checkpoint import commit as protocol
from tests.faults import _bare, _mutations
from tests.faults._jobs import SETTINGS, differences, undisturbed
from tests.faults.protocol import BROKEN, every_point
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset

Save = Callable[[Path, Path], None]


# ---- T003: the order of the calls -------------------------------------------------------------------------------------


def _whole_save(folder: Path, tmp: Path) -> None:
    names = sorted(path.name for path in tmp.iterdir())
    protocol.commit(folder, tmp, {"step": 1, "files": protocol.hash_files(tmp, names)})


def _shards_not_forced(folder: Path, tmp: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": protocol.hash_file(p)} for p in sorted(tmp.iterdir())}
    protocol.commit(folder, tmp, {"step": 1, "files": files})


def _renamed_before_forced(folder: Path, tmp: Path) -> None:
    """The manifest and the folder reach storage only after the rename."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        final = protocol.commit(folder, tmp, {"step": 1, "files": protocol.hash_files(tmp, ["shard"])})
    for path in (*final.iterdir(), final, folder):
        protocol.fsync_path(path)


def _rename_not_forced(folder: Path, tmp: Path) -> None:
    """The folder that lists the checkpoints is left to the system."""
    with mock.patch.object(protocol, "fsync_path", lambda path: None if path == folder else _fsync_path(path)):
        _whole_save(folder, tmp)


_fsync_path = protocol.fsync_path
UNFORCED = (_shards_not_forced, _renamed_before_forced, _rename_not_forced)


def unforced(folder: Path, save: Save) -> list[str]:
    """T113: what a save has not forced to storage in the moment of its rename, and of the rename itself afterwards."""
    tmp = protocol.begin(folder, 1, "order")
    (tmp / "shard").write_bytes(b"x" * 1000)
    forced: dict[str, tuple[int, int]] = {}
    found: list[str] = []
    fsync, rename = os.fsync, os.rename

    def state(path: Path) -> tuple[int, int]:
        return path.stat().st_mtime_ns, path.stat().st_size

    def watch_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        forced[str(path)] = state(path)

    def watch_rename(source: Path, target: Path) -> None:
        for path in (*Path(source).iterdir(), Path(source)):
            if forced.get(str(path)) != state(path):
                found.append(f"{path.name} was not forced to storage before the rename")
        rename(source, target)
        forced.pop(str(folder), None)

    with mock.patch.object(os, "fsync", watch_fsync), mock.patch.object(os, "rename", watch_rename):
        save(folder, tmp)
    if forced.get(str(folder)) != state(folder):
        found.append("the rename itself was not forced to storage")
    return found


# ---- all together ----------------------------------------------------------------------------------------------------


def _same_twice(dataset: Path, root: Path) -> int:
    from tests.run_fixtures import write_config

    first, second = (write_config(dataset, root, name, **SETTINGS) for name in ("first", "second"))
    reference = undisturbed(first, root / "first")
    undisturbed(second, root / "second")
    return len(differences(root / "second", reference))


def _in_ranks(dataset: Path, root: Path) -> list[Row]:
    """T002, and T003's missing barrier."""
    from tests.pool import close_all, ranks
    from tests.run_fixtures import write_config

    os.environ["DS_ACCELERATOR"] = "cpu"
    yaml, pool = write_config(dataset, root, "mutated", **_mutations.SETTINGS), ranks(2)
    found = _mutations.forget(pool, yaml, root, list(_mutations.MUTATIONS))
    waits, hurries = (
        pool.run(_mutations.save_with_a_slow_rank, yaml, root / f"barrier-{barrier}", barrier)[0]
        for barrier in (True, False)
    )
    close_all()
    whole = sum(len(found[variant]) for variant in _mutations.VARIANTS)
    overlooked = [name for name in _mutations.MUTATIONS if not found[name]]
    return [
        Row("T002 a whole resume differs", whole, at_most=0, note=", ".join(_mutations.VARIANTS)),
        Row(
            "T002 forgotten state caught",
            len(_mutations.MUTATIONS) - len(overlooked),
            at_least=len(_mutations.MUTATIONS),
            note=f"overlooked: {', '.join(overlooked) or 'none'}; forgotten: {', '.join(_mutations.MUTATIONS)}",
        ),
        Row("T003 parts missing with the barrier", len(waits), at_most=0),
        Row("T003 parts missing without it", len(hurries), at_least=1, note="; ".join(hurries)),
    ]


def run(trials: int | None, seed: int) -> Outcome:
    """All four. `trials` counts the kills of bare DeepSpeed."""
    trials = 20 if trials is None else trials
    with tempfile.TemporaryDirectory(prefix="dsgpt-controls-") as name:
        root = Path(name)
        dataset = make_dataset(root / "dataset")
        rows = [Row("T001 differences of two equal runs", _same_twice(dataset, root), at_most=0)]
        rows += _in_ranks(dataset, root)
        caught = [bool(every_point(root / commit.__name__, commit)[1]) for commit in BROKEN]
        open_gaps = [bool(unforced(root / save.__name__, save)) for save in UNFORCED]
        rows += [
            Row("T003 broken protocols caught by killing", sum(caught), at_least=len(BROKEN)),
            Row("T003 not forced, caught by order", sum(open_gaps), at_least=len(UNFORCED)),
            Row("T113 not forced by dsgpt's own", len(unforced(root / "order", _whole_save)), at_most=0),
        ]
        struck, in_save, runs, broken = _bare.run(root / "bare", trials, random.Random(seed))
    for line in broken.lines[:20]:
        print(line)
    rows.append(Row("T004 kills of bare DeepSpeed", struck, note=f"{in_save} within a save, in {runs} runs"))
    for kind in ("resume failed", "lost all", "lost a save", "continued wrongly"):
        rows.append(Row(f"T004 bare DeepSpeed: {kind}", broken.counts[kind], note="context: no must"))
    return Outcome(rows, struck)
