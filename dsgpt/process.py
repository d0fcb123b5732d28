"""What every process of a run needs from the operating system: stop requests, parents, ports, names. Torch-free.

Being asked to stop: SIGTERM, SIGINT and SIGUSR1 set a flag that the training loop reads between steps. Saving inside a
signal handler would deadlock collectives and could interrupt a save; a flag cannot. The handlers must be in place before
the slow imports of a worker start: until then the default action of these signals is death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies, so that no orphan keeps computing."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the launcher's own clean-up remains
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_attempt() -> str:
    """A name for one start of a run: sortable by time, unique between starts in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class StopRequest:
    """`requested` says why (a signal's name or a control file), or is empty.

    The same SIGINT or SIGTERM twice is a person losing patience: the process ends at once,
    which loses nothing, because only whole checkpoints are ever visible.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._control_file: Path | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def watch(self, control_file: Path) -> None:
        """Also stop when this file appears: the supervisor's way to ask all nodes without a signal."""
        self._control_file = control_file

    def poll(self) -> bool:
        if not self.requested and self._control_file is not None and self._control_file.exists():
            self.requested = self._control_file.name
        return bool(self.requested)

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        # A launcher may pass one request on as two different signals; the same one twice is a second request.
        if self.requested == name and number != signal.SIGUSR1:
            os._exit(128 + number)
        self.requested = self.requested or name
