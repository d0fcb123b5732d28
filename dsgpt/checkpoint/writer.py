"""The process that writes a rank's checkpoint files while the rank trains on.

    writer = WriterProcess(descriptor); writer.write(path, header_bytes, data_bytes); writer.poll()

The rank copies its state into anonymous memory (memfd) in a file's order; this process hashes it, writes it and forces it to
storage, at low priority, and answers with the file's manifest entry: one JSON line each way. The bytes are those that the
rank itself would have written. When it dies, the memory is still there, and the rank writes it itself.

Trade-off: a process rather than a thread, because hashing and checksums in Python would hold the training process's
interpreter; host memory for one more copy of the rank's share of the state. It ends with its rank, whatever ends that one.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.commit import retrying
from dsgpt.checkpoint.files import write_file
from dsgpt.process import end_with_parent

NICE = 5


def write_memory(memory: memoryview, path: Path, header_bytes: int, data_bytes: int) -> tuple[dict[str, Any], int]:
    """Write a file whose header and data lie in memory; (manifest entry, how often it was tried again). Raises OSError."""
    header = bytes(memory[:header_bytes])
    table = json.loads(header[8:])
    tensors = [table[name]["data_offsets"] for name in table if name not in ("__metadata__", "checksums")]
    data = memory[header_bytes : header_bytes + data_bytes]
    return retrying(lambda: write_file(path, header, (data[start:stop] for start, stop in tensors)))


class WriterProcess:
    """Held by the rank. One file at a time: `write`, then `poll` until it answers."""

    def __init__(self, descriptor: int):
        command = [sys.executable, "-m", "dsgpt.checkpoint.writer", str(descriptor), str(os.getpid())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=[descriptor], bufsize=0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, path: Path, header_bytes: int, data_bytes: int) -> bool:
        """Begin; False where the process is gone."""
        job = {"path": str(path), "header_bytes": header_bytes, "data_bytes": data_bytes}
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        except OSError:
            return False
        return True

    def poll(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """Its answer, {"entry", "retries"} or {"error"}; {"died"} where it is gone; None where it is still at work."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else {"died": self._process.wait()}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main(arguments: list[str]) -> None:
    """The process itself: answers jobs from stdin until the rank is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a warning to the job: the rank decides, and needs this process for it
    descriptor, parent = int(arguments[0]), int(arguments[1])
    end_with_parent(parent)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    memory = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    for line in sys.stdin:
        job = json.loads(line)
        try:
            entry, retries = write_memory(memory, Path(job["path"]), job["header_bytes"], job["data_bytes"])
            answer = {"entry": entry, "retries": retries}
        except OSError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
