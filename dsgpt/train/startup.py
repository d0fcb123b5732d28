"""The first minutes of a start: do all ranks mean the same run, does every node see its folder and data, where did time go.

`resolve_together` comes before the run folder is touched, `examine_nodes` before the model is built, `tell_startup` after
the first step. A difference that matters ends all ranks with one code and the names of the hosts.

Growth: all-reduces of a few numbers; files are looked at by the first rank of each node; only what differs is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgpt.config import flatten
from dsgpt.data.foreign import base_folder, is_foreign
from dsgpt.distributed import World
from dsgpt.errors import ConfigError, DataError, DsgptError, ExitCode, LockedError, PeerError, Problem
from dsgpt.nodes import NodesReport, compare_nodes, digest, refuse_together, require_equal
from dsgpt.process import batch_phases, new_attempt, process_age
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.state import RunLog
from dsgpt.units import fold_names
from dsgpt.watchdog import Heartbeat

FOLDER_SECONDS = 60.0  # a network file system may show a new file on other hosts only after so long
# phase of the heartbeat -> what it is called in the event `startup`, in order
_PHASES = {
    "start": "imports",
    "meet the other ranks": "rendezvous",
    "take the run folder": "folder",
    "look at the nodes": "nodes",
    "choose the checkpoint": "checkpoint",
    "open the data": "data",
    "build the model": "model",
    "rehearse": "rehearsal",
    "read the checkpoint": "resume",
    "load the first data": "first data",
    "step": "first step",
}


def resolve_together(world: World, resolve: Callable[[], ResolvedRun]) -> ResolvedRun:
    """Resolve the run on every rank. What is wrong on some is raised on all, and so is a run that is not the same on all."""
    error, plan = None, None
    try:
        plan = resolve()
    except DsgptError as problem:
        error = problem
    _raise_together(world, error)
    if plan is None:
        raise ValueError("a rank without a plan has an error")
    what = "the config of the run is not the same on all ranks"
    do = "give all ranks the same files, arguments and environment variables"
    require_equal(world, _meaning(plan), what, do)
    return plan


def _meaning(plan: ResolvedRun) -> dict[str, Any]:
    """Everything a run is made of: its config by dotted key, DeepSpeed's JSON and the identity of its data."""
    data = {f"data of {one.name} ({one.split})": one.fingerprint for one in (*plan.data.train, *plan.data.validation)}
    found = flatten(plan.config.model_dump(mode="json"))
    return {**found, "DeepSpeed's JSON": plan.deepspeed, "steps of the run": plan.max_steps, **data}


def _raise_together(world: World, error: DsgptError | None) -> None:
    """Raise on every rank what some ranks met, with the code of the first of them and the names of their hosts."""
    (failed,) = world.max(float(error is not None))
    if not failed:
        return
    told = None
    if error is not None:
        told = [world.rank, world.host, int(error.exit_code), [[p.what, p.seen, p.do] for p in error.problems[:20]]]
    answers = sorted(world.collect(told) or [])
    shared: list[Any] = []
    if world.is_main:
        met: dict[tuple[str, ...], list[str]] = {}
        for _, host, _, problems in answers:
            for problem in problems:
                met.setdefault(tuple(problem), []).append(host)
        everywhere = len(answers) == world.size
        problems = [
            [what, seen if everywhere else f"{seen} (on {fold_names(hosts)} only)".strip(), do]
            for (what, seen, do), hosts in met.items()
        ]
        shared = [answers[0][2], problems]
    code, problems = world.broadcast_object(shared)
    kind = {ExitCode.CONFIG: ConfigError, ExitCode.BAD_DATA: DataError}.get(ExitCode(code), PeerError)
    raise (type(error) if error is not None and error.exit_code == code else kind)(
        problems=[Problem(*one) for one in problems]
    )


def examine_nodes(plan: ResolvedRun, world: World, log: RunLog, heartbeat: Heartbeat) -> NodesReport:
    """Look at every node's view of the run folder and the data, its software, clock, memory and network."""
    patience = 3 * plan.config.run.hang_timeout_seconds
    heartbeat.phase("look at the nodes", 0, patience + 2 * FOLDER_SECONDS if patience else 0.0)
    require_shared_folder(world, plan.output_dir / "logs" / world.attempt)
    require_same_files(world, plan)
    report = compare_nodes(world)
    log.event("nodes", report.text(), num_nodes=report.num_nodes, groups=report.groups)
    for warning in report.warnings:
        log.event("nodes_differ", f"warning: {warning}")
    return report


def require_shared_folder(world: World, folder: Path, seconds: float = FOLDER_SECONDS) -> None:
    """See that each node has the very folder that rank 0 has, and may write there: rank 0's token must be in it.

    Another mount at the same path, or a stale view, would show only when the first checkpoint is incomplete.
    """
    token = world.broadcast_object(new_attempt())
    file, trouble, refused = folder / ".shared", "", None
    if world.is_main:
        try:
            file.write_text(token, "utf-8")
        except OSError as error:
            do = "free space, or choose another run.output_dir"
            refused = LockedError("the run folder cannot be written", str(error), do)
    world.require_folder(refused)
    try:
        if world.local_rank == 0 and not world.is_main:
            trouble = _see(file, token, seconds)
            if not trouble:
                own = folder / f".shared-{world.rank}"
                own.write_text(token, "utf-8")
                own.unlink()
    except OSError as error:
        trouble = str(error)
    answers = world.collect([world.host, trouble] if trouble else None)
    problems = []
    for text in dict.fromkeys(text for _, text in answers or []):
        hosts = fold_names(sorted(host for host, other in answers or [] if other == text))
        do = "put run.output_dir on a file system that all nodes share, mounted at the same path"
        problems.append(Problem(f"the run folder is not the same, or cannot be written, on {hosts}", text, do))
    if world.is_main:
        with contextlib.suppress(OSError):
            file.unlink()
    refuse_together(world, problems)


def _see(file: Path, token: str, seconds: float) -> str:
    """Wait for rank 0's token; "" when it is there, else what is there instead."""
    deadline = time.monotonic() + seconds
    seen = "nothing"
    while True:
        try:
            with contextlib.suppress(OSError):
                list(file.parent.iterdir())  # has a network file system look again
            seen = file.read_text("utf-8")
            if seen == token:
                return ""
        except OSError as error:
            seen = error.strerror or str(error)
        if time.monotonic() >= deadline:
            return f"{file}: {seen} after {seconds:.0f} s, rank 0 wrote {token}"
        time.sleep(0.2)


def require_same_files(world: World, plan: ResolvedRun) -> None:
    """See that the data files have the same sizes on every node: a copy on a local disk may be cut short."""
    sizes = file_sizes(plan) if world.local_rank == 0 else None
    (expected,) = world.sum(digest(sizes) if world.is_main else 0.0)
    (differ,) = world.max(float(sizes is not None and digest(sizes) != expected))
    if differ:
        first = world.broadcast_object(sizes)
        what = "the data files are not the same on all nodes"
        require_equal(world, sizes if sizes is not None else first, what, "copy them again, or use one shared path")


def file_sizes(plan: ResolvedRun) -> dict[str, int]:
    """Bytes of each file of the data; -1 of one that is not there."""
    found = {}
    for source in (*plan.data.train, *plan.data.validation):
        folder = base_folder(source.path) if is_foreign(source.manifest) else source.path
        for shard in source.manifest.splits[source.split].shards:
            for suffix in (".bin", ".idx", *((".mask",) if shard.sha256_mask else ())):
                path = folder / f"{shard.path}{suffix}"
                try:
                    found[str(path)] = path.stat().st_size
                except OSError:
                    found[str(path)] = -1
    return found


def tell_startup(world: World, heartbeat: Heartbeat, log: RunLog) -> None:
    """The event `startup`: seconds of each phase on the rank that was slowest in it.

    Two all-reduces of a dozen numbers, first the most seconds, then the rank that has them.
    """
    spent = heartbeat.times()
    seconds = [spent.get(phase, 0.0) for phase in _PHASES]
    age = process_age()
    values = [max(0.0, age - sum(spent.values())) if age else 0.0, *seconds, age or sum(seconds)]
    most = world.max(*values)
    who = world.max(*(float(world.rank) if value == best else -1.0 for value, best in zip(values, most, strict=True)))
    if not world.is_main:
        return
    phases = {
        name: {"seconds": round(best, 3), "rank": int(rank), "host": world.host_of(int(rank))}
        for name, best, rank in zip(("python", *_PHASES.values()), most, who, strict=False)
        if best > 0
    }
    before = batch_phases()
    ends = [*(began for _, began in before[1:]), time.time() - age]  # one more than there is where nothing was told
    batch = {name: round(end - began, 3) for (name, began), end in zip(before, ends, strict=False)}
    log.event("startup", _sentence(phases, batch, most[-1], world.size), seconds=most[-1], phases=phases, batch=batch)


def _sentence(phases: dict[str, Any], batch: dict[str, float], total: float, size: int) -> str:
    parts = [f"{name} {seconds:.1f}" for name, seconds in batch.items()]
    for name, one in phases.items():
        if one["seconds"] >= 0.05:
            where = f" (rank {one['rank']} on {one['host']})" if size > 1 and one["seconds"] > total / 4 else ""
            parts.append(f"{name} {one['seconds']:.1f}{where}")
    return f"start-up   {total:.1f} s to the first step: {', '.join(parts)}"
