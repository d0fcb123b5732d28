"""What a job starts on each of its hosts: DeepSpeed's launcher for the node, and an end to it when the job ends.

    python -m dsgpt.launch.node WORD --node-rank=1     over ssh or pdsh: all ranks of one host
    python -m dsgpt.launch.node WORD                   as a rank: of DeepSpeed's launcher, or of mpirun

WORD is `carried.pack`'s. As a rank this process becomes `python -m dsgpt.train` with the arguments as they were; they do not
pass through DeepSpeed's parser, which takes some for its own. Over ssh it stays, its standard input open to the supervisor:
where that ends, the supervisor or the connection is gone, and the ranks are told to commit and stop, then killed. An end of
the transport alone would leave them running, because nobody tells a program without a terminal that ssh has gone.
Output goes to `logs/<attempt>/<host>.log` in the run folder, so a host that does not see that folder fails here by name.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import dsgpt
from dsgpt.errors import ConfigError, DsgptError, LockedError
from dsgpt.launch.carried import Carried
from dsgpt.launch.hardware import cpu_count
from dsgpt.launch.launcher import RUNNING, group_is_alive
from dsgpt.launch.openmpi import ranks
from dsgpt.process import complain, die_with_parent

# DeepSpeed's launcher gives its ranks as long.
STOP_SECONDS = 30.0
KILL = b"K"  # on standard input: at once
_POLL_SECONDS = 0.2
# A network file system may take its time to show a new folder.
_FOLDER_SECONDS = 10.0


def main(words: Sequence[str]) -> int:
    """Run one node or become one rank; the exit code of the former."""
    try:
        carried = Carried.unpack(words[0])
        if carried.version != dsgpt.__version__:
            do = "install the same dsgpt on all hosts, at the same path"
            raise ConfigError(f"another dsgpt on {socket.gethostname()}", f"{dsgpt.__version__}, {carried.version}", do)
        os.environ.update(carried.environment)
        _enter(carried.folder)
        if len(words) == 1:
            _become_rank(carried)
        return _run_node(carried, int(words[1].removeprefix("--node-rank=")))
    except DsgptError as error:
        complain(str(error))
        return int(error.exit_code)


def _enter(folder: str) -> None:
    """The folder in which the command was given: paths of the arguments count from there."""
    try:
        os.chdir(folder)
    except OSError as error:
        do = "give the command in a folder that all hosts share"
        raise ConfigError(f"{socket.gethostname()} does not see the working folder", str(error), do) from None


def _become_rank(carried: Carried) -> None:
    master = {"MASTER_ADDR": carried.master_addr, "MASTER_PORT": str(carried.master_port)}
    if told := ranks({**os.environ, **master}):
        os.environ.update({**master, **told})
        local = int(told["LOCAL_SIZE"])
        # As DeepSpeed's launcher does: the hostfile's slots, and no GPU beyond them.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(local))))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // local)))
        with _open_log(carried) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "dsgpt.train", *carried.arguments])


def _run_node(carried: Carried, node_rank: int) -> int:
    """Start DeepSpeed's launcher and stay until nothing of it is left; its exit code, 128 and more for a signal's."""
    slots = list(carried.world.values())[node_rank]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // len(slots))))
    world = base64.urlsafe_b64encode(json.dumps(carried.world).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += [
        f"--node_rank={node_rank}",
        f"--master_addr={carried.master_addr}",
        f"--master_port={carried.master_port}",
    ]
    command += ["--no_local_rank", "--module", "dsgpt.launch.node", sys.argv[1]]
    stop = _Stop()
    with _open_log(carried) as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    kill_at, mark = None, Path(carried.log_dir, RUNNING.format(node_rank))
    with contextlib.suppress(OSError):
        mark.touch()
    while process.poll() is None or group_is_alive(process.pid):
        stop.wait()
        if stop.requested and kill_at is None:
            kill_at = time.monotonic() + STOP_SECONDS
            process.terminate()  # to its ranks it passes it on
        if stop.kill or (kill_at is not None and time.monotonic() > kill_at):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        mark.unlink()
    code = process.returncode
    return code if code >= 0 else 128 - code


class _Stop:
    """The end of standard input, or a signal: stop. The byte K there: kill."""

    def __init__(self) -> None:
        self.requested = self.kill = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True

    def wait(self) -> None:
        if self.requested:
            time.sleep(_POLL_SECONDS)
        elif select.select([0], [], [], _POLL_SECONDS)[0]:
            with contextlib.suppress(OSError):
                self.kill = os.read(0, 1) == KILL
            self.requested = True


def _open_log(carried: Carried) -> BinaryIO:
    path = Path(carried.log_dir, f"{socket.gethostname()}.log")
    until = time.monotonic() + _FOLDER_SECONDS
    while True:
        try:
            return path.open("ab")
        except OSError as error:
            if time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
                continue
            do = "put run.output_dir on a file system that all hosts share, at the same path"
            raise LockedError(f"{socket.gethostname()} does not see the run folder", str(error), do) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
