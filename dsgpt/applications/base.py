"""A small pretrained model, made from plain texts: tokenizer, data, training, export; each a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dsgpt.commands import Commands, fingerprint, keep_options, write_text
from dsgpt.data.chat_template import CHATML

VOCAB_SIZE = 4096
EXPORT = "export"


def make_base(
    texts: list[str], folder: Path, overrides: tuple[str, ...] = (), vocab_size: int = VOCAB_SIZE
) -> dict[str, Any]:
    """All stages into `folder`, those that are done left out; what the export says of itself.

    The tokenizer has the tokens of ChatML from the beginning, so that tuning adds none.
    """
    commands = Commands(f"dsgpt application base … --output-dir {folder}")
    tokenizer, data, run, export = (folder / name for name in ("tokenizer", "data", "run", EXPORT))
    report = folder / "export.json"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"texts": [fingerprint(text) for text in texts], "vocab_size": vocab_size, "overrides": list(overrides)}
    keep_options(folder / "base.json", options, commands.again)
    if report.exists():
        return dict(json.loads(report.read_text("utf-8")))
    if not (tokenizer / "tokenizer_training.json").exists():
        tokens = [word for token in CHATML for word in ("--add-tokens", token)]
        commands.run(
            "tokenizer", "tokenizer", "train", *texts, "--vocab-size", vocab_size, *tokens, "--output", tokenizer
        )
    if not (data / "dataset.json").exists():
        commands.run(
            "data", "data", "prepare", *texts, "--tokenizer", tokenizer, "--output", data, "--validation", "5%"
        )
    places = [f"data.train=[{{path: {json.dumps(str(data))}}}]", f"run.output_dir={run}"]
    commands.run("training", "train", "small-base", *places, *overrides)
    shutil.rmtree(export, ignore_errors=True)  # of a call that was killed before its report
    found = commands.json("exporting", "checkpoint", "export", run, "--output", export, "--json")
    write_text(report, json.dumps(found, indent=2) + "\n")
    return found
