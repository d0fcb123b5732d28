"""`dsgpt checkpoint ls | verify | export`. Listing and verifying need no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dsgpt.errors import CheckpointError, ExitCode


@click.group()
def checkpoint() -> None:
    """List, verify and export checkpoints."""


def _committed(run_dir: Path) -> list[tuple[int, Path]]:
    from dsgpt.checkpoint import commit

    if (run_dir / commit.MANIFEST).exists():
        return [(commit.read_manifest(run_dir)["step"], run_dir)]
    found = commit.list_committed(run_dir / "checkpoints")
    if not found:
        raise CheckpointError("no committed checkpoint here", seen=str(run_dir), do="name a run folder")
    return found


@checkpoint.command("ls")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_checkpoints(run_dir: Path, as_json: bool) -> None:
    """The committed checkpoints of a run, oldest first."""
    from dsgpt.checkpoint import commit
    from dsgpt.cli.common import print_json
    from dsgpt.units import format_bytes, format_count

    rows: list[dict[str, Any]] = []
    for step, path in _committed(run_dir):
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
            }
        )
    if as_json:
        print_json({"checkpoints": rows})
        return
    for row in rows:
        click.echo(
            f"step {row['step']:>8}  {format_count(row['consumed_tokens']):>7} tokens  {format_bytes(row['bytes']):>9}  "
            f"{row['world_size']} ranks, ZeRO {row['zero_stage']}  {row['path']}"
        )


@checkpoint.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--size-only", is_flag=True, help="Compare sizes, not hashes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(run_dir: Path, size_only: bool, as_json: bool) -> None:
    """Check every committed checkpoint of a run, or one checkpoint folder, against its manifest. 65 if any is bad."""
    from dsgpt.checkpoint import commit
    from dsgpt.cli.common import print_json

    results = {str(path): commit.verify(path, "size" if size_only else "hash") for _, path in _committed(run_dir)}
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
@click.argument("model")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet.")
@click.option("--no-check", is_flag=True, help="Do not load the export back to compare logits.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(model: str, output: Path, no_check: bool, as_json: bool) -> None:
    """Write MODEL (a run folder, RUN@STEP or a checkpoint) in Hugging Face format, checked against transformers.

    A model that no Hugging Face architecture holds is written in dsgpt's own format.
    """
    from dsgpt.checkpoint.export import export_checkpoint
    from dsgpt.checkpoint.weights import find_model
    from dsgpt.cli.common import print_json
    from dsgpt.units import format_count

    report = export_checkpoint(find_model(model), output, check=not no_check)
    if as_json:
        print_json(vars(report))
        return
    click.echo(f"{report.path}: {report.architecture}, {format_count(report.num_parameters)} parameters")
    if report.logit_difference is not None:
        click.echo(
            f"logits agree with those {report.checked_with} reads: largest difference {report.logit_difference:.2g}"
        )
