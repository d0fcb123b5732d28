"""`dsgpt data prepare-chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsgpt.cli.preparing import Numbers, ShardOf, Share, command_line, print_counts, print_unfinished, progress_bar


@click.command("prepare-chat")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--tokenizer", required=True, help="Tokenizer folder, or hf:NAME.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Dataset folder to write.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core this process may use]")
@click.option(
    "--format",
    type=click.Choice(["auto", "messages", "sharegpt", "alpaca", "completion", "pairs"]),
    default="auto",
    show_default=True,
    help="What the records are; auto looks at the first thousand.",
)
@click.option(
    "--fields",
    metavar="TEXT,ANSWER",
    help="Of pairs and completions: the fields of text and answer; without --format they mean pairs.",
)
@click.option("--instruction", default="", help="What is asked of each text of a pair, e.g. 'Summarise:'.")
@click.option("--seq-length", type=click.IntRange(min=2), help="training.seq_length: what is longer is left out.")
@click.option(
    "--too-long",
    type=click.Choice(["drop", "truncate", "refuse"]),
    default="drop",
    show_default=True,
    help="What to do with conversations above --seq-length.",
)
@click.option("--loss-on", type=click.Choice(["assistant", "all"]), default="assistant", show_default=True)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Jinja file.  [default: the tokenizer's, or ChatML]",
)
@click.option(
    "--add-tokens",
    multiple=True,
    metavar="TEXT",
    help="Add a special token that the tokenizer lacks, e.g. <|im_end|> (may be given several times); the model grows.",
)
@click.option(
    "--validation", type=Share(), default="0", show_default=True, help="Share of the conversations to set aside."
)
@click.option("--max-bad-fraction", type=Share(), default="0.1%", show_default=True, help="Fail above this share.")
@click.option("--shard", type=ShardOf(), help="Do the i-th of n shares of the work.")
@click.option("--parts", type=Numbers(), help="Do these parts alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def prepare_chat(
    inputs: tuple[str, ...], tokenizer: str, output: Path, as_json: bool, fields: str | None, **options: Any
) -> None:
    """Turn conversations and instructions into a dataset with a loss mask. Run again to continue.

    INPUT are .jsonl, .json, .csv, .tsv, .parquet, .arrow files (also compressed), folders, globs, hf:NAME or -.
    """
    import os

    from dsgpt.data.chat import ChatChoices
    from dsgpt.data.chat import prepare_chat as run
    from dsgpt.data.choices import Share as Parts
    from dsgpt.data.choices import Unfinished
    from dsgpt.data.packing import open_chat

    index, count = options.pop("shard") or (0, 1)
    share = Parts(index, count, options.pop("parts") or ())
    workers = options.pop("workers") or len(os.sched_getaffinity(0))
    template = options.pop("chat_template")
    pair = None if fields is None else tuple(name.strip() for name in fields.split(","))
    if pair is not None and len(pair) != 2:
        raise click.BadParameter("give two names: TEXT,ANSWER", param_hint="--fields")
    choices = ChatChoices(
        workers=workers,
        share=share,
        fields=pair,
        chat_template=None if template is None else template.read_text("utf-8"),
        command=command_line("prepare-chat"),
        **options,
    )
    with progress_bar() as progress:
        done = run(inputs, tokenizer, output, choices, progress, lambda text: click.echo(text, err=True))
    if isinstance(done, Unfinished):
        print_unfinished(done, output, as_json)
    elif as_json:
        click.echo(done.model_dump_json(exclude={"sources"}))
    else:
        print_counts(output, done)
        for name, split in done.splits.items():
            learned = sum(shard.trained_tokens or 0 for shard in split.shards)
            click.echo(f"  {name:<10} loss on {learned:,} of {split.tokens:,} tokens ({learned / split.tokens:.0%})")
            if choices.seq_length is not None:
                rows = open_chat(output, name, choices.seq_length).packing
                click.echo(f"  {'':<10} packed into {len(rows):,} rows that are {rows.utilisation:.1%} full")
        click.echo(f"next: dsgpt train RUN.yaml data.train='[{{path: {output}}}]'")
