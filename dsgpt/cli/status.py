"""`dsgpt status RUN_DIR`: how a run stands, or all runs below a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(folder: Path, as_json: bool) -> None:
    """Say whether a run is running, queued or over: how it ended, what is committed, what to type next.

    A folder with several runs below it gives a line for each. Ends with 0 where all is well (running, queued, finished,
    stopped by a person), with the run's own exit code where it failed, with 75 where it was preempted or cancelled and
    nothing of it waits; of several runs with the code of the first that is not well.
    """
    from dsgpt.cli.common import print_json
    from dsgpt.train.runs import find_runs, is_run
    from dsgpt.train.status import read_status

    found = [read_status(run) for run in find_runs(folder.absolute())]
    bad = [one.exit_code for one in found if one.exit_code]
    if as_json:
        print_json(found[0].as_dict() if len(found) == 1 else {"runs": [one.as_dict() for one in found]})
    elif len(found) == 1:
        click.echo("\n".join(found[0].lines()))
    else:
        shared = read_status(folder.absolute()).queue if is_run(folder) else []  # tasks of an array that wait
        click.echo("\n".join([*(one.line() for one in found), *shared]))
    sys.exit(bad[0] if bad else 0)
