"""Hostfiles, and which of their GPUs a job uses: DeepSpeed's syntax, read strictly.

    nodes = select(read_hostfile(path), include="node1@node2:0,2")

A hostfile has lines `node1 slots=8`; `#` begins a comment. DeepSpeed takes any text without blanks for a host and hands
it to ssh, where `-oProxyCommand=…` is an option and not a host. Here a host is what a host's name can be, and all that
is wrong with a file is told at once, with line numbers, before anything is started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsgpt.errors import ConfigError, Problem

HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
MAX_SLOTS = 1024
_MAX_BYTES = 1 << 20
_SLOTS = re.compile(r"slots=([0-9]{1,9})")
_SHOWN = 80


@dataclass(frozen=True)
class Node:
    """One host of a job and the numbers of the GPUs it uses there: as many ranks."""

    host: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> dict[str, int]:
    """host -> slots, in the order of the file, which is that of the ranks. Raises ConfigError with every problem."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is no hostfile", f"{path.stat().st_size} bytes", "a line is: node1 slots=8")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"the hostfile {path} cannot be read", str(error), "check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no hostfile", str(error), "a line is: node1 slots=8") from None
    pool: dict[str, int] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].strip(" \t\r").replace("\t", " ").split(" ")
        words = [word for word in words if word]
        if not words:
            continue
        what, do = _wrong(words, lines)
        if what:
            problems.append(Problem(f"{path}:{number}: {what}", _shown(line), do))
        else:
            pool[words[0]] = int(words[1].removeprefix("slots="))
            lines[words[0]] = number
    if not pool and not problems:
        problems.append(Problem(f"the hostfile {path} names no host", "", "write lines such as: node1 slots=8"))
    if problems:
        raise ConfigError(problems=problems)
    return pool


def _wrong(words: list[str], lines: Mapping[str, int]) -> tuple[str, str]:
    """(what is wrong with a line, what to do), or two empty texts."""
    slots = _SLOTS.fullmatch(words[1]) if len(words) == 2 else None
    if not HOST.fullmatch(words[0]):
        return "this is no host name", "letters, digits, '.', '_' and '-', the first a letter or digit"
    if slots is None:
        return "a line is a host and its slots", f"write: {words[0]} slots=8"
    if words[0] in lines:
        return f"{words[0]} stands in line {lines[words[0]]} already", "one line per host"
    if not 1 <= int(slots[1]) <= MAX_SLOTS:
        return f"{words[0]} has {slots[1]} slots", f"1 to {MAX_SLOTS}: its number of GPUs; or delete the line"
    return "", ""


def select(pool: Mapping[str, int], include: str = "", exclude: str = "", num_gpus: int | None = None) -> list[Node]:
    """The part of a hostfile that a job uses: `include` or `exclude` as `host[:slot,slot…][@host…]`, or the first N of each.

    Raises ConfigError with every problem.
    """
    if bool(include) + bool(exclude) + (num_gpus is not None) > 1:
        raise ConfigError("--include, --exclude and --num-gpus exclude each other", do="use one of them")
    problems = []
    if num_gpus is not None:
        problems = [
            Problem("fewer slots than --num-gpus", f"{host} slots={slots}, --num-gpus {num_gpus}", "a smaller number")
            for host, slots in pool.items()
            if slots < num_gpus
        ]
        pool = dict.fromkeys(pool, num_gpus)
    option = "--include" if include else "--exclude"
    named, wrong = _parse_filter(include or exclude, option, pool)
    chosen = {}
    for host, slots in pool.items():
        every = set(range(slots))
        kept = named.get(host, set()) if include else every - named.get(host, set())
        if kept:
            chosen[host] = tuple(sorted(kept))
    problems += wrong
    if not chosen and not problems:
        problems.append(
            Problem(f"{option} {_shown(include or exclude)} leaves no host", "", f"there are {', '.join(pool)}")
        )
    if problems:
        raise ConfigError(problems=problems)
    return [Node(host, slots) for host, slots in chosen.items()]


def _parse_filter(text: str, option: str, pool: Mapping[str, int]) -> tuple[dict[str, set[int]], list[Problem]]:
    named: dict[str, set[int]] = {}
    problems = []
    for part in text.split("@") if text else []:
        host, colon, numbers = part.partition(":")
        if host not in pool:
            there = ", ".join(list(pool)[:8]) + (" …" if len(pool) > 8 else "")
            problems.append(Problem(f"{option}: no such host in the hostfile", _shown(host), f"there are {there}"))
        elif colon and not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", numbers):
            problems.append(Problem(f"{option}: {host}: these are no slots", _shown(numbers), f"write {host}:0,1"))
        else:
            slots = {int(number) for number in numbers.split(",")} if colon else set(range(pool[host]))
            if beyond := sorted(slots - set(range(pool[host]))):
                problems.append(
                    Problem(f"{option}: {host} has no slot {beyond[0]}", f"slots={pool[host]}", "0 is the first")
                )
            named[host] = named.get(host, set()) | slots
    return named, problems


def hostfile_text(nodes: list[Node]) -> str:
    """What was read and chosen, as a hostfile of its own."""
    return "".join(f"{node.host} slots={len(node.slots)}\n" for node in nodes)


def _shown(text: str) -> str:
    """For a message: on one line, without control characters, not without end."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
