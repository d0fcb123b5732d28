"""A batch script for sbatch: a packaged script with its `#SBATCH` lines replaced, and the call that submits it. Torch-free.

    options = common_options("gpt2-124m", {"nodes": "4", "gpus-per-node": "8", "time": "2:00:00"})
    script = render(packaged_text, {**options, "output": log_pattern(folder / "slurm-%j.log")}, {"DSGPT_SITE": site})
    job = submit(["sbatch", "--parsable", str(script_file), str(config_file)], options)

Values go into the script's header rather than on sbatch's command line, so that the file alone says what was asked for and
can be submitted again by hand. sbatch reads that header by rules of its own (quotes, backslashes, `#`), and expands `%` in
the name of the log; whatever cannot arrive there as it is, is refused (78). No shell ever sees a value of the header.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from dsgpt.errors import ConfigError, DsgptError, Problem

SBATCH_SECONDS = 120.0
_HEADER = "#SBATCH"
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_NODES = re.compile(r"([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?")
_PARSABLE = re.compile(r"([0-9]+)(?:;.*)?")

# What dsgpt itself says to sbatch; the loop of commit, requeue and resume rests on these.
OWN = ("job-name", "output", "open-mode", "requeue", "signal", "dependency", "kill-on-invalid-dep")
# What would take that away again, or make sbatch do something else than queue a script.
REFUSED = (*OWN, "error", "no-requeue", "parsable", "wrap", "test-only", "wait", "help", "usage", "version", "quiet")
# Variables by which a login script can overrule the header of any script: option -> sbatch's variables, where they differ.
_VARIABLES = {
    "time": ("SBATCH_TIMELIMIT",),
    "array": ("SBATCH_ARRAY_INX",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
}
# What SLURM, or a launcher, told the job from which another one is submitted must not reach that one.
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DSGPT_ATTEMPT")


def parse_nodes(text: str) -> tuple[int, int]:
    """(fewest, most) of '4' or '2-8'."""
    found = _NODES.fullmatch(text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < fewest <= most:
        raise ConfigError("nodes must be a number or a range", seen=repr(text), do="for example 4, or 2-8")
    return fewest, most


def parse_time(text: str) -> float | None:
    """Seconds of a time limit as sbatch writes it; None where there is no limit."""
    if text.lower() in ("unlimited", "infinite"):
        return None
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    usable = all(part.isascii() and part.isdigit() for part in [*parts, *([days] if dash else [])])
    if not usable or len(parts) > 3 or (not dash and days):
        raise ConfigError("not a time limit", seen=repr(text), do="minutes, 12:00:00, or 2-12:00:00 (days-hours:…)")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return 86400.0 * int(days) + 3600 * hours + 60 * minutes + seconds
    hours, minutes, seconds = (0, *numbers, 0) if len(numbers) == 1 else (0, *numbers) if len(numbers) == 2 else numbers
    return 3600.0 * hours + 60 * minutes + seconds


def check_options(options: Mapping[str, str]) -> list[Problem]:
    """What sbatch could not be told: odd names, empty values, characters that end a line."""
    problems = []
    for name, value in options.items():
        if not _OPTION.fullmatch(name):
            problems.append(Problem("not the name of an sbatch option", repr(name), "for example hint=nomultithread"))
        elif _unprintable(value):
            problems.append(Problem(f"--{name} holds characters that no line of a script can hold", repr(value)[:200]))
    return problems


def check_extra(options: Mapping[str, str]) -> list[Problem]:
    """Further options of the user's or the site's that dsgpt does not know, or must not pass on."""
    problems = check_options(options)
    for name in options:
        if name in REFUSED:
            do = "leave it out"
            problems.append(Problem(f"--{name} cannot be given: dsgpt sets it, or could not follow the job", name, do))
    return problems


def _unprintable(value: str) -> bool:
    """Control characters, line separators of any kind, and bytes that are no text."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" or 0xD800 <= ord(c) < 0xE000 for c in value)


def log_pattern(path: str, ending: str) -> str:
    """The value of --output for a log in this place; `ending` holds sbatch's own patterns (slurm-%j.log).

    Raises ConfigError where sbatch could not be told: it expands %, and a backslash anywhere ends all expansion.
    """
    if "\\" in path or _unprintable(path):
        do = "choose another run.output_dir"
        raise ConfigError("sbatch cannot write a log into a folder of this name", seen=repr(path)[:300], do=do)
    return f"{path.replace('%', '%%')}/{ending}"


def quote(value: str) -> str:
    """A value as sbatch's reader of `#SBATCH` lines takes it back: in it a backslash counts within any quotes."""
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+=\[\]-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def header(options: Mapping[str, str]) -> list[str]:
    """`#SBATCH` lines; a value of "" is an option without one. Raises ConfigError with every value that cannot be told."""
    problems = check_options(options)
    if problems:
        raise ConfigError(problems=problems)
    return [f"{_HEADER} --{name}" + (f"={quote(value)}" if value else "") for name, value in options.items()]


def render(script: str, options: Mapping[str, str], exports: Mapping[str, str]) -> str:
    """The packaged script with this header in place of its own, and these variables exported right after it."""
    lines = script.splitlines()
    own = [number for number, line in enumerate(lines) if line.startswith(_HEADER)]
    if not own or own != list(range(own[0], own[-1] + 1)):
        raise ConfigError("the packaged batch script has no single block of #SBATCH lines", do="install dsgpt again")
    unusable = [name for name, value in exports.items() if "\0" in value or _unprintable(value)]
    if unusable:
        seen = "; ".join(f"{name}={exports[name]!r}"[:200] for name in unusable)
        raise ConfigError("a path holds characters that no script can hold", seen=seen, do="choose another folder")
    exported = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    return "\n".join([*lines[: own[0]], *header(options), *exported, *lines[own[-1] + 1 :]]) + "\n"


def clean_environment(options: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """What sbatch is started with: nothing that overrules this header, nothing of a job that this process runs in."""
    overruling = {f"SBATCH_{name.upper().replace('-', '_')}" for name in options}
    overruling.update(variable for name in options for variable in _VARIABLES.get(name, ()))
    of_a_job = ("SLURM_", "DSGPT_") if "SLURM_JOB_ID" in environment else ("SLURM_",)
    return {
        name: value
        for name, value in environment.items()
        if name not in overruling and name not in _OF_A_RANK and (name in _KEPT or not name.startswith(of_a_job))
    }


def submit(command: Sequence[str], options: Mapping[str, str]) -> str:
    """Call sbatch; returns the job's id. Raises ConfigError where it refuses, DsgptError (76) where it cannot be asked."""
    try:
        done = subprocess.run(
            command,
            env=clean_environment(options, os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SBATCH_SECONDS,
        )
    except FileNotFoundError as error:
        do = "submit on a login node of the cluster; --dry-run prints the script anywhere"
        raise ConfigError("sbatch is not on PATH", seen=str(error), do=do) from error
    except subprocess.TimeoutExpired as error:
        do = "look with `squeue --me` whether the job is queued before you submit again"
        raise DsgptError(f"sbatch did not answer within {SBATCH_SECONDS:.0f} s", seen=str(error), do=do) from error
    told = "\n".join(line for line in done.stderr.strip().splitlines() if line)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = _PARSABLE.fullmatch(last.strip())
    if done.returncode == 0 and found:
        return found[1]
    if "contact" in told or "timed out" in told.lower() or "Socket" in told:
        raise DsgptError("SLURM's controller does not answer", seen=told, do="submit again in a minute")
    raise ConfigError("sbatch refused the job", seen=told or f"code {done.returncode}, {last!r}", do="correct it")
