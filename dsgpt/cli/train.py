"""`dsgpt train RUN.yaml [key=value…]`: start the DeepSpeed launcher here and watch the run."""

from __future__ import annotations

import sys
from typing import Any

import click


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN.yaml [MORE.yaml…] [key=value…]")
@click.option("--num-processes", type=click.IntRange(1), help="Ranks on this machine; default: its GPUs, or 2 on CPU.")
@click.option("--dry-run", is_flag=True, help="Show everything resolved, and stop.")
@click.option("--trust-checkpoint", is_flag=True, help="The same as model.trust_checkpoint=true.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and nothing else on stdout.")
@click.pass_context
def train(
    ctx: click.Context,
    arguments: tuple[str, ...],
    num_processes: int | None,
    dry_run: bool,
    trust_checkpoint: bool,
    as_json: bool,
) -> None:
    """Train the run that the configs describe, or continue it where it stopped.

    Configs merge left to right; `key.path=value` overrides them. Ctrl-C or SIGTERM commits the current step and leaves
    with code 75; the same command continues from there. Inside `srun` it is one rank of the job.
    """
    from dsgpt.cli.common import print_json
    from dsgpt.launch import slurm
    from dsgpt.train.start import plan_run, start_run

    if trust_checkpoint:
        arguments = (*arguments, "model.trust_checkpoint=true")
    debug = bool(ctx.obj and ctx.obj.get("debug"))
    if slurm.in_step() and not dry_run:  # srun has started this process as one rank of many
        from dsgpt.train.worker import main

        main([*arguments, *(["--debug"] if debug else [])])
    if dry_run:
        plan = plan_run(arguments, num_processes)
        if as_json:
            print_json(plan.as_dict())
        else:
            click.echo(plan.text())
        return
    end = start_run(arguments, num_processes, quiet=as_json, debug=debug)
    if as_json:
        print_json(end.as_dict())
    elif end.message:
        click.echo(end.message, err=True)
    if end.exit_code in (75, 76) and not as_json:
        click.echo(f"continue with: dsgpt train {continue_line(arguments, num_processes)}", err=True)
    if end.exit_code not in (0, 75) and not as_json:
        click.echo(f"log: {end.log_file}", err=True)
    sys.exit(end.exit_code)


def continue_line(arguments: tuple[str, ...], num_processes: int | None) -> str:
    """The arguments that continue this run, quoted for a shell."""
    import shlex

    kept = [word for word in arguments if not word.startswith("resume=")]  # it was for the start that just ended
    words: list[Any] = [*kept, *(["--num-processes", num_processes] if num_processes else [])]
    return shlex.join(str(word) for word in words)
