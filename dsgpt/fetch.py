"""Fetches a model or a data set of the Hugging Face hub whole, for machines without internet.

    fetched = fetch("hf:Qwen/Qwen3-0.6B", Path("qwen3"))       # or "dataset:roneneldan/TinyStories"

Files are collected in a hidden folder beside the output. Each is compared with the hash that the hub has of it; one rename
then says that all are there and right, and `fetched.json` says which they are. The same command goes on where an earlier
one ended: what is there and right is not asked for again. A broken connection is taken up about
where it broke; the one file that a killed process was in the middle of begins anew, as huggingface_hub has it.

Code that comes with a model or a data set is never downloaded, pickled weights only for a person who trusts them, and only
where there are no others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from dsgpt.errors import ConfigError, DataError, LockedError
from dsgpt.hub import LICENCE_FILES, WEIGHTS, RemoteFile, download, list_files
from dsgpt.units import format_bytes

RECORD = "fetched.json"
_ABOUT = ("README*", *LICENCE_FILES)
# Configs, tokenizers of all kinds, chat templates.
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", *_ABOUT)
_PACKABLE = ("txt", "jsonl", "json", "csv", "tsv")
DATA = (
    *(f"*.{kind}{packed}" for kind in _PACKABLE for packed in ("", ".gz", ".zst", ".bz2", ".xz")),
    "*.parquet",
    "*.arrow",
)
# They have the names of data, and `dsgpt data prepare` would read them as such.
_NO_DATA = (RECORD, "dataset_infos.json", "requirements.txt", "LICEN[CS]E*", "NOTICE*")
_MOST_NAMES = 8


@dataclass(frozen=True)
class Fetched:
    """What lies in `path` now: so many files and bytes of commit `revision`. `left_out` are the names of the others."""

    path: Path
    revision: str
    num_files: int
    num_bytes: int
    left_out: list[str]
    was_there: bool


def fetch(
    source: str,
    output: Path,
    revision: str | None = None,
    include: Sequence[str] = (),
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Fetched:
    """Download hf:NAME or dataset:NAME to `output`, which must be new, empty, or hold just that.

    `include` are patterns of a data set's files; none means all. `trust` allows pickled weights where there are no others.
    Raises ConfigError for what cannot be had (also where a token is missing), LockedError where the output cannot take it,
    DataError where what arrived is not what the hub has, and DsgptError where the hub does not answer.
    """
    output = output.absolute()
    commit, there = list_files(source, revision)
    is_model = source.startswith("hf:")
    files = _files_of_model(source, there, trust) if is_model else _files_of_data(source, there, include)
    wanted = {file.name for file in files}
    found = Fetched(
        path=output,
        revision=commit,
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        left_out=sorted(file.name for file in there if file.name not in wanted),
        was_there=_is_there(output, source, commit, files),
    )
    if found.was_there:
        return found
    collected = output.with_name(f".fetching-{output.name}")
    _require_space(output, collected, files)
    with _alone(collected):
        _sweep(collected, wanted)
        entries = {}
        for file in sorted(files, key=lambda one: one.size):  # a gated model is refused at once, not after hours
            sha256 = _get(source, commit, file, collected, say)
            entries[file.name] = {"bytes": file.size, "sha256": sha256}
        record = {"source": source, "revision": commit, "files": dict(sorted(entries.items()))}
        (collected / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        shutil.rmtree(collected / ".cache", ignore_errors=True)
        collected.rename(output)
    return found


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _files_of_model(source: str, there: list[RemoteFile], trust: bool) -> list[RemoteFile]:
    """Weights in one format and what stands beside them; folders hold other formats and other people's copies."""
    top = {file.name: file for file in there if "/" not in file.name}
    for whole, pieces in WEIGHTS:
        weights = [whole] if whole in top else [name for name in top if _like(name, (pieces,))]
        if weights:
            break
    if not weights or "config.json" not in top:
        raise ConfigError(
            f"{source} is no model that dsgpt reads: it needs config.json and model.safetensors, whole or in pieces",
            seen=name_some(file.name for file in there),
            do="fetch another copy of the model, or convert it to Hugging Face's format elsewhere",
        )
    if not weights[0].startswith("model") and not trust:
        raise ConfigError(
            f"the weights of {source} exist only as pickle, which can execute code when it is read",
            seen=name_some(weights),
            do="fetch a copy in safetensors; if you trust who made these files: --trust-checkpoint",
        )
    # Other formats have an index as well, and it would name files that are not here.
    known = [name for name in top if _like(name, _BESIDE_WEIGHTS) and not _like(name, ("*.index.json", RECORD))]
    index = [name for name in top if name == f"{whole}.index.json" and weights != [whole]]
    return [top[name] for name in (*weights, *index, *known)]


def _files_of_data(source: str, there: list[RemoteFile], include: Sequence[str]) -> list[RemoteFile]:
    """What `dsgpt data prepare` reads, and the README."""
    data = [file for file in there if _like(file.name, DATA) and not _like(PurePosixPath(file.name).name, _NO_DATA)]
    chosen = [file for file in data if _like(file.name, include or ("*",))]
    if not chosen:
        raise ConfigError(
            f"{source} holds no data file that dsgpt reads" + (", of those asked for" if include else ""),
            seen=name_some(file.name for file in data or there),
            do="another --include" if include else "convert it to .parquet, .jsonl or .txt elsewhere",
        )
    return [*chosen, *(file for file in there if file.name == "README.md")]


def name_some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more if known else "no files"


def _is_there(output: Path, source: str, commit: str, files: list[RemoteFile]) -> bool:
    """Whether an earlier call finished this. Raises ConfigError where the output holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    asked = (source, commit, {file.name: file.size for file in files})
    try:
        record = json.loads((output / RECORD).read_text("utf-8"))
        sizes = {name: (output / name).stat().st_size for name in record["files"]}
        holds, told = (record["source"], record["revision"], sizes), f"{record['source']} at {record['revision']}"
    except (OSError, ValueError, LookupError, TypeError):
        holds, told = None, "something else"
    if holds == asked:
        return True
    raise ConfigError(
        "the output exists, and does not hold just what is asked for",
        seen=f"{output}: {told}; asked for are {len(files)} files of {source} at {commit}",
        do="choose another --output, or remove it",
    )


def _require_space(output: Path, collected: Path, files: list[RemoteFile]) -> None:
    """Raise LockedError where the files that are not there yet will not fit."""
    output.parent.mkdir(parents=True, exist_ok=True)
    needed = 0
    for file in files:
        path = collected / file.name
        needed += 0 if path.is_file() and path.stat().st_size == file.size else file.size
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise LockedError(
            "there is not enough space for the download",
            seen=f"{format_bytes(needed)} to come, {format_bytes(free)} free at {output.parent}",
            do="choose another --output, or make room",
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; the kernel lets go of it when this process ends. Raises LockedError where another one has it."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise LockedError("another process is fetching to this output", seen=str(folder), do="wait for it") from error
    except OSError:
        pass  # a file system without locks: work may be done twice, and hashes still tell what is right
    try:
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path, wanted: set[str]) -> None:
    """Remove what an earlier call for something else collected, and what huggingface_hub leaves of a killed download."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if str(path.relative_to(folder)) not in wanted:
            path.unlink()


def _get(source: str, commit: str, file: RemoteFile, folder: Path, say: Callable[[str], None]) -> str:
    """The sha256 of a file that is in the folder now and right. Raises DataError where other bytes arrived."""
    path = folder / file.name
    if sha256 := _intact(path, file):
        say(f"{format_bytes(file.size):>10}  {file.name} (there already)")
        return sha256
    path.unlink(missing_ok=True)
    say(f"{format_bytes(file.size):>10}  {file.name}")
    download(source, commit, file.name, folder)
    if sha256 := _intact(path, file):
        return sha256
    path.unlink()
    raise DataError(
        "what arrived is not what the hub has",
        seen=f"{file.name}: its hash is not {file.digest}",
        do="run the command again; if that happens again, something on the way (a proxy, a cache) changes what it passes on",
    )


def _intact(path: Path, file: RemoteFile) -> str:
    """The sha256 of a file, on storage by then, that has the size and hash the hub says; "" of any other."""
    if not path.is_file() or path.stat().st_size != file.size:
        return ""
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        os.fsync(opened.fileno())  # the rename must not be there before the bytes
    if len(file.digest) == len(sha256):
        return sha256 if sha256 == file.digest else ""
    content = path.read_bytes()  # what git itself holds is small
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sha256 if git == file.digest else ""
