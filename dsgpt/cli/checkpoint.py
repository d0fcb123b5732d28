"""`dsgpt checkpoint ls | verify | diff | prune | export`. All but diff and export need no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dsgpt.errors import CheckpointError, ExitCode

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def checkpoint() -> None:
    """List, verify, compare, delete and export checkpoints."""


def _committed(run_dir: Path) -> list[tuple[int, Path]]:
    from dsgpt.checkpoint import commit

    if (run_dir / commit.MANIFEST).exists():
        return [(commit.read_manifest(run_dir)["step"], run_dir)]
    found = commit.list_committed(run_dir / "checkpoints")
    if not found:
        raise CheckpointError("no committed checkpoint here", seen=str(run_dir), do="name a run folder")
    return found


@checkpoint.command("ls")
@click.argument("run_dir", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_checkpoints(run_dir: Path, as_json: bool) -> None:
    """The committed checkpoints of a run, oldest first."""
    from dsgpt.checkpoint import commit, retention
    from dsgpt.cli.common import print_json
    from dsgpt.units import format_bytes, format_count

    rows: list[dict[str, Any]] = []
    committed = _committed(run_dir)
    best = retention.best(committed)
    for step, path in committed:
        try:
            manifest = commit.read_manifest(path)
        except CheckpointError as error:
            click.echo(f"step {step:>8}  BAD: {error}", err=True)
            continue
        rows.append(
            {
                "step": step,
                "path": str(path),
                "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
                "consumed_tokens": manifest["counters"]["consumed_tokens"],
                "world_size": manifest["world_size"],
                "zero_stage": manifest["zero_stage"],
                "files": len(manifest["files"]),
                "validation_loss": retention.validation_loss(path),
                "best": best is not None and best[0] == step,
                "pinned": (path / retention.PIN).exists(),
            }
        )
    if as_json:
        print_json({"checkpoints": rows})
        return
    for row in rows:
        marks = f"{'  best' if row['best'] else ''}{'  kept by hand' if row['pinned'] else ''}"
        loss = f"  validation loss {row['validation_loss']:.4f}" if row["validation_loss"] is not None else ""
        click.echo(
            f"step {row['step']:>8}  {format_count(row['consumed_tokens']):>7} tokens  {format_bytes(row['bytes']):>9}  "
            f"{row['world_size']} ranks, ZeRO {row['zero_stage']}  {row['path']}{loss}{marks}"
        )


@checkpoint.command()
@click.argument("run")
@click.option("--size-only", is_flag=True, help="Compare sizes, not hashes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(run: str, size_only: bool, as_json: bool) -> None:
    """Check every committed checkpoint of RUN, or one (RUN@STEP, RUN@best or a folder), against its manifest.

    Ends with 65 if any is bad.
    """
    from dsgpt.checkpoint import commit
    from dsgpt.checkpoint.locate import locate_checkpoint, split_step
    from dsgpt.cli.common import print_json

    folder, step = split_step(run)
    paths = [locate_checkpoint(run)] if step else [path for _, path in _committed(folder)]
    results = {str(path): commit.verify(path, "size" if size_only else "hash") for path in paths}
    if as_json:
        print_json({"checkpoints": {path: [str(p) for p in problems] for path, problems in results.items()}})
    else:
        for path, problems in results.items():
            click.echo(f"{path}: {'good' if not problems else 'BAD'}")
            for problem in problems:
                click.echo(f"  {problem.what}: {problem.seen}")
    if any(results.values()):
        sys.exit(int(ExitCode.BAD_DATA))


@checkpoint.command()
@click.argument("one")
@click.argument("other")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def diff(one: str, other: str, as_json: bool) -> None:
    """Compare two checkpoints (RUN, RUN@STEP, RUN@best or a folder): what was recorded, and every tensor bit for bit.

    Number of ranks and ZeRO stage may differ. Ends with 1 where a tensor differs.
    """
    from dsgpt.checkpoint.diff import compare
    from dsgpt.checkpoint.locate import locate_checkpoint
    from dsgpt.cli.common import print_json

    result = compare(locate_checkpoint(one), locate_checkpoint(other))
    if as_json:
        print_json(result.as_dict())
    else:
        for line in result.lines():
            click.echo(line)
    sys.exit(int(bool(result.tensors)))


@checkpoint.command()
@click.argument("run_dir", type=_FOLDER)
@click.option("--keep-last", type=click.IntRange(1), required=True, help="How many of the newest stay.")
@click.option("--keep-every", type=click.IntRange(1), help="Steps divisible by this stay.")
@click.option("--keep-best", is_flag=True, help="The one with the lowest validation loss stays.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune(run_dir: Path, keep_last: int, keep_every: int | None, keep_best: bool, dry_run: bool, as_json: bool) -> None:
    """Delete old checkpoints of a run that is not running. The newest good one and those with a file KEEP always stay."""
    from dsgpt.checkpoint import retention
    from dsgpt.cli.common import print_json
    from dsgpt.lease import Lease, Owner
    from dsgpt.process import new_attempt

    committed = _committed(run_dir)
    if dry_run:
        steps = [step for step, _ in retention.surplus(committed, keep_last, keep_every, keep_best, "hash")]
    else:
        lease = Lease.acquire(run_dir, Owner.of_this_process(new_attempt()), say=click.echo)
        try:
            steps = retention.prune(run_dir / "checkpoints", keep_last, keep_every, keep_best, "hash")
        finally:
            lease.release()
    if as_json:
        print_json({"deleted": steps, "dry_run": dry_run})
    else:
        shown = ", ".join(map(str, steps)) or "nothing"
        click.echo(f"{'would delete' if dry_run else 'deleted'}: {shown}")


@checkpoint.command()
@click.argument("model")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet.")
@click.option("--adapter", is_flag=True, help="Only the adapters of a LoRA or DoRA run, for peft.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
              help="Precision of the weights; fp32 loses nothing.")  # fmt: skip
@click.option("--license", help="For the model card, e.g. apache-2.0; else the base model's, where it says one.")
@click.option("--no-check", is_flag=True, help="Do not load the export back to compare logits.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(
    model: str, output: Path, adapter: bool, dtype: str, license: str | None, no_check: bool, as_json: bool
) -> None:
    """Write MODEL (a run folder, RUN@STEP, RUN@best or a checkpoint) in Hugging Face format, checked against transformers.

    A model that no Hugging Face architecture holds is written in dsgpt's own format.
    """
    from dsgpt.checkpoint.weights import find_model
    from dsgpt.cli.common import print_json
    from dsgpt.units import format_count

    report: Any
    if adapter:
        from dsgpt.checkpoint.adapter import export_adapter

        if dtype != "fp32":
            raise click.UsageError("adapters are always in fp32: --adapter goes without --dtype")
        report = export_adapter(find_model(model), output, not no_check, license)
    else:
        from dsgpt.checkpoint.export import export_checkpoint

        report = export_checkpoint(find_model(model), output, not no_check, dtype, license)
    if as_json:
        print_json(vars(report))
        return
    what = f"adapters for {report.base_model}" if adapter else report.architecture
    click.echo(f"{report.path}: {what}, {format_count(report.num_parameters)} parameters in {dtype}")
    if report.logit_difference is not None:
        reader = "peft" if adapter else report.checked_with
        click.echo(f"logits agree with those {reader} reads: largest difference {report.logit_difference:.2g}")
    elif adapter:
        click.echo(f"logits were not compared: {report.unchecked}")
    if report.license in ("unknown", "other"):
        click.echo(f"licence: {report.license}; --license NAME says another in the model card")
