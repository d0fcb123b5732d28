"""The commit protocol: a checkpoint is either wholly there or not there at all.

A save writes into `.tmp-step-00001000-<attempt>/`; every file is fsynced and hashed by the rank that wrote it; rank 0
writes `manifest.json` with all sizes and hashes and its own, fsyncs, and renames the folder to `step-00001000`. **That
rename is the commit.** There is no `latest` file: a pointer is one more thing that can lie, and a listing of one folder
answers the same question.

Neither torch nor DeepSpeed is imported here: `dsgpt checkpoint ls` runs on a login node, and the protocol is attacked
alone, thousands of times, by `python -m tests.faults protocol`.

Growth: rank 0 writes one manifest with a line per file (about 200 bytes; 200 KB for 1,024 ranks) and one rename; no
rank opens or stats another rank's file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dsgpt.errors import CheckpointError, Problem

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_DIGEST = "sha256"  # the manifest's own, its last key
_COMMITTED = re.compile(r"step-([0-9]{8,})")
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR}
_RETRY_AFTER_SECONDS = (0.1, 1.0)
Result = TypeVar("Result")


def retrying(action: Callable[[], Result]) -> tuple[Result, int]:
    """Do something to storage again after an error that network file systems give and take back; (result, retries).

    `action` must be one that may be repeated. Raises the last error after two repetitions.
    """
    for retries, seconds in enumerate((*_RETRY_AFTER_SECONDS, None)):
        try:
            return action(), retries
        except OSError as error:
            if error.errno not in _PASSING or seconds is None:
                raise
            time.sleep(seconds)
    raise AssertionError("not reached")


def begin(checkpoints_dir: Path, step: int, attempt: str) -> Path:
    """Make and return the temporary folder of a save. Called by rank 0; leftovers of the same attempt are removed."""
    tmp = checkpoints_dir / f".tmp-step-{step:08d}-{attempt}"
    if tmp.exists():
        shutil.rmtree(tmp)
    if not checkpoints_dir.is_dir():
        checkpoints_dir.mkdir(parents=True)
        fsync_path(checkpoints_dir.parent)
    tmp.mkdir()
    return tmp


def fsync_path(path: Path) -> None:
    """Force a file or a folder's entries to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Fsync and hash files this process wrote: {name: {"bytes": size, "sha256": hex}}."""
    entries = {}
    for name in names:
        path = folder / name
        fsync_path(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return entries


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with its own digest, of the text without it: a flip in spelling alone is found as well."""
    body = {key: value for key, value in manifest.items() if key != _DIGEST}
    head, _, tail = json.dumps({"format_version": FORMAT_VERSION, **body, _DIGEST: ""}, indent=1).rpartition('""')
    return f'{head}"{hashlib.sha256((head + tail).encode()).hexdigest()}"{tail}'


def _is_sealed(text: str, digest: object) -> bool:
    if not isinstance(digest, str):
        return False
    head, _, tail = text.rpartition(f'"{digest}"')
    return hashlib.sha256((head + tail).encode()).hexdigest() == digest


def commit(
    checkpoints_dir: Path,
    tmp: Path,
    manifest: dict[str, Any],
    guard: Callable[[], None] = lambda: None,
    retried: Callable[[int], None] = lambda number: None,
) -> Path:
    """Write the manifest and rename `tmp` to its final name. `manifest` holds "step" and "files" (of `hash_files`).

    `guard` is called last and raises where this job may not commit any more. A checkpoint of the same step, which only a
    job that was cut off can have left there meanwhile, is moved to `abandoned-<n>`. `retried` is told how often something
    was tried again.
    """
    final = checkpoints_dir / f"step-{manifest['step']:08d}"
    text, path = sealed(manifest), tmp / MANIFEST

    def write() -> None:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fsync_path(tmp)

    retried(retrying(write)[1])
    guard()
    if final.exists():
        set_aside(checkpoints_dir, [final])
    os.rename(tmp, final)
    retried(retrying(lambda: fsync_path(checkpoints_dir))[1])
    return final


def set_aside(checkpoints_dir: Path, folders: Sequence[Path]) -> Path:
    """Move checkpoints that this run does not continue from to a new `abandoned-<n>`, whole; nothing is deleted."""
    endings = (path.name.removeprefix("abandoned-") for path in checkpoints_dir.glob("abandoned-*"))
    numbers = [int(ending) for ending in endings if ending.isdecimal()]
    aside = checkpoints_dir / f"abandoned-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for path in folders:
        os.rename(path, aside / path.name)
    fsync_path(aside)
    fsync_path(checkpoints_dir)
    return aside


def list_committed(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    """All committed checkpoints as (step, folder), oldest first. A folder without manifest is none, nor is a link."""
    if not checkpoints_dir.is_dir():
        return []
    found = []
    for entry in os.scandir(checkpoints_dir):
        match = _COMMITTED.fullmatch(entry.name)
        if match and not entry.is_symlink() and os.path.exists(os.path.join(entry.path, MANIFEST)):
            found.append((int(match.group(1)), Path(entry.path)))
    return sorted(found)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint; raises CheckpointError when it is damaged or of another version."""
    path = checkpoint / MANIFEST
    try:
        text = retrying(path.read_bytes)[0].decode("utf-8")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError("not a checkpoint: no manifest.json", seen=str(checkpoint)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("the manifest cannot be read", seen=f"{path}: {error}") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise CheckpointError("the manifest is not one of dsgpt's", seen=str(path))
    if manifest["format_version"] != FORMAT_VERSION:
        versions = manifest.get("versions")
        raise CheckpointError(
            f"checkpoint format version {manifest['format_version']} is not the one this dsgpt reads",
            seen=str(path),
            do=f"use the dsgpt that wrote it ({versions.get('dsgpt') if isinstance(versions, dict) else 'unknown version'})",
        )
    if not _is_sealed(text, manifest.get(_DIGEST)):
        raise CheckpointError("the manifest differs from its own digest", seen=str(path))
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError("the manifest is not one of dsgpt's", seen=str(path))
    return manifest


def attempt_of(checkpoint: Path) -> str:
    """Which start of the run made a checkpoint; "" where its manifest cannot tell."""
    try:
        return str(read_manifest(checkpoint).get("attempt", ""))
    except CheckpointError:
        return ""


def verify(checkpoint: Path, mode: str = "hash", only: Sequence[str] | None = None) -> list[Problem]:
    """Check files against the manifest, all or the named ones; `mode` is "hash" or "size". No problem: an empty list."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return error.problems
    files, problems, named = manifest["files"], [], _COMMITTED.fullmatch(checkpoint.name)
    if named and int(named[1]) != manifest.get("step"):
        problems.append(Problem("the folder holds another step", seen=f"{checkpoint}: step {manifest.get('step')}"))
    for name in files if only is None else only:
        entry = files.get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            problems.append(
                Problem("the manifest's entry of a file is missing or malformed", seen=f"{name}: {entry!r}")
            )
            continue
        if os.path.basename(name) != name or name in (os.curdir, os.pardir):
            problems.append(Problem("file name leaves the checkpoint", seen=name))
            continue
        path = checkpoint / name
        try:
            if path.is_symlink() or not path.is_file():
                problems.append(Problem("file missing or not a plain file", seen=str(path)))
            elif path.stat().st_size != entry["bytes"]:
                problems.append(
                    Problem("file size differs", seen=f"{path}: {path.stat().st_size}, not {entry['bytes']}")
                )
            elif mode == "hash" and retrying(lambda path=path: hash_file(path))[0] != entry["sha256"]:  # type: ignore[misc]
                problems.append(Problem("file content differs from its hash", seen=str(path)))
        except PermissionError:
            problems.append(Problem("file may not be read", seen=str(path), do="ask its owner to allow it: chmod a+r"))
        except OSError as error:
            problems.append(Problem("file cannot be read", seen=f"{path}: {error}"))
    return problems


def remove_unfinished(checkpoints_dir: Path) -> list[str]:
    """Remove temporary folders of saves that never committed. Called once at start by the one job that owns the run."""
    removed = []
    if checkpoints_dir.is_dir():
        for entry in list(os.scandir(checkpoints_dir)):
            if entry.name.startswith(".trash-"):
                shutil.rmtree(entry.path, ignore_errors=True)
            if entry.name.startswith(".tmp-step-"):
                # Renamed first: whoever was cut off may commit it in this moment, and then its old name is gone.
                trash = checkpoints_dir / f".trash-{entry.name}"
                with contextlib.suppress(OSError):
                    os.rename(entry.path, trash)
                    shutil.rmtree(trash, ignore_errors=True)
                    removed.append(entry.name)
    return removed
