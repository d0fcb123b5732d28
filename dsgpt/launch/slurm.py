"""What SLURM tells a job: who this rank is, which nodes and GPUs were allocated, when it ends. Torch-free.

    adopt_rank_environment()                 inside `srun python -m dsgpt.train …`: RANK and its like from SLURM_*
    parse_job(text)                          the lines of `TZ=UTC0 scontrol show job -d -o ID`

`srun` starts one task per rank and nothing stands in between: a launcher that does would die of SIGUSR1, or end its ranks
one after the other. So the ranks read SLURM's variables themselves. Nothing here talks to SLURM's controller, which
thousands of ranks must not ask; the batch script does, once, and hands the text over.
"""

from __future__ import annotations

import calendar
import os
import re
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsgpt.errors import ConfigError

_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")
_HOST = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_PART = re.compile(r"^(?:[\w.-]+|\[[\d,-]+\])+$")
_NAME = re.compile(r"(?:^|\s)JobName=(.*) (?=UserId=\S+\(\d+\) GroupId=)")
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
}
_TASK = "{task}"
IDLE_GPUS = "DSGPT_IDLE_GPUS"  # set where fewer ranks than GPUs were chosen, because more would not divide the batch
MAX_HOSTS = 1 << 16


# --- host lists


def expand_hosts(text: str) -> list[str]:
    """The hosts of a SLURM list: "n[01-03,7],login" is n01, n02, n03, n7, login. Raises ConfigError."""
    hosts: list[str] = []
    for part in _split(text):
        if not _PART.match(part):
            raise _bad_hosts(text)
        prefixes = [""]
        for literal, ranges in re.findall(r"([^\[\]]*)(?:\[([^\]]*)\])?", part):
            numbers = _numbers(ranges, text) if ranges else [""]
            prefixes = [prefix + literal + number for prefix in prefixes for number in numbers]
            if len(hosts) + len(prefixes) > MAX_HOSTS:
                raise _bad_hosts(text)
        hosts += prefixes
    if not hosts or not all(_HOST.match(host) for host in hosts):
        raise _bad_hosts(text)
    return hosts


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _numbers(ranges: str, text: str) -> list[str]:
    """ "01-03,7" as the texts 01, 02, 03, 7: leading zeros belong to the names."""
    numbers: list[str] = []
    for one in ranges.split(","):
        match = _RANGE.match(one)
        if not match:
            raise _bad_hosts(text)
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + MAX_HOSTS:
            raise _bad_hosts(text)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _bad_hosts(text: str) -> ConfigError:
    return ConfigError("not a list of hosts as SLURM writes it", seen=repr(text[:200]), do="unset it, or mend it")


def tasks_per_node(text: str) -> list[int]:
    """SLURM_STEP_TASKS_PER_NODE: "2(x3),1" is [2, 2, 2, 1]. Raises ConfigError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.match(r"^(\d+)(?:\(x(\d+)\))?$", part)
        if not match or int(match[2] or 1) > MAX_HOSTS:
            raise ConfigError("not a list of tasks per node as SLURM writes it", seen=repr(text[:200]))
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


# --- a rank


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `srun` started this process. (A batch script has SLURM_PROCID=0 too, but no step.)"""
    return environment.get("SLURM_STEP_ID", "").isdecimal() and environment.get("SLURM_PROCID", "").isdecimal()


def adopt_rank_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from SLURM's variables, and caches.

    Nothing happens outside a step of `srun`, or where a launcher (torchrun) has set RANK. Raises ConfigError where
    variables are missing or contradict each other.
    """
    if not in_step(environment) or "RANK" in environment:
        return
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(
            "srun did not tell this rank who it is",
            seen=f"{', '.join(missing)} missing",
            do="start it with srun --export=ALL, and no program in between that clears the environment",
        )
    counts, hosts = (
        tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"]),
        expand_hosts(environment["SLURM_STEP_NODELIST"]),
    )
    size, node = sum(counts), _number(environment, "SLURM_NODEID")
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if rank >= size or node >= len(counts) or local >= counts[node]:
        raise ConfigError(
            "SLURM's variables contradict each other",
            seen=f"rank {rank} of {size}, task {local} on node {node}, tasks per node {counts[:8]}",
            do="do not set SLURM_* variables yourself",
        )
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": counts[node],
        "NODE_RANK": node,
    }
    environment.update({name: str(value) for name, value in found.items()})
    environment.setdefault("MASTER_ADDR", hosts[0])
    environment.setdefault("MASTER_PORT", str(master_port(environment)))
    if environment.get(IDLE_GPUS):
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: counts[node]])
    use_local_caches(environment)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise ConfigError(f"{name} is not a number", seen=repr(environment[name]))
    return int(environment[name])


def master_port(environment: Mapping[str, str]) -> int:
    """A port all ranks agree on without talking: another one after each requeue, in case somebody held the last."""
    job, restarts = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_RESTART_COUNT", "0")
    step = environment.get("SLURM_STEP_ID", "0")
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, restarts, step)]
    return 20000 + (numbers[0] * 13 + numbers[1] * 101 + numbers[2] * 1009) % 20000


def use_local_caches(environment: MutableMapping[str, str]) -> None:
    """Compilers cache on the node's own disk: on a network file system they race and fail with stale handles."""
    base = environment.get("SLURM_TMPDIR") or environment.get("TMPDIR") or tempfile.gettempdir()
    folder = Path(base) / f"dsgpt-cache-{os.getuid()}"
    for name, sub in _CACHES.items():
        environment.setdefault(name, str(folder / sub))


# --- a job


def get(name: str, default: str = "") -> str:
    """A variable of SLURM or of the batch script, as this process has it."""
    return os.environ.get(name, default)


def tasks_of_hosts(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """host: tasks that SLURM would start there, in its order, over all parts of a heterogeneous job."""
    parts = range(int(environment.get("SLURM_HET_SIZE", "0") or 0))
    found: dict[str, int] = {}
    for suffix in [f"_HET_GROUP_{part}" for part in parts] or [""]:
        hosts = expand_hosts(environment.get(f"SLURM_JOB_NODELIST{suffix}", ""))
        counts = tasks_per_node(environment.get(f"SLURM_TASKS_PER_NODE{suffix}") or f"1(x{len(hosts)})")
        found |= dict(zip(hosts, counts, strict=False))
    return found


def nodes_of_environment(hosts: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[Node]:
    """The nodes where the controller did not answer: taken to be all like this one."""
    gpus, cpus = environment.get("SLURM_GPUS_ON_NODE", "0"), environment.get("SLURM_CPUS_ON_NODE", "1")
    return [Node(host, int(gpus), int(cpus)) for host in hosts]


def fill_task(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """In an array job `{task}` in a word key=value is the task's number: `run.output_dir=runs/seed-{task}`."""
    task = environment.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal():
        return list(arguments)
    return [word.replace(_TASK, task) if "=" in word else word for word in arguments]


@dataclass(frozen=True)
class Node:
    """What the job has on one node."""

    host: str
    gpus: int
    cpus: int


@dataclass(frozen=True)
class JobRecord:
    """A job as `scontrol show job -d -o` prints it: its fields by name, and its nodes in SLURM's order."""

    fields: Mapping[str, str]
    nodes: Sequence[Node] = field(default_factory=tuple)

    @property
    def state(self) -> str:
        return self.fields.get("JobState", "")

    @property
    def tasks(self) -> int:
        """Tasks asked for, 0 where it is not told."""
        text = self.fields.get("NumTasks", "")
        return int(text) if text.isdecimal() else 0

    @property
    def end_time(self) -> float | None:
        """Seconds since 1970 at which the time limit ends the job; None without one."""
        return parse_time(self.fields.get("EndTime", ""))

    @property
    def start_time(self) -> float | None:
        return parse_time(self.fields.get("StartTime", ""))


def parse_time(text: str) -> float | None:
    """SLURM's time in UTC, "2026-11-26T19:20:44", as scontrol writes it with TZ=UTC0; None of "Unknown" and the like."""
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    except (ValueError, OverflowError):
        return None


def end_time(record: JobRecord | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """When the job's time is up, in seconds since 1970: SLURM_JOB_END_TIME of newer SLURMs, else the record."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else record.end_time if record else None


def parse_job(text: str) -> list[JobRecord]:
    """The records in what `scontrol show job -d -o` printed: one a line, several of a heterogeneous job."""
    return [_parse_record(line) for line in text.splitlines() if line.startswith("JobId=")]


def _parse_record(line: str) -> JobRecord:
    named = _NAME.search(line)  # it may be any text, also one that looks like the rest: cut out first
    line = line[: named.start()] + " " + line[named.end() :] if named else line
    head, *groups = re.split(r"\s+(?=Nodes=\S+ CPU_IDs=)", line)
    order = {host: place for place, host in enumerate(expand_hosts(_fields(head).get("NodeList", "none")))}
    nodes: list[Node] = []
    for group in groups:
        words = _fields(group)
        cpus = sum(_span(part) for part in words.get("CPU_IDs", "").split(",") if part)
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", words.get("GRES", "")))
        nodes += [Node(host, gpus, cpus) for host in expand_hosts(words["Nodes"])]
        head += " " + group  # the fields of the whole job go on behind the last group
    return JobRecord(
        _fields(head) | ({"JobName": named[1]} if named else {}),
        tuple(sorted(nodes, key=lambda node: order.get(node.host, len(order)))),
    )


def _fields(text: str) -> dict[str, str]:
    """NAME=VALUE words; the first of a name counts, since the job's own fields come first."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:.]*)=(.*?)(?=\s+[A-Za-z][\w/:.]*=|\s*$)", text):
        found.setdefault(name, value)
    return found


def _span(part: str) -> int:
    match = _RANGE.match(part)
    return int(match[2] or match[1]) - int(match[1]) + 1 if match else 0
