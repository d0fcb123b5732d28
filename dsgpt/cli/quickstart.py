"""`dsgpt quickstart`: the whole pipeline in a few minutes, on text that every machine with Python has."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--steps", type=click.IntRange(2), help="Training steps; default: those of the shipped config.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("dsgpt-quickstart"),
    show_default=True,
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def quickstart(steps: int | None, output_dir: Path, device: str) -> None:
    """Train, stop, resume, evaluate, export and use a small GPT on Python's standard library.

    Run it again to continue where it stopped, or with more --steps to train on.
    """
    from rich.console import Console
    from rich.table import Table

    from dsgpt.quickstart.pipeline import NEXT, Quickstart, summary_rows

    result = Quickstart(output_dir, steps, device).run()
    click.echo(f"\n{result['sample']}\n")
    table = Table(show_header=False, title="quickstart")
    for name, value in summary_rows(output_dir, result):
        table.add_row(name, value)
    Console(highlight=False).print(table)
    click.echo(f"\n{NEXT}")  # not through rich, which would break commands at the width of the terminal
