"""What several verbs print the same way."""

from __future__ import annotations

import json
import math
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON object on stdout. Numbers that JSON does not have become null."""
    if isinstance(value, dict):
        value = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    click.echo(json.dumps(value, indent=2, default=str))
