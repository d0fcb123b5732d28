"""`dsgpt application prepare | base | run`: customer support, news and legal documents, from public data to a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

NAMES = ("support", "news", "legal")
_SOURCE_HELP = "What to read as what: KIND=PATH or KIND=hf:NAME; may be given several times."

_test_share = click.option(
    "--test-share",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 0.9, min_open=True),
    help="Of the conversations and documents, held out to test with; more make intervals narrower.",
)


class Pair(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not equals or not text:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text


@click.group()
def application() -> None:
    """Three applications of fine-tuning: customer support, news summarisation, legal documents."""


@application.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--source", "sources", multiple=True, type=Pair(), help=_SOURCE_HELP)
@click.option("--tokenizer", required=True, help="Tokenizer folder, or hf:NAME: what is too long is cut by its tokens.")
@click.option("--seq-length", required=True, type=click.IntRange(16), help="training.seq_length.")
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--limit", "limits", multiple=True, type=Pair(), help="KIND=N: only so many examples to train on.")
@click.option("--long-input", type=click.Choice(("lead", "refuse")), default="lead", show_default=True,
              help="Of an input longer than a sequence, what is trained on.")  # fmt: skip
@_test_share
@click.option("--seed", default=1234, show_default=True, help="Decides what is held out.")
def prepare(
    name: str,
    sources: tuple[tuple[str, str], ...],
    tokenizer: str,
    seq_length: int,
    output: Path,
    limits: tuple[tuple[str, str], ...],
    long_input: Literal["lead", "refuse"],
    test_share: float,
    seed: int,
) -> None:
    """Turn public data into conversations to train on and questions to measure with.

    \b
    support   dialogues, faq, manuals, intents
    news      articles
    legal     summaries, clauses, contracts

    The schemas are in the README. A data set of the Hub is hf:NAME, also hf:NAME:CONFIG@REVISION#SPLIT.
    """
    from dsgpt.applications import prepare as module
    from dsgpt.applications.records import Shares
    from dsgpt.tokenizer import Tokenizer

    module.prepare(
        name, _by_key(sources), output, Tokenizer.load(tokenizer), seq_length, seed, Shares(test=test_share),
        _numbers(limits), long_input, click.echo,
    )  # fmt: skip
    click.echo(f"next: dsgpt data prepare-chat {output}/train.jsonl --tokenizer {tokenizer} --seq-length {seq_length} "
               f"--output DIR")  # fmt: skip


@application.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--vocab-size", default=4096, show_default=True, type=click.IntRange(16), help="Of its tokenizer.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of the run config small-base.")
def base(texts: tuple[str, ...], output_dir: Path, vocab_size: int, overrides: tuple[str, ...]) -> None:
    """Pretrain a small model on TEXT files, to try the applications with; its export is OUTPUT_DIR/export."""
    from dsgpt.applications.base import make_base
    from dsgpt.units import format_count

    report = make_base([str(text) for text in texts], output_dir, overrides, vocab_size)
    click.echo(f"{report['path']}: {format_count(report['num_parameters'])} parameters")


@application.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--source", "sources", multiple=True, required=True, type=Pair(), help=_SOURCE_HELP)
@click.option("--base", required=True, metavar="MODEL", help="The pretrained model: a folder, a run, or hf:NAME.")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--general", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A prepared dataset of general text: what is forgotten of it.")  # fmt: skip
@click.option("--limit", "limits", multiple=True, type=Pair(), help="KIND=N: only so many examples to train on.")
@click.option("--samples", type=click.IntRange(1), help="Only so many questions of each kind.")
@click.option("--max-new-tokens", type=click.IntRange(1),
              help="Of an answer.  [default: as many as 95 % of the training answers of its kind have]")  # fmt: skip
@click.option(
    "--seq-length", type=click.IntRange(16), help="training.seq_length.  [default: the context, at most 1024]"
)
@click.option(
    "--long-input",
    type=click.Choice(("refuse", "lead", "chunk_and_merge")),
    default="lead",
    show_default=True,
    help="Of inputs longer than the context; chunk_and_merge is for questions, training examples are cut to their lead.",
)
@click.option("--no-grid", is_flag=True, help="Without the table of numbers of blocks and shares of the data.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of the run config, for all ways.")
@click.option("--rate", "rates", multiple=True, type=Pair(),
              help="WAY=RATE: learning rate of last_blocks, lora, full or scratch.")  # fmt: skip
@click.option(
    "--last-blocks", default=2, show_default=True, type=click.IntRange(1), help="So many in the way of that name."
)
@_test_share
@click.option("--seed", default=1234, show_default=True, help="Decides what is held out, and of every training.")
def run(
    name: str,
    sources: tuple[tuple[str, str], ...],
    base: str,
    output_dir: Path,
    general: Path | None,
    limits: tuple[tuple[str, str], ...],
    samples: int | None,
    max_new_tokens: int | None,
    seq_length: int | None,
    long_input: str,
    test_share: float,
    no_grid: bool,
    overrides: tuple[str, ...],
    rates: tuple[tuple[str, str], ...],
    last_blocks: int,
    seed: int,
) -> None:
    """Tune a model in several ways on one application, evaluate each, and print what was reached.

    Run it again to continue where it stopped. Each tuned model is a run in OUTPUT_DIR: last_blocks, lora, full, scratch.
    """
    from dsgpt.applications.run import Comparison

    comparison = Comparison(
        name, _by_key(sources), base, output_dir, _numbers(limits), overrides, _rates(rates), samples, max_new_tokens,
        seq_length, last_blocks, long_input, test_share, general, not no_grid, seed,
    )  # fmt: skip
    _print(comparison.run(), output_dir)


def _print(result: dict[str, Any], folder: Path) -> None:
    """The tables, which are also written as Markdown."""
    from rich.console import Console
    from rich.table import Table

    from dsgpt.applications import tables
    from dsgpt.applications.run import said_file

    made = [tables.ways_table(result)]
    facts = list(tables.facts(result))
    for kind in result["ways"]["untuned"]["kinds"]:
        said = {way: _lines(said_file(folder, way, kind)) for way in result["ways"]}
        made.append(tables.kind_table(result, kind, said))
        asked = _lines(folder / f"application/test-{kind}.jsonl")[: len(said["full"])]
        if "seen" in asked[0]:
            seen = [row["seen"] for row in asked]
            facts += filter(None, [tables.seen_line(kind, said["full"], seen, tables.main_metric(result, kind))])
    if result["cells"]:
        made.append(tables.cells_table(result))
    for title, headings, rows in made:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        click.echo()
        Console(highlight=False).print(table)
    click.echo()
    for line in facts:
        click.echo(line)
    report = folder / "report.md"
    report.write_text("\n".join([*map(tables.markdown, made), *(f"* {line}" for line in facts)]) + "\n", "utf-8")
    click.echo(f"as Markdown: {report}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _by_key(pairs: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _numbers(pairs: tuple[tuple[str, str], ...]) -> dict[str, int]:
    for key, value in pairs:
        if not value.isdecimal():
            raise click.UsageError(f"--limit {key}={value}: a number is needed")
    return {key: int(value) for key, value in pairs}


def _rates(pairs: tuple[tuple[str, str], ...]) -> dict[str, float]:
    from dsgpt.applications.run import WAYS

    found = {}
    for way, value in pairs:
        try:
            found[way] = float(value)
        except ValueError:
            raise click.UsageError(f"--rate {way}={value}: a number is needed") from None
        if way not in WAYS:
            raise click.UsageError(f"--rate {way}={value}: the ways are {', '.join(WAYS)}")
    return found
