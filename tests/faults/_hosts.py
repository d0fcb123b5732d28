"""Jobs on several hosts: found in /proc by a mark that travels with them, killed in parts. No entry itself.

    with HostJob(command, folder) as job: job.kill("node"); job.wait_until_gone(60)

`fake_programs(folder)` writes an `ssh` and a `pdsh` that run the remote command on this machine as sshd does: by `sh -c`, in a
session of its own, its standard input and output pipes that end with the connection. So faults of launchers can be tried
where there is no second host; the real programs are tried by tests/slurm/test_hosts.py. Processes in another host's
namespaces, as those tests' hosts have, are seen in /proc all the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "DSGPT_FAULTS_JOB"
# What to look for in the command line of a process; the first that fits.
PARTS = {
    "rank": ("-m dsgpt.train ",),
    "watchdog": ("dsgpt.watchdog",),
    "launcher": ("deepspeed.launcher.launch",),
    "mpirun": ("mpirun ",),
    "orted": ("orted",),
    "pdsh": ("pdsh -S",),
    "ssh": ("ssh -T", "ssh -o", "ssh -2"),
    "node": (" --node-rank=",),
    "supervisor": ("-m dsgpt train", "dsgpt train"),
}
FAKE_SSH = """#!{python}
import os, subprocess, sys, threading, time
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("-o", "-l", "-p") else words[1:]
host, command = words[0], " ".join(words[1:])
with open({log!r}, "a") as log:
    print(host, file=log)
shell = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         start_new_session=True, cwd={home!r})
def carry():
    while data := os.read(0, 4096):
        shell.stdin.write(data)
        shell.stdin.flush()
    shell.stdin.close()
def leave():  # as sshd does, whatever still holds the output
    code = shell.wait()
    time.sleep(0.5)
    os._exit(code if code >= 0 else 255)
threading.Thread(target=carry, daemon=True).start()
threading.Thread(target=leave, daemon=True).start()
while data := os.read(shell.stdout.fileno(), 4096):
    os.write(1, data)
time.sleep(60)
"""
FAKE_PDSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = words[words.index("-w") + 2:]
started = []
for number, host in enumerate(hosts):
    replaced = [w.replace("%n", str(number)).replace("%h", host).replace("%u", "user") for w in command]
    started.append(subprocess.Popen([{ssh!r}, "-2", "-a", "-x", host, *replaced], stdin=subprocess.PIPE))
sys.exit(max(abs(one.wait()) for one in started))
"""


def fake_programs(folder: Path) -> dict[str, str]:
    """`ssh` and `pdsh` for this machine in folder/bin; the environment that finds them first. Hosts go to folder/reached."""
    binaries, home = folder / "bin", folder / "home"
    for made in (binaries, home):
        made.mkdir(parents=True, exist_ok=True)
    ssh = binaries / "ssh"
    ssh.write_text(FAKE_SSH.format(python=sys.executable, log=str(folder / "reached"), home=str(home)), "utf-8")
    (binaries / "pdsh").write_text(FAKE_PDSH.format(python=sys.executable, ssh=str(ssh)), "utf-8")
    for program in binaries.iterdir():
        program.chmod(0o755)
    return {"PATH": f"{binaries}:{os.environ['PATH']}"}


class HostJob:
    """One `dsgpt train --hostfile …`. Leaving the context kills what is left of it, on all hosts."""

    def __init__(self, command: list[str], log: Path, cwd: Path | None = None, **environment: str):
        self.mark, self.log, self.words = secrets.token_hex(8), log, set[bytes]()
        whole = {**os.environ, MARK: self.mark, **environment}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=whole, cwd=cwd
            )

    def __enter__(self) -> HostJob:
        return self

    def __exit__(self, *exception: object) -> None:
        until = time.monotonic() + 20
        while (pids := self.pids()) and time.monotonic() < until:
            for pid in pids:
                kill(pid)
            self.process.poll()
        self.process.wait()

    def pids(self) -> list[int]:
        """Living processes with the mark, which every rank has; and what carries them to other hosts by its word."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and f"{MARK}={self.mark}".encode() in _read(entry.name, "environ").split(b"\0"):
                found.append(int(entry.name))
        self.words |= {word for pid in found for word in _read(str(pid), "cmdline").split(b"\0") if len(word) > 200}
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and self.words & set(
                _read(entry.name, "cmdline").replace(b" ", b"\0").split(b"\0")
            ):
                found.append(int(entry.name))
        return sorted(set(found))

    def parts(self) -> list[tuple[str, int, str]]:
        """(part, process id, command line) of all."""
        found = []
        for pid in self.pids():
            line = _read(str(pid), "cmdline").replace(b"\0", b" ").decode(errors="replace")
            part = next((name for name, texts in PARTS.items() if any(text in line for text in texts)), "other")
            found.append((part, pid, line))
        return found

    def of(self, part: str, containing: str = "") -> list[int]:
        return [pid for name, pid, line in self.parts() if name == part and containing in line]

    def wait_until_gone(self, seconds: float) -> list[tuple[str, int, str]]:
        """What is left after at most so many seconds."""
        until = time.monotonic() + seconds
        while (self.process.poll() is None or self.pids()) and time.monotonic() < until:
            time.sleep(0.2)
        return self.parts()

    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _read(pid: str, name: str) -> bytes:
    try:
        if name == "cmdline" and Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"ZX":
            return b""
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
