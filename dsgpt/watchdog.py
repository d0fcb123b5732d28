"""A second process beside every rank that sees when the rank is dead or stuck. Torch-free.

    heartbeat = start_watchdog(rank)          # before anything slow is imported
    heartbeat.attach(log_dir, rank)           # once the run's folder is known
    heartbeat.phase("step", step=17, seconds=600.0)
    heartbeat.end()                           # the verdict is written: what still runs is only leaving

It is a process because a thread cannot run while something holds the interpreter's lock, and one per rank because it can
then look after its own rank without any network. The rank writes what it is doing into shared memory; the watchdog

* sees the rank die at once (pidfd) and, where no verdict was written, writes it: killed, or out of memory where the kernel
  counted such a kill;
* sees a phase last longer than its budget: the rank that got least far is named, since the others only wait for it;
* sees a verdict written for another rank: dumps this rank's stacks, gives it GRACE_SECONDS to leave by itself, kills it;
* sees a rank that should have left and hangs in doing so, and kills it.

Growth: one look per second at one file of the run folder per rank; nothing passes through rank 0. The time to see a
dead rank on another node is what the shared file system takes to show a new file (seconds; up to a minute on NFS).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dsgpt.errors import ExitCode
from dsgpt.process import complain, host_name, write_once
from dsgpt.verdict import Verdict, read_verdict, record_verdict

POLL_SECONDS, GRACE_SECONDS, LEAVE_SECONDS, COMPARE_SECONDS = 1.0, 5.0, 20.0, 2.0
MEMORY_LOOKS = 30
STACK_SIGNAL = signal.SIGRTMIN + 8  # nobody else's; faulthandler writes all threads' stacks, even under a held lock
_SIZE = 1 << 16
# ticks, time of the last one (monotonic), budget of the phase in seconds, step, ended, phase
_HEAD = struct.Struct("<Qddq?24s")
_INFO = struct.Struct("<I")


class Heartbeat:
    """The rank's side: a few bytes of shared memory. Without a watchdog (`buffer` None) it does nothing."""

    def __init__(self, buffer: mmap.mmap | None = None):
        self._buffer, self._ticks, self._step, self._budget = buffer, 0, -1, 0.0
        self._phase, self._since = "start", time.monotonic()
        self.spent: dict[str, float] = {}  # seconds in the phases that are over
        self._stacks: TextIO | None = None
        self.information: dict[str, Any] = {}
        self.log_dir: Path | None = None

    @property
    def step(self) -> int:
        return self._step

    @property
    def current_phase(self) -> str:
        return self._phase

    def phase(self, name: str, step: int | None = None, seconds: float = 0.0) -> None:
        """From now on the rank does `name`, which may take `seconds` (0: for ever) until the next call."""
        now = time.monotonic()
        self.spent[self._phase] = self.spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._budget, self._since = name, seconds, now
        self._step = self._step if step is None else step
        self.tick()

    def times(self) -> dict[str, float]:
        """Seconds spent in each phase so far, this one included."""
        running = self.spent.get(self._phase, 0.0) + time.monotonic() - self._since
        return {**self.spent, self._phase: running}

    def tick(self) -> None:
        """Still in the same phase, and getting on: its time counts anew."""
        self._ticks += 1
        self._write(ended=False)

    def end(self) -> None:
        self._ticks += 1
        self._write(ended=True)

    def attach(self, log_dir: Path, rank: int) -> None:
        """Say where reports and stacks go."""
        self.log_dir = log_dir
        if self._buffer is not None:
            with contextlib.suppress(OSError):
                self._stacks = (log_dir / stacks_file(rank)).open("a")
                faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
            self.tell(log_dir=str(log_dir), tells_stacks=self._stacks is not None)

    def tell(self, **information: Any) -> None:
        """What belongs into the report of a sudden end: small JSON values (plan, remedies, last commit)."""
        self.information |= information
        text = json.dumps(self.information).encode()
        if self._buffer is not None and len(text) < _SIZE - _HEAD.size - 4:
            self._buffer[_HEAD.size : _HEAD.size + 4 + len(text)] = _INFO.pack(len(text)) + text

    def _write(self, ended: bool) -> None:
        if self._buffer is not None:
            name = self._phase.encode()[:24]
            # Not pack_into: it zeroes the buffer first, and the watchdog may look in that moment.
            head = _HEAD.pack(self._ticks, time.monotonic(), self._budget, self._step, ended, name)
            self._buffer[: _HEAD.size] = head


def start_watchdog(rank: int) -> Heartbeat:
    """Start the watchdog of this process. Without the means (not Linux) the run goes on unwatched, and says so."""
    if not hasattr(os, "pidfd_open") or not hasattr(os, "memfd_create"):
        print("warning: no watchdog here (it needs Linux)", file=sys.stderr, flush=True)
        return Heartbeat()
    descriptor = os.memfd_create("dsgpt-heartbeat", 0)
    os.ftruncate(descriptor, _SIZE)
    heartbeat = Heartbeat(mmap.mmap(descriptor, _SIZE))
    heartbeat.phase("start")
    command = [sys.executable, "-m", "dsgpt.watchdog", str(os.getpid()), str(rank), str(descriptor)]
    # Not a child that anybody waits for: it outlives this process by a moment.
    subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL)
    os.close(descriptor)
    return heartbeat


# ---- the other process ------------------------------------------------------------------------------------------------


class Watchdog:
    """Watches one rank until it is gone."""

    def __init__(self, pid: int, rank: int, buffer: mmap.mmap):
        self.pid, self.rank, self.buffer, self.host = pid, rank, buffer, host_name()
        self.killed_for_memory = _memory_kills()

    def read(self) -> tuple[int, float, float, int, bool, str]:
        """(ticks, time of the last, budget, step, ended, phase)."""
        while (head := self.buffer[: _HEAD.size]) != self.buffer[: _HEAD.size]:
            pass  # it is being written
        ticks, when, budget, step, ended, name = _HEAD.unpack(head)
        return ticks, when, budget, step, ended, name.rstrip(b"\0").decode()

    def information(self) -> dict[str, Any]:
        (length,) = _INFO.unpack_from(self.buffer, _HEAD.size)
        try:
            return dict(json.loads(self.buffer[_HEAD.size + 4 : _HEAD.size + 4 + length] or b"{}"))
        except ValueError:
            return {}

    @property
    def log_dir(self) -> Path | None:
        text = self.information().get("log_dir")
        return Path(text) if text else None

    def watch(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the rank was faster gone than this process started
            self._follow(os.pidfd_open(self.pid))
        if not self.read()[4]:
            self.report_death()

    def _follow(self, pidfd: int) -> None:
        """Return when the rank is gone."""
        leave_by = None
        kills: deque[int] = deque(maxlen=MEMORY_LOOKS)  # a kill of long ago, or of somebody else, explains nothing
        while not select.select([pidfd], [], [], POLL_SECONDS)[0]:
            kills.append(_memory_kills())
            self.killed_for_memory = kills[0]
            _, when, budget, _, ended, _ = self.read()
            now = time.monotonic()
            if leave_by is not None:
                if now > leave_by:
                    self.kill()
            elif ended:
                leave_by = when + LEAVE_SECONDS
            elif (verdict := self.verdict()) is not None:
                good = verdict.exit_code in (ExitCode.DONE, ExitCode.PREEMPTED)
                leave_by = now + (LEAVE_SECONDS if good else GRACE_SECONDS)
                if not good:
                    self.dump_stacks()
            elif budget and now - when > budget:
                try:
                    self.report_hang()
                finally:
                    self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.information().get("tells_stacks"):  # without its handler the signal would kill it
                os.kill(self.pid, STACK_SIGNAL)
                time.sleep(0.5)

    def is_in_collective(self) -> bool:
        """Whether the stacks just dumped show this rank waiting for others."""
        folder = self.log_dir
        try:
            return folder is not None and "distributed_c10d" in (folder / stacks_file(self.rank)).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return False

    def verdict(self) -> Verdict | None:
        folder = self.log_dir
        return read_verdict(folder) if folder is not None else None

    def report_hang(self) -> None:
        """Write what this rank is stuck in, look what the others wrote, and give the verdict on the one stuck first.

        That is a stopped one, else one that is not inside a collective of torch (there it only waits for the others),
        else the one that got least far, else the one that computes.
        """
        ticks, when, budget, step, _, phase = self.read()
        state = process_state(self.pid)
        self.dump_stacks()
        mine = {
            "rank": self.rank,
            "host": self.host,
            "phase": phase,
            "step": step,
            "ticks": ticks,
            "state": state,
            "waits": self.is_in_collective(),
            "seconds": round(time.monotonic() - when, 1),
        }
        folder = self.log_dir
        if folder is None:
            complain(f"rank {self.rank} does not get on with {phase!r} for {budget:.0f} s: killed")
            return
        with contextlib.suppress(OSError):
            write_once(folder / f"hang-rank-{self.rank:05d}.json", json.dumps(mine) + "\n")
        time.sleep(COMPARE_SECONDS)
        if self.verdict() is not None:
            return
        stuck = min(_hangs(folder) or [mine], key=_blame)
        stopped = " (it was stopped by a signal)" if stuck["state"] == "T" else ""
        self.give_verdict(
            ExitCode.INFRASTRUCTURE,
            "hang",
            f"rank {stuck['rank']} on {stuck['host']} got stuck in {stuck['phase']!r} at step {stuck['step']}{stopped}; "
            f"no sign of life for {stuck['seconds']:.0f} s. Stacks of all ranks: {folder}/stacks-rank-*.txt",
            stuck,
        )

    def report_death(self) -> None:
        """The rank is gone without a verdict of its own."""
        _, _, _, step, _, phase = self.read()
        where = {"rank": self.rank, "host": self.host, "step": step, "phase": phase}
        if _memory_kills() > self.killed_for_memory:
            told = self.information()
            plan, remedy = told.get("plan", "not known"), " or ".join(told.get("remedies", []))
            self.give_verdict(
                ExitCode.OUT_OF_MEMORY,
                "out_of_memory",
                f"the kernel killed rank {self.rank} on {self.host} for want of host memory, in {phase!r} at step {step}\n"
                f"  seen: {told.get('use', 'use not known')}; planned: {plan}\n  do:   {remedy}",
                where,
            )
            return
        self.give_verdict(
            ExitCode.INFRASTRUCTURE,
            "rank_died",
            f"rank {self.rank} on {self.host} was killed or crashed in {phase!r} at step {step}\n"
            f"  seen: newest commit: {self.information().get('last_committed', 'not known')}; the log has its last words\n"
            f"  do:   start the same command again to continue",
            where,
        )

    def give_verdict(self, code: ExitCode, cause: str, message: str, where: Mapping[str, Any]) -> None:
        folder, told = self.log_dir, self.information()
        complain(message)
        if folder is not None:
            committed = told.get("last_committed", -1), told.get("committed_here", False)
            place = where["rank"], where["host"], where["step"], where["phase"]
            verdict = Verdict(int(code), cause, message, *place, *committed)
            record_verdict(folder, verdict.after(told.get("failed_starts", 0)))


def stacks_file(rank: int) -> str:
    return f"stacks-rank-{rank:05d}.txt"


def _blame(hang: Mapping[str, Any]) -> tuple[Any, ...]:
    return hang["state"] != "T", hang["waits"], hang["ticks"], hang["state"] != "R", hang["rank"]


def _hangs(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("hang-rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text("utf-8")))
    return found


def process_state(pid: int) -> str:
    """The kernel's letter: R runs, S sleeps, D waits for storage, T is stopped; "" of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _memory_kills() -> int:
    """How often the kernel has killed for want of memory in this process's cgroup; on the host, where that is not told."""
    places = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                places.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
            elif "memory" in controllers.split(","):
                places.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    for place in (*places, Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            return next(int(line.split()[1]) for line in place.read_text().splitlines() if line.startswith("oom_kill "))
    return 0


def main(arguments: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank
    pid, rank, descriptor = (int(text) for text in arguments)
    Watchdog(pid, rank, mmap.mmap(descriptor, _SIZE)).watch()


if __name__ == "__main__":
    main(sys.argv[1:])
