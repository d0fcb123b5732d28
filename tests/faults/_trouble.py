"""Trouble with storage during some steps of a real run in pooled ranks, and what it must leave behind. No entry itself.

    ends = ranks(2).run(train, yaml, [], "a", FileLimit({2: (1, 4096)}))     # step 2: rank 1 may write 4 KiB a file

Errors come from the kernel wherever one can make it give them: a limit on the size of files, a full or read-only file
system, permissions of another user. Only EIO and ESTALE are put into os.fsync. Trouble begins with a step, so that it is
there when that step is saved, and ends with the next one. Trade-off: ranks of a pool start in no time, and there is no
launcher, lease or watchdog around them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.errors import DsgptError
from dsgpt.process import StopRequest

NOBODY, UNLIMITED = 65534, resource.RLIM_INFINITY


class Trouble(StopRequest):
    """What is wrong in which step of a start: {step: argument of `begin`}. Polled once a step, on every rank.

    Rank 0 looks into the folder `watched` after every step: what it shows that it must not is `found`.
    """

    watched: Path | None = None

    def __init__(self, at: Mapping[int, Any] | None = None, stop_at: int = 0):
        super().__init__()
        self.at, self.stop_at, self.step, self.rank = dict(at or {}), stop_at, 0, 0
        self.open_files: list[int] = []
        self.found: list[str] = []

    def poll(self) -> bool:
        self.step += 1
        self.end()
        if self.watched and self.rank == 0:
            self.found += [f"after step {self.step - 1}: {one}" for one in unsound(self.watched)]
        self.open_files.append(len(os.listdir("/proc/self/fd")))
        if self.step in self.at:
            self.begin(self.at[self.step])
        return self.step == self.stop_at

    def begin(self, what: Any) -> None: ...

    def end(self) -> None: ...


class FileLimit(Trouble):
    """{step: (rank, bytes)}: no file may grow beyond that on this rank (None: on both), as over a quota of one server."""

    def begin(self, what: tuple[int | None, int]) -> None:
        if what[0] in (None, self.rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (what[1], UNLIMITED))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))


class FullDisk(Trouble):
    """{step: bytes left free}: everything else on the file system of `folder` is taken."""

    def __init__(self, at: Mapping[int, int], folder: Path):
        super().__init__(at)
        self.filler = folder / "filler"

    def begin(self, what: int) -> None:
        if self.rank == 0:
            stats = os.statvfs(self.filler.parent)
            with self.filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, stats.f_bavail * stats.f_frsize - what))

    def end(self) -> None:
        if self.rank == 0:
            self.filler.unlink(missing_ok=True)


class NoInodes(FullDisk):
    """{step: files that may still be made}: room for bytes, but not for names."""

    def begin(self, what: int) -> None:
        if self.rank == 0:
            self.filler.mkdir()
            for number in range(os.statvfs(self.filler).f_ffree - what):
                (self.filler / str(number)).touch()

    def end(self) -> None:
        if self.rank == 0 and self.filler.is_dir():
            for path in self.filler.iterdir():
                path.unlink()
            self.filler.rmdir()


class ReadOnly(Trouble):
    """{step: folder}: the folder is mounted read-only."""

    mounted = ""

    def begin(self, what: Path) -> None:
        if self.rank == 0:
            mount("--bind", str(what), str(what))
            mount("-o", "remount,ro,bind", str(what))
            self.mounted = str(what)

    def end(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.mounted], check=True)
            self.mounted = ""


class OtherUser(Trouble):
    """{step: rank}: that rank (None: both) is a user who may read and write nothing here."""

    def begin(self, what: int | None) -> None:
        if what in (None, self.rank):
            os.seteuid(NOBODY)

    def end(self) -> None:
        os.seteuid(os.getuid())


class BadSync(Trouble):
    """{step: (rank, errno, first, count)}: that rank's calls of fsync from the first-th on fail, count times."""

    real = staticmethod(os.fsync)

    def begin(self, what: tuple[int | None, int, int, float]) -> None:
        rank, number, first, count = what
        if rank not in (None, self.rank):
            return
        calls = 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if first <= calls < first + count:
                raise OSError(number, os.strerror(number))
            self.real(descriptor)

        os.fsync = fsync

    def end(self) -> None:
        os.fsync = self.real


def train(
    world: Any,
    yaml: Path,
    overrides: list[str],
    attempt: str,
    trouble: Trouble | None = None,
    restarts: int = 0,
) -> dict[str, Any]:
    """One start of a run, on every rank: {"code", "step", "text", "told"} and what `trouble` saw.

    `restarts` says how often the scheduler's job 7 was requeued; 0 is no scheduler.
    """
    from dsgpt.config import load_config
    from dsgpt.train.loop import train as train_run
    from dsgpt.train.resolve import resolve_run

    trouble = trouble or Trouble()
    trouble.rank, world.attempt = world.rank, attempt
    world.job, world.restarts = ("7", restarts) if restarts else ("", 0)
    told, end = io.StringIO(), {"code": 0, "step": -1, "text": ""}
    try:
        plan = resolve_run(load_config([yaml], overrides).config, world_size=world.size, device="cpu")
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            end["step"] = train_run(plan, world, trouble).step
    except DsgptError as error:
        end |= {"code": int(error.exit_code), "text": f"{type(error).__name__}: {error}"}
    finally:
        trouble.end()
        world.job, world.restarts = "", 0
    return end | {"open_files": trouble.open_files, "found": trouble.found, "told": told.getvalue()}


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The events of these names, or all. A line that is not whole is an error here."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if not names or line["event"] in names]


def unsound(folder: Path) -> list[str]:
    """What a run folder shows that it must not: damaged checkpoints, leftovers, folders that are none of dsgpt's."""
    checkpoints = folder / "checkpoints"
    committed = commit.list_committed(checkpoints)
    found = [str(problem) for _, path in committed for problem in commit.verify(path)]
    known = {path.name for _, path in committed}
    found += [f"left behind: {name}" for name in sorted(set(os.listdir(checkpoints)) - known)]
    return found


def steps(folder: Path) -> list[int]:
    return [step for step, _ in commit.list_committed(folder / "checkpoints")]


def hashes(folder: Path, step: int) -> dict[str, str]:
    """Of the files that a step consists of, as they lie on the disk."""
    return {
        path.name: commit.hash_file(path) for path in sorted((folder / f"checkpoints/step-{step:08d}").glob("rank-*"))
    }


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether file systems can be mounted here: as root on Linux, outside of most containers."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "size=1m"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A real file system of its own in `folder`, as small as the options say, as long as the context lasts."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
