"""`dsgpt train RUN.yaml [key=value…]`: start the DeepSpeed launcher here, or on the hosts of a file, and watch the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

_HOSTS_ONLY = ("include", "exclude", "launcher", "master_addr", "master_port", "node_rank")


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN.yaml [MORE.yaml…] [key=value…]")
@click.option("--num-processes", type=click.IntRange(1), help="Ranks on this machine; default: its GPUs, or 2 on CPU.")
@click.option("--num-gpus", type=click.IntRange(1), help="GPUs, and ranks, on each machine: its first N.")
@click.option("--hostfile", type=click.Path(path_type=Path), help="Train on these hosts: lines `node1 slots=8`.")
@click.option("--include", metavar="HOST[:GPU,GPU…][@HOST…]", help="Only these of the hostfile.")
@click.option("--exclude", metavar="HOST[:GPU,GPU…][@HOST…]", help="All of the hostfile but these.")
@click.option(
    "--launcher",
    type=click.Choice(("ssh", "pdsh", "openmpi", "no-ssh")),
    help="How hosts are reached; default ssh. no-ssh: you start each host's command.",
)
@click.option("--master-addr", help="How other hosts reach the first one; default: its name in the hostfile.")
@click.option("--master-port", type=click.IntRange(1, 65535), help="A port of the first host; default: a free one.")
@click.option("--node-rank", type=click.IntRange(0), help="With no-ssh: which host of the file this is, from 0.")
@click.option("--dry-run", is_flag=True, help="Show everything resolved, and stop.")
@click.option("--trust-checkpoint", is_flag=True, help="The same as model.trust_checkpoint=true.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and nothing else on stdout.")
@click.pass_context
def train(
    ctx: click.Context,
    arguments: tuple[str, ...],
    num_processes: int | None,
    num_gpus: int | None,
    dry_run: bool,
    trust_checkpoint: bool,
    as_json: bool,
    **hosts: Any,
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
    _refuse_clashes(num_processes, num_gpus, hosts)
    remote = _remote(num_gpus, hosts) if hosts["hostfile"] else None
    options = _options(num_processes, num_gpus, hosts)
    if remote is not None and remote.launcher == "no-ssh" and hosts["node_rank"] is None and not dry_run:
        _tell_commands(remote, continue_line(arguments, options))
        return
    here, hides = num_processes or num_gpus, num_gpus is not None
    if dry_run:
        plan = plan_run(arguments, here, debug, hides, remote)
        if as_json:
            print_json(plan.as_dict())
        else:
            click.echo(plan.text())
        return
    end = start_run(arguments, here, as_json, debug, hides, remote)
    if as_json:
        print_json(end.as_dict())
    elif end.message:
        click.echo(end.message, err=True)
    if end.exit_code in (75, 76) and not as_json:
        click.echo(f"continue with: dsgpt train {continue_line(arguments, options)}", err=True)
    if end.exit_code not in (0, 75) and not as_json:
        click.echo(f"log: {end.log_file}", err=True)
    sys.exit(end.exit_code)


def _refuse_clashes(num_processes: int | None, num_gpus: int | None, hosts: dict[str, Any]) -> None:
    if num_processes and (num_gpus or hosts["hostfile"]):
        raise click.UsageError("--num-processes is for this machine alone; use --num-gpus, or slots in the hostfile")
    if not hosts["hostfile"] and (given := [name for name in _HOSTS_ONLY if hosts[name] is not None]):
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --hostfile")


def _remote(num_gpus: int | None, hosts: dict[str, Any]) -> Any:
    from dsgpt.launch.hosts import read_hostfile, select
    from dsgpt.launch.remote import plan_remote

    nodes = select(read_hostfile(hosts["hostfile"]), hosts["include"] or "", hosts["exclude"] or "", num_gpus)
    rest = (hosts["master_addr"], hosts["master_port"], hosts["node_rank"])
    return plan_remote(nodes, hosts["launcher"] or "ssh", *rest)


def _tell_commands(remote: Any, line: str) -> None:
    click.echo("# on each host, in this folder:")
    for rank, node in enumerate(remote.nodes):
        click.echo(f"dsgpt train {line} --node-rank {rank}   # {node.host}")


def _options(num_processes: int | None, num_gpus: int | None, hosts: dict[str, Any]) -> list[Any]:
    """The options that say where the run is, as words."""
    given = {"num_processes": num_processes, "num_gpus": num_gpus, **hosts}
    return [
        word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)
    ]


def continue_line(arguments: tuple[str, ...], options: list[Any]) -> str:
    """The arguments that continue this run, quoted for a shell."""
    import shlex

    kept = [word for word in arguments if not word.startswith("resume=")]  # it was for the start that just ended
    words = [*options, "--", *kept] if any(word.startswith("-") for word in kept) else [*kept, *options]
    return shlex.join(map(str, words))
