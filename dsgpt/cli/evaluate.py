"""`dsgpt evaluate MODEL (--text FILE… | --data DIR)`: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from pathlib import Path

import click


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A text file, evaluated as one document; may be given several times.")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A prepared dataset.")
@click.option("--split", default="validation", show_default=True, help="Which split of --data.")
@click.option("--samples", type=click.IntRange(1), help="Only the first so many sequences of --data.")
@click.option("--trust-checkpoint", is_flag=True, help="Read pytorch_model.bin too, which may execute code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    data: Path | None,
    split: str,
    samples: int | None,
    trust_checkpoint: bool,
    as_json: bool,
) -> None:
    """Evaluate MODEL: a run folder (RUN@STEP for an older commit), a checkpoint, or a Hugging Face folder.

    Loss is the mean in nats per token. A document starts with BOS where the tokenizer has one.
    """
    if bool(texts) == bool(data):
        raise click.UsageError("give --text FILE (one or more) or --data DIR, not both")
    from dsgpt.checkpoint.weights import find_model, load_model
    from dsgpt.cli.common import print_json, waiting
    from dsgpt.evaluate import evaluate_dataset, evaluate_texts
    from dsgpt.tokenizer import Tokenizer

    location = find_model(model)
    network, tokenizer = load_model(location, trust=trust_checkpoint), Tokenizer.load(location.tokenizer)
    with waiting("evaluating"):
        if data is not None:
            result = evaluate_dataset(network, tokenizer, data, split, samples)
        else:
            result = evaluate_texts(network, tokenizer, [_read(path) for path in texts])
    if as_json:
        print_json({"model": str(location.path), **result.as_dict()})
        return
    click.echo(f"loss           {result.loss:.4f} nats per token")
    click.echo(f"perplexity     {result.perplexity:.3f}")
    if not math.isnan(result.bits_per_byte):  # chats, and files that do not say how much text they hold, have none
        click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    click.echo(f"tokens         {result.tokens}")


def _read(path: Path) -> str:
    from dsgpt.errors import DataError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8", seen=f"{path}: {error}", do="convert it first, e.g. with iconv"
        ) from error
