"""Who owns a run folder: a lease that its holder renews, so that two jobs never train in one folder. Torch-free.

    lease = Lease.acquire(folder, Owner.of_this_process("20260101-120000-1f3a", job="1234"))

The holder has a file `.lease-<number>`; the highest number holds the folder. A job takes over by creating the next
number, which of any number of contenders exactly one can do, on every file system, without file locks (many cluster
file systems have none, or one set per node). When a lease may be taken over:

* it was released, or its holder is the same SLURM job before its last requeue;
* its holder ran on this host and its process is gone: at once;
* its holder is elsewhere and did not renew it while we looked on for LEASE_SECONDS. Only changes count, never clocks, so
  clocks that disagree do no harm.

A holder that finds a higher number was cut off (its node hung, its network broke) and must not write any more: `check`
raises then, and is called right before every commit; the thread that renews calls `on_lost` as soon as it sees it. Cost:
the holder rewrites 300 bytes every RENEW_SECONDS, whatever the number of ranks; a start after the death of another host
waits up to LEASE_SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsgpt.errors import LockedError
from dsgpt.process import write_once

LEASE_SECONDS, RENEW_SECONDS = 60.0, 10.0
_LEASE = re.compile(r"^\.lease-(\d+)$")


@dataclass(frozen=True)
class Owner:
    """Which process of which job on which host. `job` is the scheduler's id ("" outside one), `restarts` its requeues."""

    attempt: str
    job: str = ""
    restarts: int = 0
    host: str = ""
    machine: str = ""  # the boot of the kernel and the process namespace: where a process id has a meaning
    pid: int = 0
    pid_started: str = ""

    @classmethod
    def of_this_process(cls, attempt: str, job: str = "", restarts: int = 0) -> Owner:
        pid = os.getpid()
        return cls(attempt, job, restarts, socket.gethostname(), _machine(), pid, _started(pid))

    def is_gone(self) -> bool:
        """Whether it certainly ended: known only of processes of this host."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.pid_started

    def is_here(self) -> bool:
        return bool(self.machine) and self.machine == _machine()

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, attempt {self.attempt}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: every holder counts as being elsewhere
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: tells it from a later one of the same number. "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _newest(folder: Path) -> tuple[int, str] | None:
    """Number and text of the lease in force; the text is "" where it cannot be read just now."""
    numbers = [int(match.group(1)) for name in os.listdir(folder) if (match := _LEASE.match(name))]
    if not numbers:
        return None
    try:
        return max(numbers), (folder / f".lease-{max(numbers)}").read_text("utf-8")
    except OSError:
        return max(numbers), ""


def _parse(text: str) -> tuple[Owner | None, bool]:
    """(owner, released); no owner where the text is not a lease's."""
    try:
        fields: dict[str, Any] = json.loads(text)
        return Owner(**fields["owner"]), bool(fields["released"])
    except (ValueError, TypeError, KeyError):
        return None, False


def read_holder(folder: Path) -> tuple[Owner, float] | None:
    """Who holds a folder and how many seconds ago, by the clocks of two hosts, it last said so; None where nobody does."""
    try:
        found = _newest(folder)
        owner, released = _parse(found[1]) if found else (None, True)
        if found is None or owner is None or released:
            return None
        return owner, time.time() - (folder / f".lease-{found[0]}").stat().st_mtime
    except OSError:
        return None


def require_free(folder: Path) -> None:
    """Raise LockedError when another live process of this host holds the folder, or it cannot be written.

    What holds it from elsewhere is found out by `acquire`, which may take LEASE_SECONDS.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        found = _newest(folder)
    except OSError as error:
        raise LockedError("the run folder cannot be written", str(error), "choose another run.output_dir") from error
    owner, released = _parse(found[1]) if found else (None, True)
    if not released and owner is not None and owner.is_here() and not owner.is_gone():
        raise _locked(folder, owner)


def _locked(folder: Path, owner: Owner | None) -> LockedError:
    return LockedError(
        "another job is using this run folder", seen=f"{folder}: {owner or 'unknown'}", do="wait for it, or cancel it"
    )


class Lease:
    """Held from `acquire` to `release`; a thread renews it meanwhile."""

    def __init__(self, folder: Path, owner: Owner, number: int):
        self.folder, self.owner, self.number = folder, owner, number
        self._count, self._end = 0, threading.Event()
        self._keeper: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        folder: Path,
        owner: Owner,
        watch_seconds: float = LEASE_SECONDS,
        renew_seconds: float = RENEW_SECONDS,
        say: Callable[[str], None] = lambda text: None,
        on_lost: Callable[[str], None] = lambda text: None,
    ) -> Lease:
        """Take the folder, waiting out a holder that may be dead. Raises LockedError; then nothing was changed."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = _newest(folder)
            if found is not None:
                _wait_until_free(folder, owner, found, watch_seconds, say)
            lease = cls(folder, owner, found[0] + 1 if found else 1)
            if not write_once(lease.path, lease._text()):
                raise _locked(folder, _parse((_newest(folder) or (0, ""))[1])[0])
            if lease.is_lost():  # the list of files that we judged by was an old one
                lease.path.unlink(missing_ok=True)
                raise _locked(folder, _parse((_newest(folder) or (0, ""))[1])[0])
            for name in os.listdir(folder):
                match = _LEASE.match(name)
                if match and int(match.group(1)) < lease.number:
                    with contextlib.suppress(OSError):
                        (folder / name).unlink()
        except OSError as error:
            do = "choose another run.output_dir"
            raise LockedError("the run folder cannot be written", seen=str(error), do=do) from error
        lease._keeper = threading.Thread(
            target=lease._keep, args=(renew_seconds, on_lost), daemon=True, name="dsgpt-lease"
        )
        lease._keeper.start()
        return lease

    @property
    def path(self) -> Path:
        return self.folder / f".lease-{self.number}"

    def _text(self, released: bool = False) -> str:
        return json.dumps({"owner": asdict(self.owner), "renewed": self._count, "released": released}) + "\n"

    def _write(self, released: bool = False) -> None:
        tmp = self.folder / f".tmp-lease-{self.owner.attempt}-{os.getpid()}"
        tmp.write_text(self._text(released), "utf-8")
        os.replace(tmp, self.path)

    def _keep(self, seconds: float, on_lost: Callable[[str], None]) -> None:
        while not self._end.wait(seconds):
            self._count += 1
            with contextlib.suppress(OSError):  # a full disk or a short outage; the next renewal counts as well
                if self.is_lost():
                    on_lost(str(self._lost()))
                    return
                self._write()

    def is_lost(self) -> bool:
        """Whether a later job has taken the folder over."""
        found = _newest(self.folder)
        return found is not None and found[0] > self.number

    def check(self) -> None:
        """Raise LockedError when the folder belongs to another job by now."""
        if self.is_lost():
            raise self._lost()

    def _lost(self) -> LockedError:
        return LockedError(
            "another job has taken over this run folder",
            seen=f"{self.folder}: this job did not renew its lease for {LEASE_SECONDS:.0f} s",
            do="look at that job; this one must not write any more",
        )

    def release(self) -> None:
        """Give the folder back; who died without it is found out by the next job."""
        self._end.set()
        if self._keeper is not None:
            self._keeper.join(timeout=5)
        with contextlib.suppress(OSError):
            if not self.is_lost():
                self._write(released=True)


def _wait_until_free(
    folder: Path, owner: Owner, found: tuple[int, str], watch_seconds: float, say: Callable[[str], None]
) -> None:
    """Return when the lease `found` may be taken over; raise LockedError when its holder is alive."""
    holder, released = _parse(found[1])
    if released or (holder is not None and holder.is_gone()):
        return
    if holder is not None:
        if holder.job and holder.job == owner.job and holder.restarts < owner.restarts:
            return  # a scheduler starts a job again only after its end
        if holder.is_here():
            raise _locked(folder, holder)
    say(f"{folder} was held by {holder or 'an unknown job'}: waiting up to {watch_seconds:.0f} s for a sign of life")
    until = time.monotonic() + watch_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, watch_seconds / 10))
        now = _newest(folder)
        if now is not None and now[0] == found[0] and not found[1]:
            found = now  # it can be read only now: that is no sign of life
        elif now is not None and now[1] and now != found:
            still, released = _parse(now[1])
            if now[0] == found[0] and released:
                return
            raise _locked(folder, still or holder)
