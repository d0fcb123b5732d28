"""`dsgpt fetch hf:NAME | dataset:NAME --output DIR`: download, on a machine that has internet."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="hf:NAME | dataset:NAME")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A folder that is new or empty.")
@click.option("--revision", help="A branch, a tag or a commit; default: the main branch as it is now.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only such files of a data set: 'sample/10BT/*'.")
@click.option("--trust-checkpoint", is_flag=True, help="Take pickled weights, where there are no others.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fetch(
    source: str, output: Path, revision: str | None, include: tuple[str, ...], trust_checkpoint: bool, as_json: bool
) -> None:
    """Download a model or a data set of the Hugging Face hub, for machines without internet.

    Of a model: safetensors, config, tokenizer, chat template, licence; never code. Of a data set: the files that `dsgpt data
    prepare` reads. Space is checked first and every hash afterwards. The folder appears when all is there; run again after
    an interruption, the command goes on. A token is read from HF_TOKEN or what `hf auth login` left.
    """
    from dsgpt import fetch as fetching
    from dsgpt.cli.common import print_json
    from dsgpt.units import format_bytes

    if include and source.startswith("hf:"):
        raise click.UsageError("--include is for data sets; of a model dsgpt knows what it needs")
    found = fetching.fetch(source, output, revision, include, trust_checkpoint, lambda text: click.echo(text, err=True))
    if as_json:
        print_json({"source": source, **vars(found)})
        return
    total = f"{found.num_files} files, {format_bytes(found.num_bytes)}"
    click.echo(
        f"{'is there already' if found.was_there else 'fetched'}  {found.path}: {total}, commit {found.revision}"
    )
    if found.left_out:
        click.echo(f"left out  {fetching.name_some(found.left_out)}")
    option = f"model.init_from=hf:{output}" if source.startswith("hf:") else f"dsgpt data prepare {output} …"
    click.echo(f"use it    {option}")
