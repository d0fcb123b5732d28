"""`dsgpt tokenizer`: train a tokenizer on text files."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--vocab-size", type=click.IntRange(min=1), required=True, help="Number of tokens, special ones included."
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--kind",
    type=click.Choice(["sentencepiece-bpe", "sentencepiece-unigram", "hf-bpe"]),
    default="sentencepiece-bpe",
    show_default=True,
    help="hf-bpe is byte-level BPE as GPT-2 has it.",
)
@click.option(
    "--sample-megabytes",
    type=click.FloatRange(min=0.001),
    default=10.0,
    show_default=True,
    help="Text drawn uniformly from the inputs to train on.",
)
@click.option("--seed", type=int, default=1234, show_default=True, help="Decides which text is drawn.")
@click.option(
    "--text-field", default="text", show_default=True, help="Field of a record that holds the text, or a template."
)
@click.option("--add-tokens", multiple=True, metavar="TEXT",
              help="A special token beside those of --vocab-size, e.g. <|im_end|>; may be given several times.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def train(
    inputs: tuple[str, ...],
    vocab_size: int,
    output: Path,
    kind: str,
    sample_megabytes: float,
    seed: int,
    text_field: str,
    add_tokens: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a tokenizer on INPUT: files, folders, globs and hf:NAME, as `dsgpt data prepare` reads them."""
    import json
    from typing import cast

    from dsgpt.data.train_tokenizer import train_tokenizer
    from dsgpt.tokenizer.training import RECORD, Kind

    trained = train_tokenizer(
        inputs,
        vocab_size=vocab_size,
        output=output,
        kind=cast(Kind, kind),
        sample_bytes=round(sample_megabytes * 1e6),
        seed=seed,
        text_field=text_field,
        progress=lambda message: click.echo(message, err=True),
    )
    if add_tokens:
        trained = trained.with_special_tokens(add_tokens)
        trained.save(output)
    record = json.loads((output / RECORD).read_text("utf-8"))
    if as_json:
        click.echo(json.dumps({"output": str(output), **record}))
        return
    sample = record["sample"]
    click.echo(
        f"{output}: {trained.vocab_size} tokens, {record['measured']['bytes_per_token']} bytes per token, "
        f"trained on {sample['bytes'] / 1e6:.1f} of {sample['corpus_bytes'] / 1e6:.1f} MB"
    )
    if sample["bad_lines"]:
        click.echo(f"{sample['bad_lines']} lines could not be read and were left out")
    click.echo(f"next: dsgpt data prepare {' '.join(inputs)} --tokenizer {output} --output DIR")
