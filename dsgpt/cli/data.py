"""`dsgpt data`: prepare, inspect and verify datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsgpt.cli.chat_data import prepare_chat
from dsgpt.cli.preparing import Numbers, ShardOf, Share, command_line, print_counts, print_unfinished, progress_bar
from dsgpt.units import format_bytes

if TYPE_CHECKING:
    from dsgpt.data.forecast import Forecast
    from dsgpt.data.summary import Span


@click.group()
def data() -> None:
    """Prepare, inspect and verify datasets."""


data.add_command(prepare_chat)


def _filter_options(command: Any) -> Any:
    """Documents to leave out; the names are those of dsgpt.data.filters.Filters."""
    for name, kind, text in (
        ("--max-line-chars", int, "Leave out documents whose lines are longer on average."),
        ("--max-repeated-lines", Share(), "Leave out documents in which more of the lines repeat earlier ones."),
        ("--min-letters", Share(), "Leave out documents with a lower share of letters."),
        ("--max-chars", int, "Leave out longer documents."),
        ("--min-chars", int, "Leave out shorter documents."),
    ):
        command = click.option(name, type=kind, help=text)(command)
    for name, text in (("--exclude", "in which this is found"), ("--include", "in which none of these is found")):
        text = f"Leave out documents {text} (regular expression; may be given several times)."
        command = click.option(name, multiple=True, metavar="REGEX", help=text)(command)
    return command


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
@click.option(
    "--text-field",
    default="text",
    show_default=True,
    help="Field or column that holds the text, or a template such as '{title}\\n\\n{body}'.",
)
@click.option(
    "--documents",
    type=click.Choice(["file", "blank-line", "line"]),
    default="file",
    show_default=True,
    help="What a document is in .txt files.",
)
@_filter_options
@click.option("--deduplicate", is_flag=True, help="Leave out documents that equal an earlier one.")
@click.option(
    "--max-bad-fraction",
    type=Share(),
    default="0.1%",
    show_default=True,
    help="Fail if more of the records than this cannot be read.",
)
@click.option(
    "--engine", type=click.Choice(["auto", "reference"]), default="auto", show_default=True, help="What encodes."
)
@click.option("--shard", type=ShardOf(), help="Do the i-th of n shares of the work, in any order, on any machine.")
@click.option("--parts", type=Numbers(), help="Do these parts alone (`dsgpt data finish` names missing ones).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def prepare(inputs: tuple[str, ...], tokenizer: str, output: Path, as_json: bool, **options: Any) -> None:
    """Tokenise INPUT into a dataset. Run again to continue.

    INPUT are files, folders, globs, `datasets.save_to_disk` folders, hf:NAME or - for standard input. Read are .txt,
    .jsonl, .json, .csv and .tsv (also .gz, .zst, .bz2, .xz), .parquet and .arrow.
    """
    import os

    from dsgpt.data.choices import Choices, Share, Unfinished
    from dsgpt.data.filters import Filters
    from dsgpt.data.prepare import prepare_share

    names = ("min_chars", "max_chars", "include", "exclude", "min_letters", "max_repeated_lines", "max_line_chars")
    filters = Filters(**{name: options.pop(name) for name in names})
    index, count = options.pop("shard") or (0, 1)
    share = Share(index, count, options.pop("parts") or ())
    workers = options.pop("workers") or len(os.sched_getaffinity(0))
    choices = Choices(workers=workers, filters=filters, share=share, command=command_line("prepare"), **options)
    with progress_bar() as progress:
        done = prepare_share(inputs, tokenizer, output, choices, progress, lambda found: _announce(found, output))
    if isinstance(done, Unfinished):
        print_unfinished(done, output, as_json)
        return
    if as_json:
        click.echo(done.model_dump_json(exclude={"sources"}))
        return
    print_counts(output, done)
    if choices.validation and "validation" not in done.splits:
        click.echo("warning: no document was set aside for validation; ask for a larger share or smaller --documents")
    click.echo(f"next: dsgpt train RUN.yaml data.train='[{{path: {output}}}]'")


def _announce(found: Forecast, output: Path) -> None:
    click.echo(f"forecast: {found}", err=True)
    if found.bytes > found.free_bytes:
        click.echo(
            f"warning: {output} has {format_bytes(found.free_bytes)} free and about {format_bytes(found.bytes)} are to be "
            "written; the work will stop when the disk is full, and go on where it stopped",
            err=True,
        )


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def finish(folder: Path, as_json: bool) -> None:
    """Write dataset.json where all parts are done, or name the missing ones and the command that does them."""
    from dsgpt.data.finish import finish as run

    manifest = run(folder)
    if as_json:
        click.echo(manifest.model_dump_json(exclude={"sources"}))
    else:
        print_counts(folder, manifest)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Documents to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def inspect(folder: Path, samples: int, as_json: bool) -> None:
    """Show counts, document lengths, common tokens and decoded samples of a dataset."""
    from dataclasses import asdict

    from dsgpt.data.manifest import load_manifest
    from dsgpt.data.summary import inspect_split

    manifest = load_manifest(folder)
    summaries = {name: inspect_split(folder, name, samples) for name in manifest.splits}
    if as_json:
        import json

        click.echo(json.dumps({name: asdict(summary) for name, summary in summaries.items()}))
        return
    print_counts(folder, manifest)
    for name, summary in summaries.items():
        click.echo(f"\n{name}: documents of {summary.shortest} to {summary.longest} tokens")
        most = max((count for _, count in summary.histogram), default=1)
        for bound, count in summary.histogram:
            click.echo(f"  < {bound:>9,} tokens  {count:>9,}  {'#' * round(40 * count / most)}")
        click.echo("  most common: " + " ".join(repr(text) for text, _ in summary.common[:12]))
        if summary.trained_tokens != summary.tokens:
            click.echo(f"  learned from: {summary.trained_tokens:,} of {summary.tokens:,} tokens")
        for sample in summary.samples:
            click.echo("  --- " + "".join(_coloured(span) for span in sample))
    click.echo(
        "\n"
        + click.style("document edge", fg="black", bg="yellow")
        + " "
        + click.style("learned from", fg="green")
        + " "
        + click.style("[only read]", dim=True)
    )


def _coloured(span: Span) -> str:
    """A span for a terminal; where colours are taken off again, brackets and backslashes still tell the kinds apart."""
    text = repr(span.text)[1:-1]
    if span.kind == "boundary":
        return click.style(f"|{text}|", fg="black", bg="yellow")
    return click.style(text, fg="green") if span.kind == "learned" else click.style(f"[{text}]", dim=True)


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
