"""`dsgpt serve MODEL`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dsgpt.cli.using import model_options, with_options


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is every one.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--name", help="What clients call the model.  [default: the folder's name]")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Answers decoded together.")
@click.option("--max-waiting", default=256, show_default=True, type=click.IntRange(1),
              help="So many more may wait; others are answered by 429.")  # fmt: skip
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="A name under which a proxy reaches it; may be given several times.")  # fmt: skip
@click.option("--chat-template", help="A Jinja file, or chatml, instead of the tokenizer's template.")
@with_options(model_options)
def serve(
    model: str,
    host: str,
    port: int,
    name: str | None,
    batch_size: int,
    max_waiting: int,
    allowed_hosts: tuple[str, ...],
    chat_template: str | None,
    device: str,
    dtype: str,
    trust_checkpoint: bool,
) -> None:
    """Serve MODEL at /v1/chat/completions and /v1/completions: a run folder, a checkpoint, or a Hugging Face folder.

    It listens on this machine alone unless --host says otherwise. Where DSGPT_API_KEY is set, clients must send it as
    their API key. Ctrl-C or SIGTERM ends it, after the answers that are being written.
    """
    from dsgpt.cli.using import load, read_template

    try:
        from dsgpt.serve.run import bind, is_loopback
        from dsgpt.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is missing: pip install 'dsgpt[serve]'") from error
    bound = bind(host, port)
    api_key = os.environ.get("DSGPT_API_KEY")
    if not is_loopback(host) and not api_key:
        click.echo(f"anyone who reaches {host} can use the model: set DSGPT_API_KEY to ask for a key", err=True)
    loaded = load(model, device, dtype, trust_checkpoint)
    from dsgpt.generate.chat import Chat

    template = read_template(chat_template)
    chat = Chat(loaded.tokenizer, template) if template or loaded.tokenizer.chat_template else None
    if chat is None:
        click.echo(
            "the tokenizer has no chat template: /v1/chat/completions is refused, /v1/completions works", err=True
        )
    name = name or Path(model.removeprefix("hf:")).name
    run(
        loaded, name, chat, bound, batch_size, max_waiting, api_key, allowed_hosts,
        ready=lambda url: click.echo(f"serving {name} on {loaded.device} ({loaded.dtype}) at {url}"),
    )  # fmt: skip
