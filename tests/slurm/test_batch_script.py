"""slurm/train.sbatch with stand-ins for SLURM's commands: answers that get lost, and signals at moments no cluster can hit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.test_slurm import RECORD
from tests.slurm import lab

RUNNING = RECORD.format(name="dsgpt")
REQUEUED = RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=2", "Restarts=3")
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")
LOST = "slurm_requeue error: Socket timed out on send/recv operation"
PENDING = "slurm_requeue error: Job is pending execution"
# Each stand-in writes down its name and words. `record` is what the controller knows of the job.
STAND_INS = {
    "srun": """echo $PPID >"$FAKE/shell"
echo '{"exit_code": 75, "cause": "preempted", "message": "why"}' >"$DSGPT_LOG_DIR/end.json" """,
    "sbatch": "echo 99",
    "sleep": "exec /bin/sleep 0.02",
    "scontrol": """case $1 in
show) [ "$TZ $SLURM_TIME_FORMAT" = "UTC0 standard" ] || exit 1
    cat "$FAKE/record"; . "$FAKE/show" ;;
requeue) n=$(grep -c '^scontrol requeue' "$FAKE/calls"); . "$FAKE/requeue" ;;
esac""",
}


@pytest.fixture()
def batch(tmp_path, write_run) -> Callable[..., tuple[int, list[str], str]]:
    """batch(what `scontrol requeue` does, what happens after `scontrol show`) -> exit code, calls of SLURM's commands, log.

    In the former `n` tells which time it is.
    """
    folder = tmp_path / "fake"
    folder.mkdir()

    def stand_in(name: str, does: str) -> None:
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"$FAKE/calls"\n{does}\n')
        (folder / name).chmod(0o755)

    def run(requeue: str = "", show: str = "") -> tuple[int, list[str], str]:
        for name, does in STAND_INS.items():
            stand_in(name, does)
        (folder / "record").write_text(RUNNING + "\n")
        (folder / "gone").write_text(REQUEUED + "\n")
        (folder / "cancelled").write_text(CANCELLED + "\n")
        (folder / "requeue").write_text(requeue)
        (folder / "show").write_text(show)
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "DSGPT"))}
        environment |= {
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "FAKE": str(folder),
            "PYTHONPATH": str(lab.ROOT), "DSGPT_SITE": "/dev/null", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)",
        }  # fmt: skip
        command = ["bash", str(lab.SCRIPTS / "train.sbatch"), str(write_run())]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, start_new_session=True
        )
        calls = [line for line in (folder / "calls").read_text().splitlines() if " show " not in line]
        return done.returncode, [call for call in calls if call.startswith(("scontrol", "sbatch"))], done.stdout

    return run


def test_an_asked_stop_is_requeued_once(batch):
    code, calls, log = batch()
    assert (code, calls) == (0, ["scontrol requeue 12"]), log


def test_a_requeue_whose_answer_got_lost_is_neither_done_again_nor_followed_by_a_successor(batch):
    """T611."""
    lost = f"""if [ "$n" = 1 ]; then cp "$FAKE/gone" "$FAKE/record"; echo '{LOST}' >&2; exit 1; fi
echo '{PENDING}' >&2; exit 1"""
    _, calls, log = batch(lost)
    assert calls == ["scontrol requeue 12"], log


def test_a_job_that_slurm_requeued_in_the_same_moment_has_no_successor(batch):
    """Preempted, or a node lost, after the controller was asked."""
    _, calls, log = batch(f"""cp "$FAKE/gone" "$FAKE/record"; echo '{PENDING}' >&2; exit 1""")
    assert calls == ["scontrol requeue 12"], log


def test_a_job_that_is_cancelled_while_the_controller_does_not_answer_stays_so(batch):
    gone = "slurm_requeue error: Unable to contact slurm controller (connect failure)"
    cancel = f"""cp "$FAKE/cancelled" "$FAKE/record"; echo '{gone}' >&2; exit 1"""
    code, calls, log = batch(cancel)
    assert (code, calls) == (75, ["scontrol requeue 12"]) and "not started again: the job was cancelled" in log, log


def test_a_job_that_is_cancelled_while_its_end_is_judged_stays_so(batch):
    """The controller said RUNNING a moment before."""
    cancel = """if [ -e "$FAKE/shell" ] && ! [ -e "$FAKE/told" ]; then
cp "$FAKE/cancelled" "$FAKE/record"; touch "$FAKE/told"; kill -TERM "$(cat "$FAKE/shell")"; fi"""
    code, calls, log = batch(show=cancel)
    assert (code, calls) == (75, []) and "not started again: the job was cancelled" in log, log


@pytest.mark.parametrize("when", ["prepare", "decide"])
def test_a_warning_to_every_process_of_the_job_ends_none_that_only_answers(batch, when):
    """As SLURM sends it where processes are tracked by their group (proctrack/pgid), and to each step of a container."""
    there = '-e "$FAKE/shell"' if when == "decide" else '! -e "$FAKE/shell"'
    warn = f"""if [ {there} ] && ! [ -e "$FAKE/told" ]; then touch "$FAKE/told"; /bin/sleep 0.1
kill -USR1 -- -"$(ps -o sid= -p $$ | tr -d ' ')"; fi"""
    code, calls, log = batch(show=warn)
    assert (code, calls) == (0, ["scontrol requeue 12"]), log
