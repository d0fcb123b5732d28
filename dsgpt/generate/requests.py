"""Prompts as people write them: plain lines, or JSON lines with a `prompt` or with `messages`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsgpt.errors import DataError
from dsgpt.generate.chat import Chat
from dsgpt.generate.text import Prompt, text_prompt
from dsgpt.tokenizer.tokenizer import Tokenizer


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The records of a file, blank lines left out. Raises DataError for a line that is no record, and for other than UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("the prompts are not UTF-8", seen=f"{path}: {error}", do="convert them with iconv") from error
    # Not splitlines: JSON strings may hold U+2028 and others.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return [{"prompt": line.rstrip("\r")} for _, line in lines]
    return [_record(line, f"{path}:{number}") for number, line in lines]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError("a line is not JSON", seen=f"{where}: {error}", do="write one object on each line") from error
    if not isinstance(found, dict) or not (isinstance(found.get("prompt"), str) or "messages" in found):
        raise DataError(
            "a line is no prompt", seen=f"{where}: {line[:80]}", do='write {"prompt": "..."} or {"messages": [...]}'
        )
    return found


def prompts_of(records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: str | None = None) -> list[Prompt]:
    """Of each `prompt`, continued as text, or `messages`, answered by the tokenizer's chat template or `template`."""
    chat = Chat(tokenizer, template) if any("messages" in record for record in records) else None
    return [
        chat.prompt(record["messages"], record.get("tools"))
        if chat is not None and "messages" in record
        else text_prompt(tokenizer, record["prompt"])
        for record in records
    ]
