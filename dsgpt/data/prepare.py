"""Tokenises text into a dataset folder, in parallel over processes and machines, restartable at any instant.

    dsgpt data prepare corpus/ --tokenizer tokenizers/bpe32k --output data/corpus --workers 16 --validation 0.5%
    dsgpt data prepare ... --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT       one of many tasks, on any machine
    dsgpt data finish data/corpus                                                     what the last task does by itself

    output/
      dataset.json                       written last: where it exists, all is there
      train-00000.bin .idx, ...          one pair for each part and split that has documents
      tokenizer/                         a copy of the tokenizer
      bad_lines.jsonl                    what could not be read, with source, line and reason (only where there is any)
      .prepare/                          the plan and one record for each finished part; gone at the end

The sorted list of sources alone decides the parts, and content alone decides what is set aside for validation. So the
output is the same, byte for byte, for any number of workers and tasks and any number of restarts; a part whose record
exists is not done again. Tasks need nothing of each other but the folder: whoever finds all records there writes
dataset.json. Trade-off: a part belongs to one task, and there are about a thousand, so more tasks than that are idle.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from dsgpt.data import manifest as manifests
from dsgpt.data.choices import Choices, Progress, Unfinished
from dsgpt.data.duplicates import duplicates_path, find_duplicates, hashes_path
from dsgpt.data.finish import missing_parts, write_dataset
from dsgpt.data.forecast import Forecast, forecast
from dsgpt.data.indexed import hash_file
from dsgpt.data.manifest import STATE, TOKENIZER, DatasetManifest, EngineRecord
from dsgpt.data.parts import Part, PartRecord, Settings, Source, load_record
from dsgpt.data.plan import Plan, adopt_plan, current_engine, describe, description, fall_back, refuse_other
from dsgpt.data.sources import HUB, extent_of, find_sources
from dsgpt.data.tokenize_part import Job, Mismatch, engine_for, hash_part, load_encoder, tokenize_part
from dsgpt.data.workers import Counts, Pool
from dsgpt.errors import DataError, DsgptError, LockedError
from dsgpt.tokenizer.encoder import Encoder
from dsgpt.tokenizer.tokenizer import Tokenizer


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    workers: int = 1,
    validation: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
    **choices: object,
) -> DatasetManifest:
    """Make the dataset `output` from `inputs` and return its manifest. `choices` as in Choices, for all parts.

    A folder that already holds the finished dataset of the same content, tokenizer and settings is returned as it is.
    Raises DataError (sources, too many bad records, a folder that holds something else), ConfigError (arguments),
    LockedError (no write access, or another process is at work there), DsgptError (disk full, a worker killed).
    """
    chosen = Choices(workers=workers, validation=validation, **choices)  # type: ignore[arg-type]
    done = prepare_share(inputs, tokenizer, output, chosen, progress or (lambda _: None))
    assert isinstance(done, DatasetManifest), "all parts were asked for"
    return done


def prepare_share(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    choices: Choices,
    report: Callable[[Progress], None],
    announce: Callable[[Forecast], None] | None = None,
) -> DatasetManifest | Unfinished:
    """Do `choices.share` of the parts, and finish the dataset where that was the last of them. Raises as `prepare`.

    `announce` gets a forecast before the work starts.
    """
    folder = Path(output)
    with locked(folder, alone=choices.share.is_all), Pool(choices.workers) as pool:
        engine = pool.ask(engine_for, tokenizer if isinstance(tokenizer, Tokenizer) else str(tokenizer), choices.engine)
        loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
        paths = find_sources(inputs, exclude=output, spool=folder / STATE if choices.share.is_all else None)
        plan = Plan(
            format_version=manifests.FORMAT_VERSION,
            sources=plan_sources(paths),
            tokenizer=(loaded.sha256, loaded.bos_id, loaded.eos_id),
            vocab_size=loaded.vocab_size,
            settings=choices.settings.recorded(),
            engine=engine.result(),
            max_bad_fraction=choices.max_bad_fraction,
            command=list(choices.command),
        )
        if (folder / manifests.FILE_NAME).exists():
            return already_there(folder, plan, report)
        plan = adopt_plan(folder, plan, loaded)
        if announce is not None:
            encoder = load_encoder(str(folder / TOKENIZER), current_engine(folder, plan).name)
            announce(forecast(plan, encoder, folder, choices.workers * choices.share.count))
        try:
            return _work(folder, plan, choices, pool, report)
        except FileNotFoundError as error:
            # Another task, which had been given the same parts, has finished the dataset meanwhile.
            with suppress(DataError):
                return manifests.load_manifest(folder)
            do = "put it back, and run the same command again"
            raise DataError("a file went away while it was needed", seen=str(error), do=do) from error


def plan_sources(paths: Sequence[Path]) -> list[Source]:
    """The sources as they are now. Raises DataError where one cannot be read or all are empty."""
    sources = []
    try:
        for path in paths:
            stop, size = extent_of(path)
            is_hub = str(path).startswith(HUB)
            name = str(path) if is_hub else os.path.abspath(path)
            sources.append(Source(name, size, stop, 0 if is_hub else path.stat().st_mtime_ns))
    except OSError as error:
        raise DataError("an input cannot be read", seen=str(error), do="check its permissions") from error
    if not any(source.stop for source in sources):
        raise DataError("all inputs are empty", seen=", ".join(map(str, paths[:5])), do="name files that hold text")
    return sources


@contextmanager
def locked(folder: Path, alone: bool) -> Iterator[None]:
    """Hold output/.prepare/lock, together with other tasks or alone; the kernel lets go of it when this process ends."""
    state = folder / STATE
    try:
        ours = state.exists() or (folder / manifests.FILE_NAME).exists()
        if not ours and folder.exists() and any(folder.iterdir()):
            raise DataError(
                "the output folder holds other files", seen=str(folder), do="choose a new or empty --output"
            )
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "w")  # noqa: SIM115 (held by the with block below)
    except OSError as error:
        raise LockedError(
            "the output folder cannot be written", seen=str(error), do="choose another --output, or change its owner"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                "another process is preparing into this folder", seen=str(folder), do="wait for it, or stop it first"
            ) from error
        except OSError:
            pass  # a file system without locks: nothing gets wrong, work may be done twice
        if alone and not (folder / manifests.FILE_NAME).exists():
            for leftover in [*state.glob("*.tmp*"), *state.glob(".tmp-*")]:
                leftover.unlink()
        try:
            yield
        finally:
            if (folder / manifests.FILE_NAME).exists():
                shutil.rmtree(state, ignore_errors=True)


def already_there(folder: Path, plan: Plan, report: Callable[[Progress], None]) -> DatasetManifest:
    found = manifests.load_manifest(folder)
    stops = {
        source.path: source.stop for source in plan.sources
    }  # of a Hub data set the number of files is not on record
    seen = [[source.path, source.bytes, stops.get(source.path)] for source in found.sources]
    tokenizer = [found.tokenizer.sha256, found.tokenizer.bos_id, found.tokenizer.eos_id]
    existing = description(found.format_version, seen, tokenizer, found.settings)
    refuse_other(folder, existing, describe(plan), "a finished dataset")
    # What was not written to since the dataset was finished is what it was made from; all else is read once more.
    finished = (folder / manifests.FILE_NAME).stat().st_mtime_ns
    files = [source for source in found.sources if not source.path.startswith(HUB)]
    suspects = [source for source in files if _written(source.path) >= finished]
    total, done = sum(source.bytes for source in suspects), 0
    for source in suspects:
        if hash_file(source.path) != source.sha256:
            raise DataError(
                "the output folder holds a finished dataset made from something else",
                seen=f"{folder}: different sources: {source.path} has changed",
                do="choose another --output, or delete the folder to make it anew",
            )
        done += source.bytes
        report(Progress("compare", total, Counts(num_bytes=done)))
    return found


def _written(path: str) -> int:
    status = os.stat(path)
    return max(status.st_mtime_ns, status.st_ctime_ns)


class Differs(Exception):
    """An engine turned out to be wrong: the reference, and why."""


def _work(
    folder: Path, plan: Plan, choices: Choices, pool: Pool, report: Callable[[Progress], None]
) -> DatasetManifest | Unfinished:
    parts = plan.parts
    mine = [part for part in parts if choices.share.takes(part)]
    if choices.deduplicate and not _deduplicate(folder, plan, parts, mine, pool, report):
        missing = [part.number for part in parts if not hashes_path(folder / STATE, part.number).exists()]
        return Unfinished(tuple(missing), plan.command_for(missing), hashed=True)
    while True:
        engine = current_engine(folder, plan)
        try:
            job = Job(folder, Settings.of(plan.settings), plan.dtype, engine.name)
            run_parts(tokenize_part, job, folder, plan, mine, engine, pool, report)
            if current_engine(folder, plan) == engine:  # no other task has found it wrong meanwhile
                break
        except Differs as difference:
            reference = Encoder.load(folder / TOKENIZER, "reference").engine
            fall_back(folder, EngineRecord(name=reference, fallback=f"{engine.name}: {difference}"))
    if missing := missing_parts(folder, plan):
        return Unfinished(tuple(missing), plan.command_for(missing))
    with kept(folder, len(parts)):
        return write_dataset(folder, plan)


def _deduplicate(
    folder: Path, plan: Plan, parts: list[Part], mine: list[Part], pool: Pool, report: Callable[[Progress], None]
) -> bool:
    """Find all repeated documents; False where parts of other tasks are not hashed yet."""
    state = folder / STATE
    job = Job(folder, Settings.of(plan.settings), plan.dtype, "")
    todo = [part for part in mine if not hashes_path(state, part.number).exists()]
    total = sum(part.num_bytes for part in todo)
    tasks = [(part, job, plan.times_of(part)) for part in todo]
    with kept(folder, len(plan.parts)):
        for _ in pool.run(hash_part, tasks, lambda c: report(Progress("compare", total, c))):
            pass
    if not all(hashes_path(state, part.number).exists() for part in parts):
        return False
    if not all(duplicates_path(state, part.number).exists() for part in parts):
        find_duplicates(state, [part.number for part in parts])
    return True


def run_parts(
    task: Callable[..., PartRecord | Mismatch],
    job: Any,
    folder: Path,
    plan: Plan,
    parts: list[Part],
    engine: EngineRecord,
    pool: Pool,
    report: Callable[[Progress], None],
) -> None:
    """Call task(part, job, times) for the parts that have no record by this engine. Raises Differs for a Mismatch."""
    finished = {part.number: record for part in parts if (record := load_record(folder, part.number, engine.name))}
    total_bytes = sum(part.num_bytes for part in parts)
    earlier = Counts(
        num_bytes=sum(part.num_bytes for part in parts if part.number in finished),
        documents=sum(record.documents for record in finished.values()),
        tokens=sum(record.tokens for record in finished.values()),
        bad_lines=sum(record.bad_lines for record in finished.values()),
    )
    todo = [(part, job, plan.times_of(part)) for part in parts if part.number not in finished]

    def tell(counts: Counts) -> None:
        report(Progress("tokenize", total_bytes, earlier + counts, earlier.num_bytes))

    with kept(folder, len(plan.parts)), closing(pool.run(task, todo, tell)) as records:
        for done in records:
            if isinstance(done, Mismatch):
                raise Differs(done.reason)


@contextmanager
def kept(folder: Path, num_parts: int) -> Iterator[None]:
    """What the disk does to the work, told with what to do about it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        records = len(list((folder / STATE).glob("part-*.json")))
        raise DsgptError(
            "reading or writing failed half way",
            seen=str(error),
            do=f"make room or repair what is named, then run the same command again; {records} of {num_parts} "
            "parts are finished and kept",
        ) from error
