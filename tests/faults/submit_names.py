"""T910 for `dsgpt submit`: hostile run names, folders, options and arguments reach sbatch byte for byte, or are refused (78).

Each trial is one text (tests.faults._names) at one of seven places. A stand-in for sbatch on PATH records its arguments. What
the script says is read by others than who wrote it: its header by sbatch's own rules, written down here once more from its
source (and compared with the real sbatch in tests/slurm/test_submit.py), its exports by bash, the config by plain PyYAML.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from dsgpt.config.source import dump
from dsgpt.errors import ConfigError
from dsgpt.launch.submission import Submission
from dsgpt.train.submit import Asked, plan_submission, queue
from tests.faults._names import hostile_texts
from tests.frame import Outcome, Row
from tests.run_fixtures import make_dataset, write_config

JOB = "77"
SHIM = f"""#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >"$SHIM_RECORD"
echo {JOB}
"""


def run(trials: int | None, seed: int) -> Outcome:
    """5,000 texts unless `trials` says otherwise."""
    count = trials or 5000
    with tempfile.TemporaryDirectory(prefix="dsgpt-names-") as name:
        found = try_texts(Path(name), count, seed)
    rows = [
        Row("changed on the way", found["changed"], at_most=0),
        Row("refused otherwise than with 78", found["other"], at_most=0),
        Row("canaries", found["canary"], at_most=0),
        Row("arrived byte for byte", found["equal"], at_least=1),
        Row(
            "refused with 78",
            found["refused"],
            note=", ".join(f"{k}: {n}" for k, n in sorted(found.items()) if ":" in k),
        ),
    ]
    return Outcome(rows, count)


def try_texts(folder: Path, count: int, seed: int) -> Counter[str]:
    """How many texts came to each end; differences are printed."""
    canary = Path(tempfile.gettempdir()) / f"canary-{os.getpid()}"
    place = Place(folder)
    found: Counter[str] = Counter()
    exports: list[tuple[Path, dict[str, str]]] = []
    with place.environment():
        for number, text in enumerate(hostile_texts(random.Random(seed), canary, count)):
            kind = KINDS[number % len(KINDS)]
            try:
                wrong = place.attempt(kind, text, number, exports)
            except ConfigError:
                found.update(["refused", f"{kind}: refused"])
                continue
            except Exception as error:  # whatever it is, it is not the refusal that was promised
                print(f"{kind} {text!r}: {type(error).__name__}: {error}")
                found["other"] += 1
                continue
            found["changed" if wrong else "equal"] += 1
            if wrong:
                print(f"{kind} {text!r}: {wrong}")
    found["changed"] += wrong_exports(exports)
    found["canary"] = int(canary.exists())
    canary.unlink(missing_ok=True)
    return found


KINDS = ("name", "folder", "partition", "comment", "task word", "site", "job name")


class Place:
    """A run's config and a stand-in for sbatch; `attempt` submits with one text and reads what arrived."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, folder / "argv"
        self.config = write_config(make_dataset(folder / "made"), folder)
        (folder / "bin").mkdir()
        shim = folder / "bin" / "sbatch"
        shim.write_text(SHIM)
        shim.chmod(0o755)

    @contextmanager
    def environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        os.environ["SHIM_RECORD"] = str(self.record)
        os.environ["DSGPT_SITE"] = str(self.folder / "no-site.sh")
        os.environ["HOME"] = str(self.folder)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def attempt(self, kind: str, text: str, number: int, exports: list[tuple[Path, dict[str, str]]]) -> str:
        """What arrived otherwise than it was sent, or ""."""
        words, options, extra = [str(self.config)], {"nodes": "1"}, {}
        output, name = self.folder / "runs" / str(number), "run"
        os.environ["DSGPT_SITE"] = str(self.folder / "no-site.sh")
        part = text.replace("/", "_").replace("\0", "")
        expected: dict[str, str] = {}
        task: list[str] = []
        match kind:
            case "name":
                name = text
                words.append(override("run.name", text))
                expected["job-name"] = text
            case "job name":
                options["job-name"] = expected["job-name"] = text
            case "folder":
                output = output / part
            case "partition":
                options["partition"] = expected["partition"] = text
            case "comment":
                extra["comment"] = expected["comment"] = text
            case "task word":
                task = [override("run.name", "{task}" + text), f"run.output_dir={output}-{{task}}"]
                options["array"] = expected["array"] = "3-4"
                words += task
            case "site":
                site = self.folder / "sites" / str(number) / part / "site.sh"
                make_file(site, f"# {number}\n")
                os.environ["DSGPT_SITE"] = str(site)
        if not task:
            words.append(override("run.output_dir", str(output)))
        try:
            [done] = queue(plan_submission(Asked(tuple(words), options, extra)))
        except OSError as error:
            raise ConfigError(str(error)) from error
        script = Path(done.command[2]).read_text("utf-8")
        exports.append((done.folder, {"DSGPT_SUBMISSION": str(done.folder)}))
        if kind == "site" and (done.folder / "site.sh").read_text() != f"# {number}\n":
            return "another site file"
        return self._read(done, script, expected, task, name if not task else "", output)

    def _read(
        self, done: Submission, script: str, expected: dict[str, str], task: list[str], name: str, output: Path
    ) -> str:
        sent = [str(done.folder / "train.sbatch"), str(done.folder / "config.yaml"), *task]
        arrived = self.record.read_bytes().split(b"\0")[:-1]
        if arrived != [b"--parsable", *map(os.fsencode, sent)]:
            return f"argv {arrived}"
        header = read_header(script)
        for key, value in expected.items():
            if header.get(key) != value:
                return f"--{key} is {header.get(key)!r}"
        logs = output.parent if task else output
        if expand(header["output"]) != str(logs / "logs" / ("slurm-70_7.log" if task else f"slurm-{JOB}.log")):
            return f"--output is {header['output']!r}"
        config = yaml.safe_load((done.folder / "config.yaml").read_text("utf-8"))
        if not task and (config["run"]["name"] != name or config["run"]["output_dir"] != str(output)):
            return f"the config has {config['run']}"
        return ""


def override(key: str, value: str) -> str:
    """`key=value` with the value quoted as YAML, which every text can be."""
    return f"{key}={dump({'x': value})[3:].removesuffix(chr(10))}"


def make_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def read_header(script: str) -> dict[str, str]:
    """The options that sbatch reads: lines `#SBATCH` before the first command, split by _get_argument of its opt.c."""
    found = {}
    for line in script.split("\n")[1:]:
        if line.startswith("#SBATCH"):
            for argument in arguments_of(line.removeprefix("#SBATCH")):
                name, _, value = argument.partition("=")
                found[name.removeprefix("--")] = value
        elif line.strip() and not line.startswith("#"):
            break
    return found


def arguments_of(line: str) -> list[str]:
    found, current, inside = [], "", False
    quote, escaped = "", False
    for letter in line:
        if escaped:
            current, escaped = current + letter, False
        elif letter == "\\":
            inside = escaped = True
        elif quote:
            quote, current = ("", current) if letter == quote else (quote, current + letter)
        elif letter in "'\"":
            inside, quote = True, letter
        elif letter == "#":
            break
        elif letter in " \t\v\f\r":
            if inside:
                found.append(current)
            current, inside = "", False
        else:
            inside, current = True, current + letter
    return [*found, current] if inside else found


def expand(pattern: str) -> str:
    """The name of a log as SLURM makes it for task 7 of array 70, or job 77."""
    if "\\" in pattern:
        return pattern.replace("\\", "")
    out, rest = "", pattern
    while rest:
        head, percent, rest = rest.partition("%")
        out += head
        if percent:
            out += {"%": "%", "j": JOB, "A": "70", "a": "7"}.get(rest[:1], "?")
            rest = rest[1:]
    return out


def wrong_exports(exports: list[tuple[Path, dict[str, str]]]) -> int:
    """How many scripts export something else, or are not shell, by bash's own word; a thousand at a time."""
    wrong = 0
    for start in range(0, len(exports), 1000):
        part = exports[start : start + 1000]
        lines = []
        for folder, _ in part:
            lines += [
                line for line in (folder / "train.sbatch").read_text("utf-8").split("\n") if line.startswith("export ")
            ]
            lines.append('printf "%s\\0" "$DSGPT_SUBMISSION"')
        done = subprocess.run(["bash"], input="\n".join(lines).encode(), capture_output=True, check=True)
        got = done.stdout.split(b"\0")[:-1]
        wrong += sum(one != os.fsencode(values["DSGPT_SUBMISSION"]) for one, (_, values) in zip(got, part, strict=True))
    return wrong
