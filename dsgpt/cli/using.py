"""Options and loading that the verbs share which use a trained model: evaluate, generate, chat, serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsgpt.checkpoint.inference import Loaded
    from dsgpt.generate.sampling import Sampling

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_options: list[Decorator] = [
    click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True),
    click.option(
        "--dtype",
        type=click.Choice(("auto", "fp32", "bf16", "fp16")),
        default="auto",
        show_default=True,
        help="Of the weights; auto: bf16 on a GPU that has it, else fp32.",
    ),
    click.option("--trust-checkpoint", is_flag=True, help="Read pytorch_model.bin too, which may execute code."),
]

sampling_options: list[Decorator] = [
    click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1)),
    click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0: the likeliest."),
    click.option(
        "--top-k", default=50, show_default=True, type=click.IntRange(0), help="Of so many tokens; 0: of all."
    ),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True),
        help="Of the likeliest tokens that make up this probability.",
    ),
    click.option(
        "--repetition-penalty",
        default=1.0,
        show_default=True,
        type=click.FloatRange(0.01, 100),
        help="Above 1, what was there already becomes less likely.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End where this comes; may be given several times."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(-(2**63), 2**63 - 1)),
]


def with_options(*groups: list[Decorator]) -> Decorator:
    """Add options to a command, in their order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def load(model: str, device: str, dtype: str, trust_checkpoint: bool) -> Loaded:
    from dsgpt.checkpoint.inference import load_for_use
    from dsgpt.cli.common import waiting

    with waiting("loading the model"):
        return load_for_use(model, device, dtype, trust_checkpoint)


def read_sampling(stop: tuple[str, ...], **values: Any) -> Sampling:
    """Raises UsageError for an empty stop string, which would end every text at once."""
    from dsgpt.generate.sampling import Sampling

    if "" in stop:
        raise click.UsageError("--stop needs a text: an empty one would end everything at once")
    return Sampling(stop=stop, **values)


def read_template(given: str | None) -> str | None:
    """The text of --chat-template: a file's, or the name of the shipped one."""
    from pathlib import Path

    if given is None or given == "chatml":
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--chat-template is neither chatml nor a Jinja file: {error}") from error
