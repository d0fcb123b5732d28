"""Two jobs never hold one run folder: real processes that contend, die and stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dsgpt import lease
from dsgpt.errors import LockedError
from dsgpt.lease import Lease, Owner, require_free

ELSEWHERE = {"host": "node7", "machine": "another boot pid:[1]", "pid": 4242, "pid_started": "99"}

CONTENDER = """
import sys, time
from pathlib import Path
from dsgpt.errors import LockedError
from dsgpt.lease import Lease, Owner
folder, begin = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, begin - time.time()))
try:
    Lease.acquire(folder, Owner.of_this_process(sys.argv[3]), watch_seconds=0.5)
except LockedError:
    sys.exit(73)
print("held", flush=True)
sys.stdin.read()  # until the parent has seen who won, without giving it back
"""


def contend(folder, name, begin=0.0):
    command = [sys.executable, "-c", CONTENDER, str(folder), str(begin), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def write_lease(folder, number, owner, renewed=0, released=False):
    folder.mkdir(exist_ok=True)
    fields = {"owner": vars(owner), "renewed": renewed, "released": released}
    (folder / f".lease-{number}").write_text(json.dumps(fields))


def owner(attempt="b", **fields):
    return Owner(attempt, **fields) if fields else Owner.of_this_process(attempt)


def test_of_jobs_that_start_at_the_same_moment_exactly_one_runs(tmp_path):
    """T901: eight at once, six times."""
    for trial in range(6):
        folder, begin = tmp_path / f"run{trial}", time.time() + 0.7
        jobs = [contend(folder, f"a{number}", begin) for number in range(8)]
        try:
            holders = [job for job in jobs if job.stdout.readline() == "held\n"]
            assert len(holders) == 1
            assert sorted(job.wait(10) for job in jobs if job not in holders) == [73] * 7
        finally:
            for job in jobs:
                job.kill()


def test_a_job_that_was_killed_leaves_nothing_to_clean_up(tmp_path):
    """T902: its process is gone, on this host, so the next one need not wait."""
    job = contend(tmp_path, "a")
    assert job.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match="another job is using this run folder"):
        require_free(tmp_path)
    job.kill()
    job.wait()
    require_free(tmp_path)
    began = time.monotonic()
    Lease.acquire(tmp_path, owner()).release()
    assert time.monotonic() - began < 30, "it looked on for a sign of life instead of at the process"


def test_a_stopped_job_still_holds_its_folder(tmp_path):
    job = contend(tmp_path, "a")
    assert job.stdout.readline() == "held\n"
    os.kill(job.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LockedError):
            Lease.acquire(tmp_path, owner(), watch_seconds=0.3)
    finally:
        job.kill()


@pytest.mark.parametrize("skew", [-600, 0, 600])
def test_a_holder_elsewhere_that_renews_keeps_the_folder_whatever_the_clocks_say(tmp_path, skew):
    """T902: the other host's clock is ten minutes off; only whether the lease changes counts."""
    other = owner("a", **ELSEWHERE)
    write_lease(tmp_path, 3, other)
    stamp = time.time() + skew
    os.utime(tmp_path / ".lease-3", (stamp, stamp))
    renewing = subprocess.Popen(
        [sys.executable, "-c", RENEW, str(tmp_path / ".lease-3"), str(stamp)], stdout=subprocess.DEVNULL
    )
    try:
        with pytest.raises(LockedError, match="node7"):
            Lease.acquire(tmp_path, owner(), watch_seconds=20)
    finally:
        renewing.kill()


RENEW = """
import json, os, sys, time
path, stamp = sys.argv[1], float(sys.argv[2])
while True:
    time.sleep(0.2)
    fields = json.load(open(path))
    fields["renewed"] += 1
    open(path + "x", "w").write(json.dumps(fields))
    os.utime(path + "x", (stamp, stamp))
    os.replace(path + "x", path)
"""


def test_a_holder_elsewhere_without_a_sign_of_life_is_cut_off_and_learns_of_it(tmp_path):
    gone = Lease(tmp_path, owner("a", **ELSEWHERE), 3)
    write_lease(tmp_path, 3, gone.owner)
    said = []
    lease = Lease.acquire(tmp_path, owner(), watch_seconds=0.5, say=said.append)
    assert lease.number == 4 and "waiting up to" in said[0] and "node7" in said[0]
    lease.check()
    with pytest.raises(LockedError, match="another job has taken over"):
        gone.check()
    gone.release()
    with pytest.raises(LockedError):
        Lease.acquire(tmp_path, owner("c", **{**ELSEWHERE, "host": "node8"}), watch_seconds=0.1)
    lease.release()


def test_a_folder_judged_by_an_old_list_is_not_taken(tmp_path, monkeypatch):
    """As a network file system shows one: two others took and gave back the folder meanwhile, a third one holds it."""
    folder = tmp_path / "run"
    write_lease(folder, 1, owner("old"), released=True)
    old = lease._newest(folder)
    (folder / ".lease-1").unlink()
    write_lease(folder, 3, owner("holder", **ELSEWHERE))
    lists, newest = [old], lease._newest
    monkeypatch.setattr(lease, "_newest", lambda place: lists.pop() if lists else newest(place))
    with pytest.raises(LockedError, match="another job is using"):
        Lease.acquire(folder, owner("late"))
    assert sorted(path.name for path in folder.iterdir()) == [".lease-3"]


def test_a_dead_holder_whose_file_could_not_be_read_at_first_shows_no_sign_of_life(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_lease(folder, 1, owner("dead", **ELSEWHERE))
    lists, newest = [(1, "")], lease._newest
    monkeypatch.setattr(lease, "_newest", lambda place: lists.pop() if lists else newest(place))
    taken = Lease.acquire(folder, owner("next"), watch_seconds=1.0)
    assert taken.number == 2
    taken.release()


@pytest.mark.parametrize(("restarts", "taken"), [(1, True), (0, False)])
def test_a_requeue_of_the_same_job_does_not_wait_for_its_own_lease(tmp_path, restarts, taken):
    """T902: a scheduler starts a job again only after its end; two steps of one allocation are no requeue."""
    write_lease(tmp_path, 1, owner("a", job="77", restarts=0, **ELSEWHERE))
    again = Owner("b", job="77", restarts=restarts, host="node9", machine="m", pid=1, pid_started="1")
    said = []
    Lease.acquire(tmp_path, again, watch_seconds=0.3, say=said.append).release()
    assert (said == []) is taken


def test_a_released_folder_is_free_at_once_and_a_folder_that_cannot_be_made_is_73(tmp_path):
    lease = Lease.acquire(tmp_path, owner("a"))
    lease.release()
    Lease.acquire(tmp_path, owner("b")).release()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp")] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(LockedError, match="cannot be written"):
        Lease.acquire(tmp_path / "file" / "run", owner("a"))


def take(world, folder):
    from dsgpt import distributed
    from dsgpt.errors import DsgptError

    try:
        with distributed.folder_lease(folder, world):
            return 0
    except DsgptError as error:
        return int(error.exit_code)


def test_a_folder_held_elsewhere_is_73_on_every_rank(tmp_path):
    """Whichever rank's code a launcher passes on, it must not look like a failure that is worth another start."""
    import threading

    from tests.pool import ranks

    folder, stop, number = tmp_path / "run", threading.Event(), 0
    write_lease(folder, 1, owner("holder", **ELSEWHERE))

    def renew():
        nonlocal number
        while not stop.wait(0.2):
            number += 1
            write_lease(folder, 1, owner("holder", **ELSEWHERE), renewed=number)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        assert ranks(2).run(take, folder) == [73, 73]
    finally:
        stop.set()
        thread.join()
    assert ranks(2).run(take, tmp_path / "another") == [0, 0]
