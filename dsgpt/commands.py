"""`dsgpt` commands that another one runs in turn, as a user would type them: printed, timed, ended with their code."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsgpt.errors import ConfigError, DsgptError, ExitCode
from dsgpt.process import die_with_parent


class Commands:
    """Runs commands; `again` is what continues where one stopped, `timings` the seconds of each label."""

    def __init__(self, again: str) -> None:
        self.again = again
        self.timings: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def run(self, label: str, *words: Any, meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None) -> int:
        """Run `dsgpt WORDS…` with its progress visible; returns 0, or 75 where `meanwhile` has stopped it."""
        began = time.perf_counter()
        arguments = [str(word) for word in words]
        self.say(f"\n$ dsgpt {shlex.join(arguments)}")
        process = subprocess.Popen([sys.executable, "-m", "dsgpt", *arguments], preexec_fn=die_with_parent)
        try:
            if meanwhile is not None:
                meanwhile(process)
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()  # the terminal's Ctrl-C reached it too: it commits and says how to continue
            text = f"{self.again} continues"
            raise failed(code or ExitCode.PREEMPTED, "interrupted", f"dsgpt {shlex.join(arguments)}", text) from None
        self.timings[label] = time.perf_counter() - began
        if code not in (0, ExitCode.PREEMPTED) or (code and meanwhile is None):
            raise failed(
                code,
                f"{label} failed with code {code}",
                f"dsgpt {shlex.join(arguments)}",
                "its message is above; the same command continues from here",
            )
        return code

    def json(self, label: str, *words: Any) -> dict[str, Any]:
        """Run `dsgpt WORDS… --json` and return what it printed."""
        began = time.perf_counter()
        arguments = [str(word) for word in words]
        self.say(f"\n$ dsgpt {shlex.join(arguments)}")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "dsgpt", *arguments]
        with _Waiting(label):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise failed(done.returncode, f"{label} failed with code {done.returncode}", done.stderr.strip()[-2000:])
        self.timings[arguments[0]] = time.perf_counter() - began
        return dict(json.loads(done.stdout))


def keep_options(path: Path, options: Mapping[str, Any], again: str) -> None:
    """Write what a folder's results come from, once. Raises ConfigError where they come from something else."""
    options = json.loads(json.dumps(options))
    if not path.exists():
        write_text(path, json.dumps(options, indent=2) + "\n")
        return
    earlier = json.loads(path.read_text("utf-8"))
    changed = sorted(key for key in options.keys() | earlier.keys() if options.get(key) != earlier.get(key))
    if changed:
        raise ConfigError(
            "this folder holds results of another call",
            seen="; ".join(f"{key}: {earlier.get(key)!r:.100}, now {options.get(key)!r:.100}" for key in changed),
            do=f"another --output-dir, or the options that it was begun with: {again}",
        )


def write_text(path: Path, text: str) -> None:
    """Through a second name: a killed call leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def fingerprint(place: str) -> Any:
    """Of a file or folder what tells a change from the same: names, sizes and times of its files; another place as it is."""
    path = Path(place)
    if not path.exists():
        return place
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    told = [(str(one.relative_to(path.parent)), one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    return f"{place} {hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()}"


def failed(code: int, what: str, seen: str, do: str = "") -> DsgptError:
    """The failure of a command, to leave with its own exit code where the contract knows it."""
    error = DsgptError(what, seen, do)
    if code in list(ExitCode):
        error.exit_code = ExitCode(code)
    return error


class _Waiting:
    """A spinner on a terminal, a line elsewhere, while something quick runs."""

    def __init__(self, label: str):
        self.label = label

    def __enter__(self) -> None:
        from rich.console import Console

        self._status = Console().status(self.label)
        if sys.stdout.isatty():
            self._status.start()
        else:
            print(self.label, flush=True)

    def __exit__(self, *exception: object) -> None:
        self._status.stop()
