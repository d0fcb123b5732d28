"""Anonymous memory of a process: what it has allocated, without files that are mapped or in the page cache."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

INTERVAL_SECONDS = 0.02


def anonymous_bytes(pid: int) -> int:
    """0 for a process that has ended and was not waited for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


class AnonymousPeak:
    """Samples RssAnon of a process in a thread until it ends, or this one does."""

    def __init__(self, pid: int):
        self._pid = pid
        self._peak, self._stop = self.now(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while not self._stop.wait(INTERVAL_SECONDS):
                self._peak = max(self._peak, self.now())

    def now(self) -> int:
        """Bytes; 0 for a process that has ended and was not waited for."""
        return anonymous_bytes(self._pid)

    def take(self) -> int:
        """The largest so far, in bytes; counted from now on again."""
        peak, self._peak = self._peak, 0
        return peak

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak
