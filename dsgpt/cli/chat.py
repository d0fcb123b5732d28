"""`dsgpt chat MODEL`: talk with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dsgpt.cli.using import model_options, sampling_options, with_options

if TYPE_CHECKING:
    from dsgpt.checkpoint.inference import Loaded
    from dsgpt.generate.chat import Chat
    from dsgpt.generate.sampling import Sampling
    from dsgpt.generate.text import Prompt

_HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@click.command()
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--chat-template", help="A Jinja file, or chatml, instead of the tokenizer's template.")
@with_options(sampling_options, model_options)
def chat(
    model: str,
    system: str | None,
    chat_template: str | None,
    device: str,
    dtype: str,
    trust_checkpoint: bool,
    **sampling: Any,
) -> None:
    """Talk with MODEL: a run folder, a checkpoint, or a Hugging Face folder whose tokenizer has a chat template.

    Where the conversation outgrows the model's context, its oldest exchanges are left out, and that is said. Lines that
    are piped in are answered one by one.
    """
    from dsgpt.cli.using import load, read_sampling, read_template

    chosen = read_sampling(**sampling)
    template = read_template(chat_template)
    loaded = load(model, device, dtype, trust_checkpoint)
    from dsgpt.generate.chat import Chat

    talk = Chat(loaded.tokenizer, template)
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    if _typed():
        click.echo(_HELP, err=True)
    for line in _lines():
        if line == "/reset":
            messages = list(begin)
        elif line.startswith("/"):
            click.echo(_HELP, err=True)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            answer = _answer(loaded, _fitting(talk, asked, len(begin), loaded, chosen), chosen)
            if answer.strip():  # else as if it had not been asked
                messages = [*asked, {"role": "assistant", "content": answer}]


def _typed() -> bool:
    """Whether a person types here; what is piped in is read as it is."""
    return sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """What is typed, until /exit or the end."""
    while True:
        try:
            if _typed():
                line = input("> ")
            elif not (line := sys.stdin.readline()):
                return
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() == "/exit":
            return
        yield line.strip()


def _fitting(talk: Chat, messages: list[dict[str, Any]], begin: int, loaded: Loaded, sampling: Sampling) -> Prompt:
    """The prompt, after the oldest exchanges were taken out of `messages` as far as an answer needs their place."""
    context, left_out = loaded.model.config.max_position_embeddings, 0
    while True:
        prompt = talk.prompt(messages)
        room = context - len(prompt.ids)
        if room >= min(sampling.max_new_tokens, context // 4) or len(messages) <= begin + 1:
            break
        del messages[begin : begin + 2]
        left_out += 1
    if left_out and room > 0:
        click.echo(f"[the context is full: the oldest {left_out} exchanges are left out]", err=True)
    return prompt


def _answer(loaded: Loaded, prompt: Prompt, sampling: Sampling) -> str:
    """Print the answer as it comes. What is longer than the context is told, and nothing is said."""
    from dsgpt.errors import DataError
    from dsgpt.generate.text import stream

    text = ""
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for piece in stream(loaded.model, loaded.tokenizer, prompt, sampling):
                text += piece
                click.echo(piece, nl=False)
                sys.stdout.flush()
    except DataError as error:
        if not _typed():
            raise
        click.echo(f"error: {error}", err=True)
    click.echo()
    return text
