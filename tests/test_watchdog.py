"""The watchdog where its surroundings fail it: no stderr, no reaper, a heartbeat that is being written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsgpt.watchdog import Heartbeat, Watchdog

RANK = """
import sys, time
from pathlib import Path
from dsgpt.watchdog import start_watchdog
heartbeat = start_watchdog(0)
heartbeat.attach(Path(sys.argv[1]), 0)
heartbeat.phase("step", 7, 1.0 if sys.argv[2] == "hang" else 0.0)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("fault", ["kill", "hang"])
@pytest.mark.parametrize("stderr", ["full disk", "closed pipe"])
def test_the_verdict_is_written_and_the_rank_is_gone_whatever_becomes_of_stderr(tmp_path, fault, stderr):
    log_dir = tmp_path / "logs/a"
    log_dir.mkdir(parents=True)
    if stderr == "full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    command = [sys.executable, "-c", RANK, str(log_dir), fault]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=target, text=True) as rank:
        os.close(target)
        try:
            assert rank.stdout.readline() == "ready\n"
            if fault == "kill":
                rank.kill()
            assert rank.wait(30) == -signal.SIGKILL
        finally:
            rank.kill()
        until = time.monotonic() + 30
        while not (log_dir / "end.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
    told = json.loads((log_dir / "end.json").read_text())
    assert (told["cause"], told["step"]) == ("rank_died" if fault == "kill" else "hang", 7)


def test_a_heartbeat_is_read_whole_while_it_is_written():
    import mmap

    buffer = mmap.mmap(-1, 1 << 16)
    heartbeat, watchdog = Heartbeat(buffer), Watchdog(os.getpid(), 0, buffer)
    heartbeat.phase("step", 3, 600.0)
    pid = os.fork()  # the two must not share an interpreter's lock
    if pid == 0:
        while True:
            heartbeat.tick()
    timer = threading.Timer(3.0, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        torn = []
        while timer.is_alive():
            _, when, budget, step, ended, phase = watchdog.read()
            if (budget, step, ended, phase) != (600.0, 3, False, "step") or when == 0.0:
                torn.append((when, budget, step, phase))
        assert torn == []
    finally:
        os.waitpid(pid, 0)


REAPER = """
import ctypes, signal, subprocess, sys, time, os
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become ours, and we bury none
from dsgpt.launch.launcher import group_is_alive
script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1)'])"
process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
process.wait()
print(group_is_alive(process.pid), flush=True)
while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT) is None:
    time.sleep(0.1)
os.killpg(process.pid, 0)  # the zombie is still in the group
print(group_is_alive(process.pid), flush=True)
"""


def test_a_job_has_ended_when_only_zombies_are_left_of_it():
    """As in a container whose first process buries nobody."""
    result = subprocess.run([sys.executable, "-c", REAPER], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["True", "False"], result.stderr
