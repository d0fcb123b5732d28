"""Jobs on two hosts, killed in parts at random instants: no success is told, no process or shared memory stays (T710, T616).

    python -m tests.faults hosts_killed [--trials 20 --seed S]

Each trial starts `dsgpt train --hostfile` over an `ssh` or `pdsh` to this machine and, at a random instant of start or step,
kills one part with SIGKILL: the command itself, a connection, the part of a host, DeepSpeed's launcher there, a rank. Then
everything must go by itself; at the end one more start continues the run from a commit that verifies, and ends with 0.
Trade-off: both hosts are this machine, so a host without power is left to tests/slurm; a launch takes ten seconds and more.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from dsgpt.checkpoint import commit
from tests.faults._hosts import HostJob, fake_programs, kill
from tests.faults._jobs import newest_commit
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config

TRIALS = 20
VICTIMS = ("supervisor", "ssh", "node", "launcher", "rank")
START_SECONDS, LEAVE_SECONDS = 25.0, 120.0
LIMITS = {"supervisor": 15.0}


def run(trials: int | None, seed: int) -> Outcome:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    rng, count = random.Random(seed), trials or TRIALS
    left: list[str] = []
    successes: list[str] = []
    bad: list[str] = []
    runs: list[Path] = []
    slowest = dict.fromkeys(VICTIMS, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = fake_programs(folder / "programs")
        (folder / "hosts").write_text("hosta slots=1\nhostb slots=1\n", "ascii")
        settings = {"training.max_steps": 100000, "checkpoint.save_interval": 20, "checkpoint.keep_last": 2}
        yaml = write_config(make_dataset(folder / "made"), folder, **settings, **{"run.hang_timeout_seconds": 20})
        command = [sys.executable, "-m", "dsgpt", "train", str(yaml), "--hostfile", str(folder / "hosts")]
        command += ["--master-addr", "127.0.0.1"]
        shared = set(os.listdir("/dev/shm"))
        for trial in range(count):
            victim, launcher = VICTIMS[trial % len(VICTIMS)], rng.choice(("ssh", "pdsh"))
            # Each in a folder of its own: three failed starts in a row would end with 93, and that is tried elsewhere.
            last_run = folder / f"run-{trial}"
            words = [*command, f"run.output_dir={last_run}", "--launcher", launcher]
            with HostJob(words, folder / "log", **environment) as job:
                seconds, told = _kill_and_wait(job, victim, rng)
                slowest[victim] = max(slowest[victim], seconds)
                left += [f"{victim} over {launcher}: {told}"] if told else []
                if victim != "supervisor" and job.process.poll() == 0:
                    successes.append(f"{victim} over {launcher}")
            committed = commit.list_committed(last_run / "checkpoints")
            bad += [str(path) for _, path in committed if commit.verify(path)]
            runs += [last_run] if committed else []
        leaked = sorted(set(os.listdir("/dev/shm")) - shared)
        step = newest_commit(runs[-1])
        words = [*command, f"training.max_steps={step + 2}", f"run.output_dir={runs[-1]}"]
        with HostJob(words, folder / "log", **environment) as job:
            job.wait_until_gone(LEAVE_SECONDS)
            last = job.process.poll()
    rows = [
        Row("processes left", len(left), at_most=0, note="; ".join(left)[:2000]),
        Row("killed and told as a success", len(successes), at_most=0, note="; ".join(successes)),
        Row("shared memory left", len(leaked), at_most=0, note=", ".join(leaked)),
        Row("damaged commits", len(bad), at_most=0, note=", ".join(bad)),
        Row("code of a last start that continues", -1 if last is None else last, at_most=0, note=f"from step {step}"),
        *(Row(f"gone after the death of: {part}", took, "s", LIMITS.get(part)) for part, took in slowest.items()),
    ]
    return Outcome(rows, count)


def _kill_and_wait(job: HostJob, victim: str, rng: random.Random) -> tuple[float, str]:
    """Kill one process of a part at a random instant at which there is one: (seconds until all are gone, what is left)."""
    until = time.monotonic() + rng.uniform(1.0, START_SECONDS)
    while time.monotonic() < until or not job.of(victim):
        if job.process.poll() is not None:
            return 0.0, f"ended by itself: {job.output()[-500:]}"
        time.sleep(0.1)
    kill(job.process.pid if victim == "supervisor" else rng.choice(job.of(victim)))
    began = time.monotonic()
    parts = job.wait_until_gone(LEAVE_SECONDS)
    if parts:
        job.process.send_signal(signal.SIGKILL)
    return time.monotonic() - began, ", ".join(part for part, _, _ in parts)
