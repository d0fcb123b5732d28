"""What was submitted for a run: `output_dir/submissions/<n>/`, one folder for each job. Torch-free.

    folder = create_folder(run_dir)            # the next number, which no other submit can have as well
    record(folder, Submission(job_id="1234", ...))

In it: the script, the config it trains (later edits of the user's YAML change nothing), the site's shell file, and
`submission.json`. A job that is requeued keeps its id; where a site refuses that, it submits a successor, whose id is in
`logs/<attempt>/successor`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsgpt.errors import LockedError

RECORD = "submission.json"


@dataclass(frozen=True)
class Submission:
    """One job as it was submitted. `asked` is the command line of `dsgpt submit` and `cwd` where it was typed."""

    job_id: str
    submitted: float
    command: tuple[str, ...]
    kind: str = "train"  # or "rehearse"
    host: str = ""
    user: str = ""
    asked: tuple[str, ...] = ()
    cwd: str = ""
    after: str = ""  # the job whose good end it waits for: the rehearsal
    cancelled: float = 0.0  # when `dsgpt cancel` took it back
    folder: Path = Path()


def next_number(run_dir: Path) -> int:
    """The number that the next submission will have."""
    with contextlib.suppress(OSError):
        return 1 + max((int(name) for name in os.listdir(run_dir / "submissions") if name.isdecimal()), default=0)
    return 1


def create_folder(run_dir: Path) -> Path:
    """A new folder of the next free number. Raises LockedError where nothing can be written."""
    number = next_number(run_dir)
    while True:
        folder = run_dir / "submissions" / str(number)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            (run_dir / "logs").mkdir(exist_ok=True)  # SLURM does not make the folder of its log
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1  # another submit was quicker
        except OSError as error:
            do = "choose another run.output_dir"
            raise LockedError("the run folder cannot be written", seen=str(error), do=do) from error


def record(folder: Path, submission: Submission) -> None:
    """Write submission.json whole."""
    fields = {name: value for name, value in asdict(submission).items() if name != "folder"}
    tmp = folder / f".tmp-{RECORD}-{os.getpid()}"
    tmp.write_text(json.dumps(fields, indent=1) + "\n", "utf-8")
    os.replace(tmp, folder / RECORD)


def mark_cancelled(submission: Submission, when: float) -> None:
    """Say that an operator took it back; who may not write there has cancelled it all the same."""
    with contextlib.suppress(OSError):
        record(submission.folder, replace(submission, cancelled=when))


def read_submissions(run_dir: Path) -> list[Submission]:
    """All of a run, oldest first; what cannot be read is passed over."""
    found = []
    for name in sorted(_numbers(run_dir / "submissions"), key=int):
        folder = run_dir / "submissions" / name
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            fields: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
            known = {key: fields[key] for key in Submission.__dataclass_fields__ if key in fields}
            for key in ("command", "asked"):
                known[key] = tuple(known.get(key, ()))
            found.append(Submission(**{**known, "folder": folder}))
    return found


def _numbers(folder: Path) -> Sequence[str]:
    try:
        return [name for name in os.listdir(folder) if name.isdecimal()]
    except OSError:
        return []
