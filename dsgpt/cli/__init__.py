"""The `dsgpt` command. Each verb lives in its own file and is imported when it is used, so `dsgpt --help` is quick.

Errors of dsgpt's own kind print what, seen and do, without a traceback (`--debug` shows it), and set the exit code.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from typing import Any

import click

from dsgpt import __version__
from dsgpt.errors import DsgptError, ExitCode

# verb: (module:attribute, one line of help). The help is here so that listing verbs imports none of them.
VERBS = {
    "quickstart": (
        "dsgpt.cli.quickstart:quickstart",
        "The whole pipeline on this machine, on text that is already here.",
    ),
    "fetch": ("dsgpt.cli.fetch:fetch", "Download a model or a data set, for machines without internet."),
    "tokenizer": ("dsgpt.cli.tokenizer:tokenizer", "Train a tokenizer."),
    "data": ("dsgpt.cli.data:data", "Prepare, inspect and verify datasets."),
    "train": ("dsgpt.cli.train:train", "Train, or continue training, the run a config describes."),
    "submit": ("dsgpt.cli.submit:submit", "Queue a run on SLURM: checked, committed, requeued and resumed by itself."),
    "status": ("dsgpt.cli.status:status", "How a run stands, or how it ended and what to type next."),
    "logs": ("dsgpt.cli.logs:logs", "The logs of a run's newest start."),
    "cancel": ("dsgpt.cli.cancel:cancel", "Take a run's jobs out of the queue."),
    "verify-resume": (
        "dsgpt.cli.verify_resume:verify_resume",
        "Prove on this machine that a run that is killed and resumed is the run it was.",
    ),
    "evaluate": ("dsgpt.cli.evaluate:evaluate", "Loss, perplexity and bits per byte of a model."),
    "generate": ("dsgpt.cli.generate:generate", "Continue prompts with a model."),
    "chat": ("dsgpt.cli.chat:chat", "Talk with a model in the terminal."),
    "serve": ("dsgpt.cli.serve:serve", "A model behind OpenAI's HTTP API."),
    "application": (
        "dsgpt.cli.application:application",
        "Customer support, news summarisation, legal documents: from public data to a table.",
    ),
    "checkpoint": ("dsgpt.cli.checkpoint:checkpoint", "List, verify, compare, delete and export checkpoints."),
    "config": ("dsgpt.cli.config:config", "List, copy, show, explain and validate configs."),
    "doctor": ("dsgpt.cli.doctor:doctor", "What would go wrong on this machine, and the fix."),
}


class LazyGroup(click.Group):
    """Imports a verb's module only when that verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, help_line) for verb, (_, help_line) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsgpt")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train GPT models on DeepSpeed, from scratch or from existing weights, with one config and one code path."""
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: run the command line and leave with the contract's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(arguments, prog_name="dsgpt")
    except BrokenPipeError:
        sys.exit(1)  # whoever read our output has left
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        click.echo(f"error: out of device memory\n  seen: {str(error).splitlines()[0]}\n  do:   fewer rows at a time, or a "
                   "lower precision", err=True)  # fmt: skip
        sys.exit(int(ExitCode.OUT_OF_MEMORY))
    except (DsgptError, OSError) as error:
        code = error.exit_code if isinstance(error, DsgptError) else ExitCode.LOCKED
        if "--debug" in arguments:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        if "--json" in arguments:
            click.echo(json.dumps({"exit_code": int(code), "message": str(error)}))
        sys.exit(int(code))
