"""`dsgpt generate MODEL --prompt TEXT`: continue prompts, many at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsgpt.cli.using import model_options, sampling_options, with_options


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True,
              help="Text to continue; '' starts from nothing; may be given several times.")  # fmt: skip
@click.option("--prompts", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A file of prompts: JSON lines with a `prompt` or `messages`, or plain lines.")  # fmt: skip
@click.option("--chat-template", help="For `messages`: a Jinja file, or chatml, instead of the tokenizer's template.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Rows decoded together.")
@with_options(sampling_options, model_options)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or for several prompts one a line.")
def generate(
    model: str,
    prompts: tuple[str, ...],
    file: Path | None,
    chat_template: str | None,
    batch_size: int,
    device: str,
    dtype: str,
    trust_checkpoint: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue each prompt with MODEL: a run folder (RUN@STEP), a checkpoint, or a Hugging Face folder.

    The same seed gives a prompt the same text, whatever the other prompts. A text ends at the model's end token, at a
    --stop text, after --max-new-tokens, or where the model's context is full.
    """
    from dsgpt.cli.using import load, read_sampling, read_template

    if bool(prompts) == bool(file):
        raise click.UsageError("give --prompt TEXT (one or more) or --prompts FILE, not both")
    chosen, template = read_sampling(**sampling), read_template(chat_template)
    records: list[dict[str, Any]] = [{"prompt": text} for text in prompts] if file is None else _read(file)
    loaded = load(model, device, dtype, trust_checkpoint)
    from dsgpt.cli.common import print_json, waiting
    from dsgpt.generate.requests import prompts_of
    from dsgpt.generate.text import complete

    made = prompts_of(records, loaded.tokenizer, template)
    with waiting("generating"):
        done = complete(loaded.model, loaded.tokenizer, made, chosen, batch_size)
    place = str(loaded.location.path)
    for record, one in zip(records, done, strict=True):
        shown = {"model": place, **record, "text": one.text, "tokens": one.tokens, "finish": one.finish}
        if as_json:
            print_json(shown, indent=2 if len(records) == 1 else None)
        else:
            click.echo(record["prompt"] + one.text if "prompt" in record else one.text)


def _read(path: Path) -> list[dict[str, Any]]:
    from dsgpt.errors import DataError
    from dsgpt.generate.requests import read_prompts

    records = read_prompts(path)
    if not records:
        raise DataError("there are no prompts in the file", seen=str(path), do="write one on each line")
    return records
