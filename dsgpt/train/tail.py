"""The ends of a run's metrics.jsonl and events.jsonl, however long these files are. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def last_lines(path: Path, max_bytes: int) -> list[dict[str, Any]]:
    """The whole lines in the last `max_bytes` of a file of JSON objects, oldest first, but for those that cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            data = file.read(max_bytes)
    except OSError:
        return []
    lines = data.split(b"\n")
    found = []
    for line in lines if size <= max_bytes else lines[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut short by a crash, or being written just now
        if isinstance(entry, dict):
            found.append(entry)
    return found
