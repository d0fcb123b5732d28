"""What `dsgpt data prepare` and `prepare-chat` have in common: kinds of options, progress, and what is said at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dsgpt.units import format_bytes, format_count, format_seconds, parse_fraction

if TYPE_CHECKING:
    from dsgpt.data.choices import Progress, Unfinished
    from dsgpt.data.manifest import DatasetManifest


class Share(click.ParamType):
    """0.5% or 0.005."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_fraction(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ShardOf(click.ParamType):
    """3/64."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        index, slash, count = str(value).partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            self.fail(f"{value!r} is not i/n with i from 0 to n - 1", param, ctx)
        return int(index), int(count)


class Numbers(click.ParamType):
    """3,17,18."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not all(number.isdecimal() for number in str(value).split(",")):
            self.fail(f"{value!r} is not a list of numbers such as 3,17", param, ctx)
        return tuple(map(int, str(value).split(",")))


def command_line(verb: str) -> tuple[str, ...]:
    """This command, without what chooses parts of the work."""
    context = click.get_current_context()
    words = ["dsgpt", "data", verb]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if name == "inputs":
            words += value
        elif given and name not in ("shard", "parts", "as_json"):
            values = value if isinstance(value, tuple) else (value,)
            words += [word for one in values for word in (parameter.opts[0], *([] if one is True else [str(one)]))]
    return tuple(words)


def print_unfinished(left: Unfinished, output: Path, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps({"missing": left.missing, "step": "compare" if left.hashed else "tokenize"}))
    elif left.hashed:
        click.echo(
            f"this share is compared; {len(left.missing)} parts of other shares are not yet: when those tasks have ended, "
            "run all of them once more"
        )
    else:
        click.echo(
            f"this share is done; {len(left.missing)} parts of other shares are missing. The last task writes dataset.json; "
            f"dsgpt data finish {output} says what is missing still"
        )


def print_counts(folder: Path, manifest: DatasetManifest) -> None:
    click.echo(f"{folder}: {len(manifest.sources)} source files, vocabulary {manifest.tokenizer.vocab_size}")
    for name, split in manifest.splits.items():
        click.echo(
            f"  {name:<10} {split.documents:>12,} documents {split.tokens:>16,} tokens "
            f"{format_bytes(split.text_bytes):>11} of text, {split.text_bytes / split.tokens:.2f} bytes per token"
        )
    if manifest.bad_lines.count:
        click.echo(f"  {manifest.bad_lines.count:,} records could not be read: {folder / str(manifest.bad_lines.file)}")
    if manifest.empty_documents:
        click.echo(f"  {manifest.empty_documents:,} records without text were left out")
    for name, number in manifest.left_out.items():
        what = "were truncated" if name == "truncated" else f"were left out: {name}"
        click.echo(f"  {number:,} documents {what}")
    if manifest.duplicates:
        click.echo(f"  {manifest.duplicates:,} documents were left out because they equal an earlier one")
    if manifest.special_in_text:
        click.echo(
            f"  {manifest.special_in_text:,} times a text looks like a special token; it was encoded as plain text"
        )
    if manifest.engine is not None:
        why = f" ({manifest.engine.fallback})" if manifest.engine.fallback else ""
        click.echo(f"  encoded by {manifest.engine.name}{why}")


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    start: dict[str, float] = {}
    told, finished = time.monotonic(), False

    def describe(state: Any) -> str:
        # The clock starts when the phase does, and does not count what an earlier start has done.
        seconds = time.monotonic() - start.setdefault(state.phase, time.monotonic())
        fresh = state.done.num_bytes - state.resumed_bytes
        rate = f"{fresh / 1e6 / seconds:.1f} MB/s" if seconds > 0.5 else "- MB/s"
        parts = [rate]
        if state.phase == "tokenize":
            parts += [f"{format_count(state.done.tokens)} tokens", f"{format_count(state.done.documents)} documents"]
        if state.done.bad_lines:
            parts.append(f"{state.done.bad_lines} bad")
        return ", ".join(parts)

    if not console.is_terminal:

        def tell_line(state: Any) -> None:
            nonlocal told, finished
            text = describe(state)
            was_finished, finished = finished, state.done.num_bytes == state.total_bytes
            if time.monotonic() - told > 10 or (finished and not was_finished and state.phase == "tokenize"):
                told = time.monotonic()
                passed = format_seconds(told - start[state.phase])
                share = state.done.num_bytes / max(1, state.total_bytes)
                click.echo(
                    f"{state.phase}: {share:.0%} of {format_bytes(state.total_bytes)}, {text}, {passed}", err=True
                )

        yield tell_line
        return

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def tell_bar(state: Any) -> None:
            if state.phase not in tasks:
                tasks[state.phase] = bars.add_task(state.phase, total=state.total_bytes, text="")
            bars.update(tasks[state.phase], completed=state.done.num_bytes, text=describe(state))

        yield tell_bar
