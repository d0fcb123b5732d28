"""`dsgpt doctor`: versions, accelerators, launcher, output folder and host, each with the fix where it needs one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dsgpt.errors import ExitCode
from dsgpt.launch.doctor import Check, examine_machine

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
def doctor(output_dir: Path, as_json: bool) -> None:
    """Say what would go wrong on this machine, and the fix. Exits with 78 when something would stop a run."""
    checks = examine_machine(output_dir) if as_json else _with_status(output_dir)
    problems = [check for check in checks if check.status == "problem"]
    if as_json:
        click.echo(json.dumps({"ok": not problems, "checks": [vars(check) for check in checks]}))
    else:
        _print_table(checks)
    raise SystemExit(ExitCode.CONFIG if problems else ExitCode.DONE)


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
