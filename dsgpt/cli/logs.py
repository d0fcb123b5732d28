"""`dsgpt logs RUN_DIR`: the logs of a run's newest start, or of an older one."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "--follow", "-f", is_flag=True, help="Go on with what is appended, over requeues, until the run has ended."
)
@click.option("--lines", "-n", type=click.IntRange(1), default=50, show_default=True, help="Last lines of each file.")
@click.option("--attempt", help="Name of a start: a folder below logs/. Default: the newest.")
@click.option("--rank", type=click.IntRange(0), help="Only lines with this rank's prefix.")
@click.option("--stacks", is_flag=True, help="The stacks that watchdogs left of a stuck run.")
def logs(folder: Path, follow: bool, lines: int, attempt: str | None, rank: int | None, stacks: bool) -> None:
    """Show the end of the logs of a run's newest start, SLURM's own among them."""
    from dsgpt.train import run_logs
    from dsgpt.train.runs import require_run

    run = require_run(folder.absolute())
    texts = run_logs.follow(run, rank, lines) if follow else run_logs.show(run, lines, attempt, rank, stacks)
    try:
        for text in texts:
            click.echo(text)
    except KeyboardInterrupt:
        click.echo("", err=True)
