"""`dsgpt data`: prepare, inspect and verify datasets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsgpt.units import format_bytes, format_count, format_seconds, parse_fraction

if TYPE_CHECKING:
    from dsgpt.data.manifest import DatasetManifest
    from dsgpt.data.prepare import Progress


class Share(click.ParamType):
    """0.5% or 0.005."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_fraction(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group()
def data() -> None:
    """Prepare, inspect and verify datasets."""


@data.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--tokenizer", required=True, help="Tokenizer folder, or hf:NAME.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Dataset folder to write.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core this process may use]")
@click.option(
    "--validation",
    type=Share(),
    default="0",
    show_default=True,
    help="Share of the documents to set aside, chosen by the hash of their text, e.g. 0.5%.",
)
@click.option("--text-field", default="text", show_default=True, help="Field of a .jsonl record that holds the text.")
@click.option(
    "--documents",
    type=click.Choice(["file", "blank-line", "line"]),
    default="file",
    show_default=True,
    help="What a document is in .txt files.",
)
@click.option(
    "--max-bad-fraction",
    type=Share(),
    default="0.1%",
    show_default=True,
    help="Fail if more of the records than this cannot be read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def prepare(inputs: tuple[str, ...], output: Path, workers: int | None, as_json: bool, **settings: Any) -> None:
    """Tokenise INPUT (files, folders and globs of .txt and .jsonl) into a dataset. Run again to continue."""
    import os

    from dsgpt.data.prepare import prepare as run

    with _bar() as progress:
        manifest = run(
            inputs, output=output, workers=workers or len(os.sched_getaffinity(0)), progress=progress, **settings
        )
    if as_json:
        click.echo(manifest.model_dump_json(exclude={"sources"}))
        return
    _print_counts(output, manifest)
    if settings["validation"] and "validation" not in manifest.splits:
        click.echo("warning: no document was set aside for validation; ask for a larger share or smaller --documents")
    click.echo(f"next: dsgpt train RUN.yaml data.train='[{{path: {output}}}]'")


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Documents to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def inspect(folder: Path, samples: int, as_json: bool) -> None:
    """Show counts, document lengths, common tokens and decoded samples of a dataset."""
    from dataclasses import asdict

    from dsgpt.data.manifest import load_manifest
    from dsgpt.data.verify import inspect_split

    manifest = load_manifest(folder)
    summaries = {name: inspect_split(folder, name, samples) for name in manifest.splits}
    if as_json:
        import json

        click.echo(json.dumps({name: asdict(summary) for name, summary in summaries.items()}))
        return
    _print_counts(folder, manifest)
    for name, summary in summaries.items():
        click.echo(f"\n{name}: documents of {summary.shortest} to {summary.longest} tokens")
        most = max((count for _, count in summary.histogram), default=1)
        for bound, count in summary.histogram:
            click.echo(f"  < {bound:>9,} tokens  {count:>9,}  {'#' * round(40 * count / most)}")
        click.echo("  most common: " + " ".join(repr(text) for text, _ in summary.common[:12]))
        for sample in summary.samples:
            click.echo(f"  --- {sample!r}")


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(folder: Path, as_json: bool) -> None:
    """Check every hash, count and token id of a dataset. Exit code 65 if anything is wrong."""
    from dsgpt.data.verify import verify_dataset
    from dsgpt.errors import DataError

    problems = verify_dataset(folder)
    if as_json:
        import json

        click.echo(json.dumps({"folder": str(folder), "problems": [vars(problem) for problem in problems]}))
    if problems:
        raise DataError(problems=problems)
    if not as_json:
        click.echo(f"{folder}: sound")


def _print_counts(folder: Path, manifest: DatasetManifest) -> None:
    click.echo(f"{folder}: {len(manifest.sources)} source files, vocabulary {manifest.tokenizer.vocab_size}")
    for name, split in manifest.splits.items():
        click.echo(
            f"  {name:<10} {split.documents:>12,} documents {split.tokens:>16,} tokens "
            f"{format_bytes(split.text_bytes):>11} of text, {split.text_bytes / split.tokens:.2f} bytes per token"
        )
    if manifest.bad_lines.count:
        click.echo(f"  {manifest.bad_lines.count:,} records could not be read: {folder / str(manifest.bad_lines.file)}")
    if manifest.empty_documents:
        click.echo(f"  {manifest.empty_documents:,} records without text were left out")


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    start: dict[str, float] = {}
    told = time.monotonic()

    def describe(state: Any) -> str:
        # The clock starts when the phase does, and does not count what an earlier start has done.
        seconds = time.monotonic() - start.setdefault(state.phase, time.monotonic())
        fresh = state.done.num_bytes - state.resumed_bytes
        rate = f"{fresh / 1e6 / seconds:.1f} MB/s" if seconds > 0.5 else "- MB/s"
        parts = [rate]
        if state.phase == "tokenize":
            parts += [f"{format_count(state.done.tokens)} tokens", f"{format_count(state.done.documents)} documents"]
        if state.done.bad_lines:
            parts.append(f"{state.done.bad_lines} bad")
        return ", ".join(parts)

    if not console.is_terminal:

        def tell_line(state: Any) -> None:
            nonlocal told
            text = describe(state)
            finished = state.done.num_bytes == state.total_bytes
            if time.monotonic() - told > 10 or (finished and state.phase == "tokenize"):
                told = time.monotonic()
                passed = format_seconds(told - start[state.phase])
                share = state.done.num_bytes / max(1, state.total_bytes)
                click.echo(
                    f"{state.phase}: {share:.0%} of {format_bytes(state.total_bytes)}, {text}, {passed}", err=True
                )

        yield tell_line
        return

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def tell_bar(state: Any) -> None:
            if state.phase not in tasks:
                tasks[state.phase] = bars.add_task(state.phase, total=state.total_bytes, text="")
            bars.update(tasks[state.phase], completed=state.done.num_bytes, text=describe(state))

        yield tell_bar
