"""What several verbs print the same way."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import click


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON object on stdout. Numbers that JSON does not have become null."""
    if isinstance(value, dict):
        value = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    click.echo(json.dumps(value, indent=indent, default=str))


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal, while something takes seconds to minutes."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield
