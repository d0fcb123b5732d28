"""`dsgpt cancel RUN_DIR`: take a run's jobs out of the queue, or end it here."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cancel(folder: Path, as_json: bool) -> None:
    """Cancel everything of a run that is queued or running; it is not requeued.

    SLURM gives a running job some seconds only: to commit the current step first, touch RUN_DIR/STOP instead.
    """
    from dsgpt.cli.common import print_json
    from dsgpt.train.cancel import cancel_run
    from dsgpt.train.runs import require_run

    told = cancel_run(require_run(folder.absolute()))
    if as_json:
        print_json({"run_dir": folder.absolute(), "done": told})
    else:
        click.echo("\n".join(told))
