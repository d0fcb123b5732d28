"""The frame of `python -m tests.benchmarks` and `python -m tests.faults`: list the entries, run them, say what holds.

An entry is a module of the package: the first line of its docstring says what it measures, `run(trials, seed)` returns
an Outcome. There is no registry: a new entry is a new file. Figures are never test assertions, because a busy machine
must not turn a test red; here a must that fails ends the command with 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

VERSIONS_OF = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Row:
    """One figure. `at_most` and `at_least` are the must; a row with neither is context and always holds."""

    label: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    @property
    def must(self) -> str:
        parts = [f">= {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What an entry found, and how many trials it took."""

    rows: list[Row]
    trials: int


def print_outcome(name: str, outcome: Outcome, seed: int) -> bool:
    """Print the table and the JSON line; whether every must holds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for heading in ("what", "value", "must", "holds", "note"):
        table.add_column(heading, overflow="fold")
    for row in outcome.rows:
        verdict = ("yes" if row.holds else "NO") if row.must else ""
        table.add_row(row.label, f"{row.value:.4g} {row.unit}".strip(), row.must, verdict, row.note)
    Console().print(table)
    holds = bool(outcome.rows) and all(row.holds for row in outcome.rows)  # what measured nothing holds nothing
    line = {
        "name": name,
        "value": {row.label: row.value for row in outcome.rows},
        "must": {row.label: row.must for row in outcome.rows if row.must},
        "holds": holds,
        "trials": outcome.trials,
        "seed": seed,
        "versions": versions(),
    }
    print(json.dumps(line), flush=True)
    return holds


def versions() -> dict[str, str]:
    """Of Python, the machine and the libraries a figure depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def entries(package: ModuleType) -> dict[str, Callable[[], ModuleType]]:
    """The modules of `package` that are entries: name -> what imports it."""
    names = sorted(one.name for one in pkgutil.iter_modules(package.__path__) if not one.name.startswith("_"))
    return {name: lambda name=name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def main(package: ModuleType, arguments: list[str] | None = None) -> int:
    """The command line of both packages: without a NAME, the list; otherwise the named entries, one after another."""
    found = entries(package)
    parser = argparse.ArgumentParser(
        prog=f"python -m {package.__name__}", description=(package.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to run: all, {', '.join(found)}")
    parser.add_argument("--trials", type=int, help="how often (each entry has its own default)")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in found and name != "all"]
    if unknown:
        parser.error(f"no {', '.join(unknown)} here; there is {', '.join(found)}")
    if not options.names:
        for name, load in found.items():
            print(f"{name:16} {(load().__doc__ or '').strip().splitlines()[0]}")
        return 0
    chosen = list(found) if "all" in options.names else options.names
    held = [print_outcome(name, found[name]().run(options.trials, options.seed), options.seed) for name in chosen]
    return 0 if all(held) else 1
