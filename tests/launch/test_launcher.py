"""What is said of a job whose ranks ended with a code of the contract before they could leave a verdict."""

from __future__ import annotations

from dsgpt.launch.launcher import _end_of

REASON = "another job is using this run folder\n  seen: process 7\n  do:   wait for it, or cancel it\n"
LAUNCHER = "[2026-11-26 19:35:12,919] [INFO] [launch.py:152:main] WORLD INFO DICT: {'localhost': [0, 1]}\n"


def test_what_every_rank_says_is_said_once_and_without_the_launchers_own_lines(tmp_path):
    log = tmp_path / "host.log"
    log.write_text(LAUNCHER + REASON + REASON + LAUNCHER)
    end = _end_of(tmp_path, log, {"localhost": 73})
    assert (end.exit_code, end.message) == (73, REASON.strip("\n"))
