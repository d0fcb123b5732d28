"""`dsgpt doctor`: versions, accelerators, launcher, output folder and host, each with the fix where it needs one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from dsgpt.cli.common import print_json
from dsgpt.cli.probe_table import print_probe
from dsgpt.errors import DsgptError, ExitCode
from dsgpt.launch import slurm
from dsgpt.launch.doctor import Check, examine_machine
from dsgpt.launch.local_ranks import expected_hosts, run_local_ranks
from dsgpt.process import complain

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="Where runs will write: checked for access, space and inodes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--distributed", is_flag=True, help="Probe the ranks of a job instead: srun python -m dsgpt doctor --distributed"
)
def doctor(output_dir: Path, as_json: bool, distributed: bool) -> None:
    """Say what would go wrong on this machine, and the fix. Exits with 78 when something would stop a run.

    With --distributed, on every rank of a job (srun, torchrun, deepspeed --no_local_rank --module): whether the ranks
    meet, their nodes are alike and their network is whole and fast. Alone it starts ranks on this machine. Exits with 76
    where a host or link is lost, slow or damages data, and names it; with 78 where software differs.
    """
    if distributed:
        _distributed(as_json)
    checks = examine_machine(output_dir) if as_json else _with_status(output_dir)
    problems = [check for check in checks if check.status == "problem"]
    if as_json:
        click.echo(json.dumps({"ok": not problems, "checks": [vars(check) for check in checks]}))
    else:
        _print_table(checks)
    raise SystemExit(ExitCode.CONFIG if problems else ExitCode.DONE)


def _distributed(as_json: bool) -> NoReturn:
    """One rank's part; ends the process at once, since threads of a broken network may never end."""
    slurm.adopt_rank_environment()
    if "RANK" not in os.environ:
        raise SystemExit(run_local_ranks(["doctor", "--distributed", *(["--json"] if as_json else [])]))
    from dsgpt.probe import start_and_probe

    try:
        world, report = start_and_probe(expected_hosts())
        code = report.exit_code
        if world.is_main:
            if as_json:
                print_json(report.as_dict())
            else:
                print_probe(report)
    except DsgptError as error:
        code = error.exit_code
        if os.environ["RANK"] == "0" or code != ExitCode.CONFIG:  # the same on all ranks
            complain(f"dsgpt doctor: {error}")
        if as_json and os.environ["RANK"] == "0":
            print_json({"ok": False, "problems": [str(error)]})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def _with_status(output_dir: Path) -> list[Check]:
    from rich.console import Console

    with Console(stderr=True).status("looking") as status:
        return examine_machine(output_dir, progress=lambda name: status.update(f"looking at: {name}"))


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "seen"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        seen = Text(check.seen)
        if check.do:
            seen.append(f"\n-> {check.do}", style="bold")
        table.add_row(Text(check.status, style=_COLOURS[check.status]), check.name, seen)
    console = Console()
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in ("problem", "warning")}
    console.print(f"\n{counts['problem']} problems, {counts['warning']} warnings")
