"""What several verbs print the same way."""

from __future__ import annotations

import json
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))
