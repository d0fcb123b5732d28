"""`dsgpt verify-resume RUN.yaml [key=value…]`: prove on this machine that a run killed and resumed is the run it was."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click


@click.command("verify-resume")
@click.argument("arguments", nargs=-1, required=True, metavar="RUN.yaml [MORE.yaml…] [key=value…]")
@click.option(
    "--steps", type=click.IntRange(2), default=10, show_default=True, help="Steps before and after the commit."
)
@click.option("--num-processes", type=click.IntRange(1), help="Ranks on this machine; default: its GPUs, or 2 on CPU.")
@click.option("--world-size", type=click.IntRange(1), help="Ranks of the resume; default: the same.")
@click.option("--deepspeed", help="DeepSpeed config of the resume; default: the same.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A new folder for its runs; default: beside run.output_dir."
)
@click.option("--keep", is_flag=True, help="Leave its runs there; they stay anyway where something differs or fails.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and nothing else.")
def verify_resume(
    arguments: tuple[str, ...],
    steps: int,
    num_processes: int | None,
    world_size: int | None,
    deepspeed: str | None,
    output: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Train, kill with SIGKILL, resume, and compare with a run that was not killed; the run's own folder is not touched.

    Ends with 0 where the resume is bit-identical (in another topology: the state is, and the losses agree), with 1 where it
    is not, with a run's own code where one fails. It needs the time of four starts and room for five checkpoints.
    """
    from dsgpt.cli.common import print_json
    from dsgpt.train.verify_resume import Trial

    signal.signal(signal.SIGTERM, _leave)  # its runs must not outlive it
    say = (lambda text: None) if as_json else click.echo
    trial = Trial(arguments, steps, num_processes, world_size, deepspeed, output, say)
    try:
        report = trial.run()
    except (KeyboardInterrupt, SystemExit) as interruption:
        trial.remove()
        sys.exit(128 + signal.SIGINT if isinstance(interruption, KeyboardInterrupt) else interruption.code)
    if report.ok and not keep:
        trial.remove()
    if as_json:
        print_json({**trial.as_dict(), **report.as_dict()})
    else:
        click.echo("\n".join(["", *trial.lines(), "", *map(str, report.checks), "", report.verdict]))
    sys.exit(int(not report.ok))


def _leave(number: int, frame: Any) -> None:
    sys.exit(128 + number)
