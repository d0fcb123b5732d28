"""What `dsgpt submit` queues: the config checked for the ranks asked for, then a script for each job. Torch-free.

    plan = plan_submission(Asked(("run.yaml",), {"nodes": "2-8", "gpus-per-node": "8", "time": "12:00:00"}))
    print(plan.preview())              # scripts and sbatch's arguments; nothing is touched
    jobs = queue(plan)

Everything that is wrong is said at once, before a job waits hours for its turn. A login node has other hardware than the
job: what `auto` becomes is decided there. A number of nodes that does not divide the global batch is no mistake: the job
then trains on the largest part of them that does.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsgpt.config import LoadedConfig, RunConfig, load_config, shipped_folder, split_arguments, to_yaml
from dsgpt.errors import ConfigError, DsgptError, ExitCode, Problem
from dsgpt.launch import sbatch
from dsgpt.launch.layout import Layout, choose_layout
from dsgpt.launch.queue import cancel
from dsgpt.launch.sbatch import check_extra, check_options, parse_nodes, parse_time
from dsgpt.launch.site import Site, load_site, site_file
from dsgpt.launch.slurm import Node
from dsgpt.launch.submission import Submission, create_folder, next_number, record
from dsgpt.train.changes import check_same_run
from dsgpt.train.lead import Lead, signal_lead
from dsgpt.train.resolve import ResolvedRun, nothing_left, resolve_run

if TYPE_CHECKING:
    from dsgpt.train.rehearsal import Rehearsal

TASK = "{task}"
REHEARSAL_SECONDS = 600
_NODES_LOOKED_AT = 64  # of a range: for the notes
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """The command line: `options` by sbatch's names, `extra` those that dsgpt does not know."""

    arguments: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    chain: int = 1
    rehearse: bool = False
    words: tuple[str, ...] = ()  # all of it as typed, to be shown when the run is to be continued


@dataclass(frozen=True)
class Files:
    """One job that is not queued yet: its files by name and sbatch's arguments, for a folder that may not exist yet."""

    folder: Path
    kind: str
    texts: dict[str, str]
    options: dict[str, str]
    command: tuple[str, ...]


@dataclass(frozen=True)
class SubmissionPlan:
    """Everything decided. `base` holds `submissions/`: the run's folder, or what an array's run folders have in common."""

    asked: Asked
    loaded: LoadedConfig
    run: ResolvedRun
    base: Path
    options: dict[str, str]
    task_words: tuple[str, ...]
    notes: list[str]
    lead: Lead
    rehearsal: Rehearsal | None
    nothing_left: str

    @property
    def kinds(self) -> list[str]:
        return [*(["rehearse"] if self.rehearsal else []), *["train"] * self.asked.chain]

    def files(self, folder: Path, kind: str, after: Sequence[str], earlier: Sequence[str] = ()) -> Files:
        """The files of one job that waits for `after` (sbatch's words); `earlier` are the parts of its chain before it."""
        given = self.asked.options.get("dependency")
        dependency = ",".join([*after, *([given] if given else [])])
        options = {**self.options, "dependency": dependency, "kill-on-invalid-dep": "yes"}
        if not dependency:
            del options["dependency"], options["kill-on-invalid-dep"]
        site = site_file("sh")
        texts = {"site.sh": _read(site)} if site.is_file() else {}
        # A site file that appears later is not the one that was submitted: name an empty one.
        exports = {"DSGPT_SITE": str(folder / "site.sh") if texts else os.devnull, "DSGPT_SUBMISSION": str(folder)}
        packaged = _read(shipped_folder("slurm") / "train.sbatch")
        if kind == "rehearse" and self.rehearsal is not None:
            options = {**options, **self._rehearsal_options()}
            options.pop("array", None)
            script = "rehearse.sbatch"
            texts["train.sbatch"] = packaged
            packaged = _read(shipped_folder("slurm") / script)
            texts.update(self.rehearsal.configs(folder))
            words = [str(folder / name) for name in ("interrupted.yaml", "reference.yaml")]
        else:
            script, words = "train.sbatch", [str(folder / "config.yaml"), *self.task_words]
            texts["config.yaml"] = to_yaml(self.loaded.config)
            if self.asked.chain > 1:
                exports |= {"DSGPT_REQUEUE": "no", "DSGPT_CHAIN": " ".join(earlier)}
        texts[script] = sbatch.render(packaged, options, exports)
        return Files(folder, kind, texts, options, ("sbatch", "--parsable", str(folder / script), *words))

    def _rehearsal_options(self) -> dict[str, str]:
        limit = parse_time(self.options["time"]) if "time" in self.options else None
        seconds = min(REHEARSAL_SECONDS, limit or REHEARSAL_SECONDS)
        told = {"time": str(max(1, int(seconds // 60))), "nodes": str(parse_nodes(self.options["nodes"])[0])}
        # Only the user's own signal is to be rehearsed, not that of its short time limit.
        return {**told, "job-name": f"{self.options['job-name']}-rehearsal", "signal": "USR1@30"}

    def preview(self) -> list[Files]:
        """What would be queued now; the id of a job that another one waits for is not known yet."""
        number, found = next_number(self.base), []
        for index, (kind, after) in enumerate(zip(self.kinds, self._waits(), strict=True)):
            folder = self.base / "submissions" / str(number + index)
            earlier = [
                f"<job of submission {number + part}>" for part in range(len(self.kinds) - self.asked.chain, index)
            ]
            found.append(self.files(folder, kind, [one.format(number + job) for one, job in after], earlier))
        return found

    def _waits(self) -> Iterator[list[tuple[str, int]]]:
        """For each job: (what to wait for, which earlier one)."""
        first = 1 if self.rehearsal else 0
        for index in range(len(self.kinds)):
            waits = [("afterok:<job of submission {}>", 0)] if first and index else []
            yield [*waits, *([("afterany:<job of submission {}>", index - 1)] if index > first else [])]


def plan_submission(asked: Asked) -> SubmissionPlan:
    """Check and decide everything. Raises with every problem at once: 65 where only data or checkpoints are wrong, else 78."""
    gather = _Gather()
    site = gather(load_site) or Site()
    options, extra = _options(asked, site)
    gather.problems += check_options(options) + check_extra(asked.extra)
    nodes = gather(lambda: parse_nodes(options["nodes"]))
    limit = gather(lambda: parse_time(options["time"])) if "time" in options else None
    array = options.get("array", "")
    words, checked = _task_words(asked.arguments, array)
    loaded = gather(lambda: load_config(*split_arguments(checked)))
    given = asked.options.get("dependency", "")
    if "?" in given and (asked.chain > 1 or asked.rehearse):
        gather.problems.append(Problem("a chain cannot wait for one of several jobs", given, "use commas"))
    if asked.chain > 1 and array:
        gather.problems.append(Problem("a chain of arrays", f"--chain {asked.chain} --array {array}", "one of the two"))
    base = Path()
    if loaded is not None:
        base = _base(loaded, words)
        if array and not array.endswith("%1") and not any(TASK in word for word in words):
            do = f"add run.output_dir={loaded.config.run.output_dir}-{TASK}, or --array {array}%1: one after the other"
            gather.problems.append(Problem("all tasks of the array would train the same run", f"--array {array}", do))
    if loaded is None or nodes is None:
        gather.finish()
        raise AssertionError("not reached")
    per_node = _ranks_per_node(loaded.config, options, gather)
    runs = _resolve(loaded.config, nodes, per_node, "gpus-per-node" in options, gather)
    lead = signal_lead(base, runs[-1] if runs else None, site.signal_lead_seconds, limit, gather.problems)
    name = options.get("job-name", loaded.config.run.name)
    gather(lambda: sbatch.header({"job-name": name}))
    log = gather(lambda: sbatch.log_pattern(str(base / "logs"), f"slurm-{'%A_%a' if array else '%j'}.log"))
    rehearsal = None
    if asked.rehearse and runs:
        from dsgpt.train.rehearsal import plan_rehearsal  # most jobs have none, and submitting is to be quick

        rehearsal = gather(lambda: plan_rehearsal(loaded, runs[0]))
    gather.finish()
    loop = {"requeue": "", "open-mode": "append", "signal": f"USR1@{lead.seconds}", "output": log or ""}
    shown = {**options, **extra, "job-name": name, **loop}
    notes = [*loaded.warnings, *_node_notes(loaded.config, nodes, per_node, "gpus-per-node" in options), *lead.notes]
    if "time" not in options:
        notes.append("no --time: the partition's own limit counts")
    left = nothing_left(runs[-1]) if not words else ""
    return SubmissionPlan(asked, loaded, runs[-1], base, shown, words, notes, lead, rehearsal, left)


class _Gather:
    """Runs one check after the other and keeps what they complain of."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._errors: list[DsgptError] = []

    def __call__(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except DsgptError as error:
            self._errors.append(error)
            return None

    def finish(self) -> None:
        """Raise what was found, in one error; of the kind of the first that is not about data."""
        found = list(dict.fromkeys(problem for error in self._errors for problem in error.problems))
        if self.problems:
            raise ConfigError(problems=[*found, *self.problems])
        if self._errors:
            worst = next((error for error in self._errors if error.exit_code != ExitCode.BAD_DATA), self._errors[0])
            raise type(worst)(problems=found)


def _options(asked: Asked, site: Site) -> tuple[dict[str, str], dict[str, str]]:
    """sbatch's options that dsgpt knows, and further ones; the command line wins over the site."""
    options = {**site.options(), **asked.options}
    options.setdefault("nodes", "1")
    if options.get("gpus-per-node") == "0" or (
        "ntasks-per-node" in asked.options and "gpus-per-node" not in asked.options
    ):
        options.pop("gpus-per-node", None)
    # Without it SLURM would give a node's one task the CPUs of one rank.
    gpus = options.get("gpus-per-node")
    if gpus and "ntasks-per-node" not in asked.options:
        options["ntasks-per-node"] = gpus
    options.setdefault("ntasks-per-node", "1")
    options.pop("dependency", None)
    return options, {**site.extra(), **asked.extra}


def _ranks_per_node(config: RunConfig, options: dict[str, str], gather: _Gather) -> int:
    gpus, tasks = int(options.get("gpus-per-node", 0)), int(options["ntasks-per-node"])
    if gpus and tasks != gpus:
        seen = f"--ntasks-per-node {tasks}, --gpus-per-node {gpus}"
        gather.problems.append(Problem("a rank has one GPU", seen, "leave --ntasks-per-node out"))
    if config.device == "cuda" and not gpus:
        gather.problems.append(Problem("device=cuda, but no GPUs are asked for", do="--gpus-per-node G"))
    return gpus or tasks


def _task_words(arguments: Sequence[str], array: str) -> tuple[tuple[str, ...], list[str]]:
    """Words with {task} of an array job, which the job itself fills in; and all words as its first task has them."""
    first = re.search(r"[0-9]+", array)
    if first is None:
        return (), list(arguments)
    overrides = split_arguments(arguments)[1]
    words = tuple(word for word in overrides if TASK in word)
    return words, [word.replace(TASK, first[0]) if word in words else word for word in arguments]


def _base(loaded: LoadedConfig, words: Sequence[str]) -> Path:
    """The run's folder; of an array whose runs have a folder each, the innermost one that holds all of them."""
    named = [word.partition("=")[2] for word in words if word.startswith("run.output_dir=")]
    if not named:
        return loaded.config.run.output_dir
    folder = Path(named[-1]).expanduser().absolute()
    return next(parent for parent in folder.parents if TASK not in str(parent))


def _layout(config: RunConfig, nodes: int, per_node: int, has_gpus: bool) -> Layout:
    """What the job would make of so many nodes."""
    micro = config.training.micro_batch_size_per_gpu
    each = [Node(f"node{number}", per_node if has_gpus else 0, 1) for number in range(nodes)]
    return choose_layout(
        each, [per_node] * nodes, config.training.global_batch_size, micro if micro != "auto" else None
    )


def _resolve(
    config: RunConfig, nodes: tuple[int, int], per_node: int, has_gpus: bool, gather: _Gather
) -> list[ResolvedRun]:
    """The run on the fewest and on the most nodes that it may get."""
    device = "cuda" if has_gpus and config.device != "cpu" else "cpu"
    sizes = sorted({_layout(config, number, per_node, has_gpus).world_size for number in nodes})
    found = [gather(partial(resolve_run, config, world_size=size, device=device)) for size in sizes]
    runs = [run for run in found if run is not None]
    if runs:
        gather(partial(check_same_run, runs[0]))
    return runs if len(runs) == len(sizes) else []


def _node_notes(config: RunConfig, nodes: tuple[int, int], per_node: int, has_gpus: bool) -> list[str]:
    """Which numbers of nodes would leave some of them idle."""
    total, micro, notes = config.training.global_batch_size, config.training.micro_batch_size_per_gpu, []
    of = "" if micro == "auto" else f" by {micro}"
    for number in range(nodes[0], min(nodes[1], nodes[0] + _NODES_LOOKED_AT) + 1):
        layout = _layout(config, number, per_node, has_gpus)
        ranks = number * per_node
        if layout.world_size < ranks:
            notes.append(
                f"{number} nodes have {ranks} ranks, which do not divide the global batch {total}{of}: "
                f"{layout.world_size} would train, {ranks - layout.world_size} idle"
            )
    return notes[:4] + ([f"and so with {len(notes) - 4} other numbers of nodes"] if len(notes) > 4 else [])


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", seen=str(error)) from error


def queue(plan: SubmissionPlan) -> list[Submission]:
    """Write the files and call sbatch for each job. Where one is refused, those before it are taken back."""
    done: list[Submission] = []
    with contextlib.ExitStack() as undo:
        for index, kind in enumerate(plan.kinds):
            after = [f"afterok:{done[0].job_id}"] if plan.rehearsal and index else []
            after += [f"afterany:{done[-1].job_id}"] if done and done[-1].kind == "train" else []
            waits_for = done[0].job_id if plan.rehearsal and index else ""
            submission = _queue_one(plan, kind, after, [one.job_id for one in done if one.kind == "train"])
            done.append(replace(submission, after=waits_for))
            undo.callback(cancel, [submission.job_id])
            record(submission.folder, done[-1])
        undo.pop_all()
    return done


def _queue_one(plan: SubmissionPlan, kind: str, after: Sequence[str], earlier: Sequence[str]) -> Submission:
    folder = create_folder(plan.base)
    try:
        files = plan.files(folder, kind, after, earlier)
        for name, text in files.texts.items():
            (folder / name).write_text(text, "utf-8")
        job = sbatch.submit(files.command, files.options)
    except ConfigError:
        _remove(folder)  # nothing was queued; after another error it may have been, and its files are needed
        raise
    who = {"host": socket.gethostname(), "user": getpass.getuser(), "asked": plan.asked.words, "cwd": os.getcwd()}
    return Submission(job, time.time(), files.command, kind, **who, folder=folder)  # type: ignore[arg-type]


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def describe(plan: SubmissionPlan) -> dict[str, Any]:
    """For --json: what was decided."""
    told = {"output_dir": str(plan.base), "world_size": plan.run.world_size, "max_steps": plan.run.max_steps}
    return {**told, "signal_lead_seconds": plan.lead.seconds, "notes": plan.notes}


def show(files: Files) -> str:
    """A script and the call, for people."""
    name = Path(files.command[2]).name
    return f"# {files.folder / name}\n{files.texts[name]}\n# {shlex.join(files.command)}"
