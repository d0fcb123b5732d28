"""A training job that is disturbed and must come through: what tests/slurm and `python -m tests.faults slurm_*` both do.

    reference = straight(make, folder)                   a job that nobody disturbs, under the same SLURM
    loop = Loop(make("run"), folder); loop.wait_step(30); send(loop.job, "USR1"); loop.finish()
    loop.broken(reference, lossless=True)                empty where every promise held

What is promised: the job ends COMPLETED after as many requeues as there were stops, every step that was ever logged and the
last checkpoint have the bits of the undisturbed job, and where the ranks were asked to stop, no step is done twice.
Instants are reached by watching the run's own files, never by guessing how fast the machine is.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dsgpt.verdict import Verdict, read_verdict
from tests.faults._jobs import Reference, differences, events, lines_of
from tests.slurm import lab

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
# Seen with SLURM 22.05: about a minute after a node was lost a rank of the next start got SIGTERM, committed and was requeued
# once more. It looks as if the end of the lost step 0 was told again to the new step 0; nothing is lost by it.
NODE_LOSS_REQUEUES = (1, 2)
WAIT_SECONDS = 600.0  # for a job to get there, on a machine that does other things as well
# Dropout, accumulation, warmup, several epochs; a save now and then, and an evaluation.
SETTINGS = {
    "model.hidden_size": 64,
    "training.max_steps": 240,
    "checkpoint.save_interval": 60,
    "checkpoint.keep_last": 2,
    "logging.eval_interval": 70,
}
# Of the quickstart's size; how many steps a limit of two minutes cuts is measured.
PROBE_STEPS, CUT_SECONDS = 60, 100.0
QUICKSTART_SIZE = {
    "model.hidden_size": 128,
    "model.num_hidden_layers": 4,
    "training.global_batch_size": 64,
    "training.max_steps": PROBE_STEPS,
    "checkpoint.save_interval": 100_000,
}


class Loop:
    """One job of slurm/train.sbatch and its run folder."""

    def __init__(self, yaml: Path, options: Iterable[str] = TWO_NODES, **environment: str) -> None:
        self.folder = yaml.with_suffix("")
        self.job = lab.submit(lab.SCRIPTS / "train.sbatch", yaml, options=options, folder=yaml.parent, **environment)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exception: object) -> None:
        lab.cancel(self.job)

    # ---- where it is

    def steps(self) -> list[int]:
        """Every step that was logged, those that were done again too."""
        return [int(line["step"]) for line in lines_of(self.folder / "metrics.jsonl") if "step" in line]

    def wait_step(self, number: int) -> None:
        self.until(lambda: (self.steps() or [0])[-1] >= number, f"step {number}")

    def wait_running(self, restarts: int = 0) -> None:
        def runs() -> bool:
            found = lab.record(self.job)
            return found["JobState"] == "RUNNING" and int(found["Restarts"]) >= restarts

        self.until(runs, "it to run")

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait; a job that has ended, or never gets there, is an error that shows its log."""

        def look() -> bool:
            return bool(condition()) or lab.state(self.job) in lab.ENDED

        try:
            lab.until(look, WAIT_SECONDS, f"{what} of job {self.job}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{lab.log_of(self.job)}") from None
        if not condition():
            raise AssertionError(f"job {self.job} ended before {what}: {lab.record(self.job)}\n{lab.log_of(self.job)}")

    def verdicts(self) -> list[Verdict | None]:
        """Of every attempt, in order."""
        return [read_verdict(folder) for folder in sorted((self.folder / "logs").glob("2*"))]

    # ---- how it ended

    def finish(self) -> lab.Ended:
        return lab.wait(self.job, WAIT_SECONDS)

    def broken(self, reference: Reference, lossless: bool = False, requeues: Iterable[int] = (1,)) -> list[str]:
        """Which promises a job that was to finish has broken."""
        ended, found = self.finish(), []
        if (ended.state, ended.exit_code) != ("COMPLETED", 0):
            return [f"job {self.job}: {ended}\n{lab.log_of(self.job)}"]
        if ended.restarts not in requeues:
            found.append(f"requeued {ended.restarts} times")
        codes = [one.exit_code if one else None for one in self.verdicts()]
        if codes[-1] != 0 or 0 in codes[:-1]:
            found.append(f"the attempts ended with {codes}")
        if lossless and sorted(set(self.steps())) != self.steps():
            found.append("steps were done twice")
        found += differences(self.folder, reference)
        return [f"job {self.job}: {one}" for one in found]


def straight(yaml: Path, options: Iterable[str] = TWO_NODES) -> Reference:
    """Run to the end; what it left, and how long it lived."""
    with Loop(yaml, options) as loop:
        began = time.time()
        ended = loop.finish()
        if (ended.state, ended.restarts) != ("COMPLETED", 0):
            raise AssertionError(f"the undisturbed job: {ended}\n{lab.log_of(loop.job)}")
        first = next(line for line in lines_of(loop.folder / "metrics.jsonl") if "step" in line)
        return Reference.of(loop.folder, first["time"] - began)


def cut_by_a_limit(make: Callable[..., Path], **more: object) -> dict[str, object]:
    """Settings of a run that trains for CUT_SECONDS on this machine, as steps of one of the same size tell."""
    probe = straight(make("probe", **{**QUICKSTART_SIZE, **more}))
    return {**QUICKSTART_SIZE, **more, "training.max_steps": max(PROBE_STEPS, int(CUT_SECONDS / probe.step_seconds))}


# ---- ways to ask for a stop ------------------------------------------------------------------------------------------


def to_rank(loop: Loop, number: signal.Signals, rank: int) -> None:
    loop.until(lambda: rank in lab.ranks(loop.job), f"rank {rank}")
    os.kill(lab.ranks(loop.job)[rank], number)


def storm(loop: Loop, rng: random.Random) -> None:
    """Ten signals of all kinds, within about a second: to this start's ranks, never to those of the next one."""
    loop.until(lambda: len(lab.ranks(loop.job)) > 1, "the ranks")
    ranks = lab.ranks(loop.job)
    for _ in range(5):
        lab.send(loop.job, rng.choice(("USR1", "USR2")), rng.choice(("--batch", "--full")))
        with contextlib.suppress(ProcessLookupError):  # it has left: the first of the ten was enough
            os.kill(ranks[rng.randint(0, 1)], rng.choice((signal.SIGUSR1, signal.SIGUSR2)))


# Rows T601, T602, T605, T606. A signal to one rank alone finds the other one at another step.
SIGNALS: dict[str, Callable[[Loop, random.Random], None]] = {
    "USR1 to the shell": lambda loop, rng: lab.send(loop.job, "USR1", "--batch"),
    "USR1 to the step": lambda loop, rng: lab.send(loop.job, "USR1"),
    "USR1 to both": lambda loop, rng: lab.send(loop.job, "USR1", "--full"),
    "USR2 to the shell": lambda loop, rng: lab.send(loop.job, "USR2", "--batch"),
    "USR2 to the step": lambda loop, rng: lab.send(loop.job, "USR2"),
    "USR1 to one rank": lambda loop, rng: to_rank(loop, signal.SIGUSR1, rng.randint(0, 1)),
    "USR2 to one rank": lambda loop, rng: to_rank(loop, signal.SIGUSR2, rng.randint(0, 1)),
    "TERM to one rank": lambda loop, rng: to_rank(loop, signal.SIGTERM, rng.randint(0, 1)),
    "a storm": storm,
}


def seconds_to_leave(loop: Loop, sent: float) -> float:
    """From a signal to the verdict, which the last rank's leaving follows; -1 where no attempt ended with 75."""
    ends = [event["time"] for event in events(loop.folder, "end") if event["exit_code"] == 75]
    return max(0.0, min(ends) - sent) if ends else -1.0


# ---- ways to lose a node ---------------------------------------------------------------------------------------------


def lose_node(loop: Loop, kind: str) -> None:
    """Cut the "power", the "power of the batch host" or the "network"; when SLURM has missed the node, it comes back.

    One that is back before that, as after a quick reset, is another matter: SLURM does not tell its job then. A node behind a
    pulled cable comes back only when the next attempt trains, where there is a third node for that.
    """
    before, found = lab.nodes(), lab.record(loop.job)
    of_job = lab.call("scontrol", "show", "hostnames", found["NodeList"]).split()
    node = found["BatchHost"] if "batch" in kind else of_job[-1]
    lab.control(*(("net", node, "down") if kind == "network" else ("fail", node)))
    lab.until(lambda: lab.node_state(node).startswith("down"), 120, f"SLURM to miss {node}")
    if kind == "network" and len(before) > len(of_job):
        attempts = len(loop.verdicts())
        loop.until(lambda: len(loop.verdicts()) > attempts, "the next attempt")
        done = len(loop.steps())
        loop.until(lambda: len(loop.steps()) > done + 5, "its steps")
    lab.control(*(("net", node, "up") if kind == "network" else ("start", node)))
