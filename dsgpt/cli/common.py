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
    click.echo(json.dumps(_finite(value), indent=indent, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal, while something takes seconds to minutes."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield
