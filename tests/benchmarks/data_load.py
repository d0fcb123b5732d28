"""Reading training data: opening, indexing and resuming at sizes no test has, memory, and tokens per second of the loader.

The large sizes are sparse files: index and tokens are as long as asked for, their documents have real lengths, and their
token ids are holes. Each size is looked at by a process of its own, which also says how much memory it took. What reads
is a process of its own as well, over 2 GB of tokens that were just written; the page cache is as the machine has it.

Documents have the lengths of text on the web: log-normal, half below 400 tokens, 900 on average. "Opening" is what a rank
does from nothing to its first batch of 8 sequences, in the order of the run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dsgpt.data.indexed import HEADER_BYTES, IndexedWriter, bin_path, idx_path
from dsgpt.data.manifest import BadLines, DatasetManifest, Shard, Split, TokenizerRecord, fingerprint_of, save_manifest
from tests.frame import Outcome, Row

DTYPE = np.dtype(np.uint16)
CHUNK = 1 << 20  # documents whose index is written at once
LENGTHS = (1024, 2048, 4096)
READ_TOKENS = 1 << 30

# In a process of its own: what a figure needs is timed in there, after the imports.
CHILD = """
import json, sys, time
import numpy as np
from dsgpt.data.dataset import BlockDataset
from dsgpt.data.mixture import SLOTS, MixtureStream, Segment
from dsgpt.data.indexed import IndexedReader
from dsgpt.process import tune_allocator

def rss(key="VmHWM"):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024

def stream_of(folder, length):
    dataset = BlockDataset(folder, "train", length)
    return MixtureStream([dataset], [Segment(0, (SLOTS,))], 1234)

def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result

def first_batch(folder, start):
    stream = stream_of(folder, 1024)
    return stream.read(np.arange(start, start + 8))

def look(folder, start):
    before = rss("VmRSS")
    seconds, batch = timed(lambda: first_batch(folder, start))
    return {"seconds": seconds, "rss": rss(), "before": before}

def opening(folder):
    return {"seconds": timed(lambda: stream_of(folder, 1024))[0]}

def index(folder):
    return {"seconds": timed(lambda: IndexedReader(folder + "/train-00000").document_starts(5 * 10**10, 5 * 10**10 + 4096))[0]}

def resume(folder, start):
    stream_of(folder, 1024).read(np.arange(8))  # what a process does once
    stream = stream_of(folder, 1024)
    return {"seconds": timed(lambda: stream.read(np.arange(start, start + 8)))[0]}

def resume_mixture(folders, start):
    def go():
        sources = [BlockDataset(folder, "train", 1024) for folder in folders]
        slots = tuple([SLOTS // len(folders)] * (len(folders) - 1) + [SLOTS - SLOTS // len(folders) * (len(folders) - 1)])
        return MixtureStream(sources, [Segment(0, slots), Segment(3, slots)], 1234).read(np.arange(start, start + 8))
    return {"seconds": timed(go)[0]}

def speed(folder, length, tokens, batch, tuned=True):
    if tuned:
        tune_allocator()  # as training on a CPU does; on a GPU glibc has learned the same from larger blocks
    stream, count = stream_of(folder, length), batch // length
    read = lambda start: stream.read(np.arange(start, start + count))
    for start in range(0, 64 * count, count):
        read(start)
    began, done, start = time.perf_counter(), 0, 64 * count
    while done < tokens:
        done += read(start)["input_ids"].size
        start += count
    return {"rate": done / (time.perf_counter() - began), "rss": rss()}

name, arguments = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps(globals()[name](*arguments)))
"""


def run(trials: int | None, seed: int) -> Outcome:
    """Five trials of each unless `trials` says otherwise."""
    trials = trials or 5
    with tempfile.TemporaryDirectory(prefix="dsgpt-data-load-") as name:
        folder, rng = Path(name), np.random.default_rng(seed)
        rows = [*_openings(folder, rng, trials), *_resumes(folder, trials), *_speeds(folder, rng, trials)]
        rows.append(
            Row("load average", os.getloadavg()[0], note=f"{os.cpu_count()} CPUs; others at work make figures worse")
        )
    return Outcome(rows, trials)


def _openings(folder: Path, rng: np.random.Generator, trials: int) -> list[Row]:
    one = _sparse(folder / "1m", [1_000_000], rng)
    many = _sparse(folder / "100m", [100_000_000], rng)
    shards = _sparse(folder / "shards", [2_000] * 1_000, rng)
    half = _sparse(folder / "50m", [50_000_000], rng, tokens=100_000_000_000)
    found: dict[str, list[dict[str, float]]] = {"1m": [], "100m": []}
    for trial in range(trials):  # in turns, so that both see the same machine
        for key, path in (("1m", one), ("100m", many)):
            found[key].append(_child("look", str(path), 7_777 * trial))
    small, large = (statistics.median(one["seconds"] for one in found[key]) for key in ("1m", "100m"))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["1m"], found["100m"], strict=True)]
    opened = [_child("opening", str(shards))["seconds"] for _ in range(trials)]
    first = [_child("look", str(shards), 0)["seconds"] for _ in range(trials)]
    index = [_child("index", str(half))["seconds"] for _ in range(trials)]
    memory = max(one["rss"] for one in found["100m"])
    before = statistics.median(one["before"] for one in found["100m"])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}; {1e3 * small:.1f} ms and {1e3 * large:.1f} ms to the first batch"
    return [
        Row("open 100 M documents / 1 M documents", statistics.median(ratios), at_most=1.5, note=spread),
        Row("memory of a rank, 100 M documents", memory / 1e6, "MB", 200, note=f"{before / 1e6:.0f} MB before opening"),
        Row(
            "open 1,000 shards",
            statistics.median(opened),
            "s",
            0.5,
            note=f"first batch {statistics.median(first):.3f} s",
        ),
        Row(
            "index of 50 M documents, 100 B tokens",
            statistics.median(index),
            "s",
            2,
            note="with documents around the middle",
        ),
    ]


def _resumes(folder: Path, trials: int) -> list[Row]:
    at = 10_000_000
    alone = [_child("resume", str(folder / "50m"), at + trial)["seconds"] for trial in range(trials)]
    mixed = [
        _child("resume_mixture", [str(folder / name) for name in ("50m", "100m", "1m")], at + trial)["seconds"]
        for trial in range(trials)
    ]
    note = f"{1e3 * min(mixed):.1f} to {1e3 * max(mixed):.1f}; three sources, one appended; with opening them"
    return [
        Row(
            "next batch after resume at sample 10 M",
            1e3 * statistics.median(alone),
            "ms",
            50,
            note="8 sequences of 1,024",
        ),
        Row("the same, of a mixture", 1e3 * statistics.median(mixed), "ms", 50, note=note),
    ]


def _speeds(folder: Path, rng: np.random.Generator, trials: int) -> list[Row]:
    data, rows, memory = _filled(folder / "filled", rng), [], 0.0
    cases = [(length, 65_536, True, f"loader, T = {length}") for length in LENGTHS]
    cases += [(1024, 8_192, True, "the same, T = 1024, batches of 8")]
    cases += [(1024, 65_536, False, "the same, T = 1024, glibc's defaults")]
    for length, batch, tuned, label in cases:
        found = [_child("speed", str(data), length, 100_000_000, batch, tuned) for _ in range(trials)]
        rates = [one["rate"] / 1e6 for one in found]
        memory = max(memory, *(one["rss"] for one in found))
        note = f"{min(rates):.0f} to {max(rates):.0f}; batches of {batch // length} sequences"
        must = 50 if tuned and batch > 8_192 else None
        rows.append(Row(label, statistics.median(rates), "M tokens/s", at_least=must, note=note))
    rows.append(Row("memory of a rank that reads on and on", memory / 1e6, "MB", 200))
    return rows


def _child(function: str, *arguments: Any) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, function, json.dumps(arguments)], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(400), 1.27, count), 1, 100_000).astype(np.int32)


def _sparse(folder: Path, documents: list[int], rng: np.random.Generator, tokens: int | None = None) -> Path:
    """A dataset of shards with so many documents, whose tokens are holes; about `tokens` of them where that is given."""
    folder.mkdir()
    shards = []
    for number, count in enumerate(documents):
        prefix = folder / f"train-{number:05d}"
        some = _document_lengths(rng, min(count, CHUNK))
        if tokens is not None:
            some = np.maximum(1, some * (tokens / count / some.mean())).astype(np.int32)
        total = _write_index(prefix, count, some)
        with open(bin_path(prefix), "wb") as stream:
            stream.truncate(total * DTYPE.itemsize)
        shards.append(_shard(prefix, count, total))
    return _save(folder, shards)


def _write_index(prefix: Path, count: int, some: np.ndarray) -> int:
    """An .idx of `count` documents whose lengths repeat `some`; returns their tokens."""
    with open(idx_path(prefix), "wb") as stream:
        stream.write(
            b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08" + np.array([count, count + 1], "<u8").tobytes()
        )
        assert stream.tell() == HEADER_BYTES
        pieces = [min(len(some), count - start) for start in range(0, count, len(some))]
        for piece in pieces:
            stream.write(some[:piece].tobytes())
        offset = 0
        for piece in pieces:
            ends = offset + np.cumsum(some[:piece], dtype=np.int64) * DTYPE.itemsize
            stream.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, CHUNK):
            stream.write(np.arange(start, min(count + 1, start + CHUNK), dtype=np.int64).tobytes())
    return offset // DTYPE.itemsize


def _filled(folder: Path, rng: np.random.Generator) -> Path:
    """1 G tokens that lie on the disk."""
    folder.mkdir()
    writer = IndexedWriter(folder / "train-00000", DTYPE)
    ids = rng.integers(0, 50_000, 1 << 24).astype(DTYPE)
    while writer.num_tokens < READ_TOKENS:
        lengths = _document_lengths(rng, 30_000)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), len(ids))]
        writer.add_documents(ids[: lengths.sum()], lengths)
    writer.finish()
    return _save(folder, [_shard(writer.prefix, writer.num_documents, writer.num_tokens)])


def _shard(prefix: Path, documents: int, tokens: int) -> Shard:
    name = f"{prefix.name} {documents} {tokens}"
    return Shard(path=prefix.name, documents=documents, tokens=tokens, text_bytes=0, sha256_bin=name, sha256_idx="")


def _save(folder: Path, shards: list[Shard]) -> Path:
    splits = {"train": Split.of(shards)}
    tokenizer = TokenizerRecord(path="tokenizer", sha256="0", vocab_size=50_000, bos_id=None, eos_id=None)
    manifest = DatasetManifest(
        format_version=1,
        tokenizer=tokenizer,
        dtype=DTYPE.name,
        splits=splits,
        sources=[],
        settings={},
        bad_lines=BadLines(count=0, file=None),
        empty_documents=0,
        fingerprint=fingerprint_of("0", splits),
    )
    save_manifest(folder, manifest)
    return folder
