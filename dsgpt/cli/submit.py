"""`dsgpt submit RUN.yaml [key=value…] --nodes N --gpus-per-node G --time T`: queue a run on SLURM."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsgpt.launch.submission import Submission
    from dsgpt.train.submit import SubmissionPlan


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN.yaml [MORE.yaml…] [key=value…]")
@click.option("--nodes", help="A number, or a range such as 2-8: what is free then.")
@click.option("--gpus-per-node", type=click.IntRange(0), help="One rank each; 0 = none, whatever the site's file says.")
@click.option("--ntasks-per-node", type=click.IntRange(1), help="Ranks of a node without GPUs; default 1.")
@click.option("--cpus-per-task", type=click.IntRange(1), help="CPUs of a rank.")
@click.option("--mem", help="Memory of a node, for example 200G.")
@click.option("--time", help="Time limit of a job: minutes, 12:00:00 or 2-12:00:00. The run may need many such jobs.")
@click.option("--partition")
@click.option("--account")
@click.option("--qos")
@click.option("--constraint")
@click.option("--reservation")
@click.option("--exclude", help="Nodes not to use.")
@click.option("--array", help="For example 0-9: {task} in a key=value is the task's number.")
@click.option("--dependency", help="As sbatch has it: afterok:1234 …")
@click.option("--job-name", help="Default: run.name.")
@click.option("--sbatch-option", multiple=True, metavar="NAME[=VALUE]", help="Any other option of sbatch; repeatable.")
@click.option(
    "--chain",
    type=click.IntRange(1, 100),
    default=1,
    help="So many jobs, each after the one before: where no job may requeue itself.",
)
@click.option("--rehearse", is_flag=True, help="First a short job that is stopped, requeued and resumed, and compared.")
@click.option("--dry-run", is_flag=True, help="Print the exact script and sbatch's arguments; touch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else on stdout.")
def submit(arguments: tuple[str, ...], chain: int, rehearse: bool, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Check the config for the ranks asked for, and queue the run; it commits, requeues and resumes by itself.

    Defaults of a site are read from ~/.config/dsgpt/site.yaml. The job trains a copy of the config made now. A number of
    nodes that does not divide the global batch is no mistake: the largest part of them that does is used.
    """
    from dsgpt.cli.common import print_json
    from dsgpt.train.submit import Asked, describe, plan_submission, queue, show

    extra = dict(word.partition("=")[::2] for word in given.pop("sbatch_option"))
    options = {name.replace("_", "-"): str(value) for name, value in given.items() if value is not None}
    words = ("submit", *(word for word in sys.argv[2:] if word != "--json"))
    plan = plan_submission(Asked(arguments, options, extra, chain, rehearse, words))
    if dry_run:
        files = plan.preview()
        if as_json:
            jobs = [{"kind": one.kind, "command": one.command, "files": one.texts} for one in files]
            print_json({"dry_run": True, **describe(plan), "jobs": jobs})
        else:
            _notes(plan)
            click.echo("\n\n".join(show(one) for one in files))
        return
    if plan.nothing_left:
        _finish(plan, [], as_json)
        return
    _finish(plan, queue(plan), as_json)


def _notes(plan: SubmissionPlan) -> None:
    for note in plan.notes:
        click.echo(f"note: {note}", err=True)


def _finish(plan: SubmissionPlan, jobs: list[Submission], as_json: bool) -> None:
    import shlex

    from dsgpt.cli.common import print_json
    from dsgpt.train.submit import describe

    if as_json:
        told = [{"job_id": one.job_id, "kind": one.kind, "folder": one.folder, "command": one.command} for one in jobs]
        print_json({**describe(plan), "nothing_left": plan.nothing_left, "jobs": told})
        return
    _notes(plan)
    if not jobs:
        click.echo(f"{plan.nothing_left}; nothing is queued")
        return
    for one in jobs:
        what = "rehearsal" if one.kind == "rehearse" else "training"
        waits = f", after a good end of job {one.after}" if one.after else ""
        click.echo(f"job {one.job_id}   {what}{waits}: {one.folder}")
    run = shlex.quote(str(plan.base))
    ids = ",".join(one.job_id for one in jobs)
    click.echo(f"how it stands   dsgpt status {run}")
    click.echo(f"its log         dsgpt logs {run} --follow")
    click.echo(f"the queue       squeue -j {ids}")
    click.echo(f"take it back    dsgpt cancel {run}")
