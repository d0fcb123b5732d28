"""Which rank reads which ranges when a run resumes on other ranks: 64 -> 48 and 1,024 -> 640 of a 70 B model, simulated.

Every rank's reads are made with the reader's own arithmetic (dsgpt/checkpoint/ranges.py), widened to the blocks it verifies;
masters and both moments. The checksums that a rank compares with are counted too. Skew is the busiest rank against the mean.
That engines divide parameters as `layout` says is a test (tests/integration/test_topology.py). A 1 T model from 4,096 to
3,000 ranks is there for the reasoning: a sample of its ranks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsgpt.checkpoint.files import BLOCK_BYTES, PAGE_BYTES
from dsgpt.checkpoint.ranges import overlaps, widened
from tests.frame import Outcome, Row

KINDS, ITEM_BYTES = 3, 4
BLOCKS_PER_PAGE = PAGE_BYTES // 4
SAMPLE = 40  # of the ranks of the largest case

Shapes = dict[str, tuple[int, ...]]
CASES = (
    (64, 3, 48, 3),
    (64, 2, 48, 3),
    (64, 3, 48, 1),
    (1024, 3, 640, 3),
    (1024, 1, 640, 2),
    (1024, 3, 640, 2),
)


def llama(layers: int, hidden: int, intermediate: int, kv: int, vocab: int) -> Shapes:
    """Parameters of a Llama with heads of 128, by name."""
    shapes: Shapes = {"embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        for name, shape in {
            "q_proj": (hidden, hidden), "k_proj": (128 * kv, hidden), "v_proj": (128 * kv, hidden),
            "o_proj": (hidden, hidden), "gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate), "input_norm": (hidden,), "post_norm": (hidden,),
        }.items():  # fmt: skip
            shapes[f"layers.{layer}.{name}"] = shape
    return shapes | {"norm": (hidden,), "lm_head.weight": (vocab, hidden)}


SEVENTY_B = llama(80, 8192, 28672, 8, 128256)
ONE_T = llama(128, 25600, 71680, 8, 128256)


def layout(shapes: Shapes, stage: int, size: int) -> dict[str, dict[str, Any]]:
    """The manifest's index that so many ranks write: equal pieces, or at stages 1 and 2 DeepSpeed's flat groups.

    Matrices are one group, vectors another, each padded to a multiple of twice the ranks and cut into equal partitions.
    """
    index: dict[str, dict[str, Any]] = {name: {"shape": list(shape)} for name, shape in shapes.items()}
    if stage in (0, 3):
        for name, shape in shapes.items():
            index[name]["piece"] = -(-math.prod(shape) // size)
        return index
    for matrices in (True, False):
        group = [name for name, shape in shapes.items() if (len(shape) >= 2) == matrices]
        total = sum(math.prod(shapes[name]) for name in group)
        partition = -(-total // (2 * size)) * 2
        at = 0
        for name in group:
            numel, start, fragments = math.prod(shapes[name]), 0, []
            while start < numel:
                rank = (at + start) // partition
                piece = min(numel - start, (rank + 1) * partition - at - start)
                fragments.append([rank, start, piece])
                start += piece
            index[name]["fragments"] = fragments
            at += numel
    return index


def owned(index: dict[str, dict[str, Any]], size: int) -> list[list[tuple[str, int, int]]]:
    """(parameter, first element, elements) of every rank."""
    ranks: list[list[tuple[str, int, int]]] = [[] for _ in range(size)]
    for name, entry in index.items():
        total = math.prod(entry["shape"])
        pieces: Iterable[Any] = entry.get("fragments") or (
            (rank, start, min(entry["piece"], total - start))
            for rank, start in enumerate(range(0, total, entry["piece"]))
        )
        for rank, start, numel in pieces:
            ranks[rank].append((name, start, numel))
    return ranks


@dataclass(frozen=True)
class Plan:
    """Bytes that each rank reads, ranges and files of the busiest, readers of the busiest file, seconds to compute."""

    bytes: list[int]
    ranges: int
    files: int
    readers: int
    seconds: float


def plan(shapes: Shapes, before: tuple[int, int], after: tuple[int, int], every: int = 1) -> Plan:
    """The reads of every rank, or of every so many-th, from (ranks, stage) to (ranks, stage)."""
    began = time.perf_counter()
    saved, wanted = layout(shapes, before[1], before[0]), layout(shapes, after[1], after[0])
    file_blocks = [
        sum(KINDS * -(-ITEM_BYTES * numel // BLOCK_BYTES) for _, _, numel in pieces)
        for pieces in owned(saved, before[0])
    ]
    read, most_ranges, most_files = [], 0, 0
    readers: Counter[int] = Counter()
    for pieces in owned(wanted, after[0])[::every]:
        size, ranges, files = 0, 0, set()
        for name, start, numel in pieces:
            entry = saved[name]
            for one in overlaps(entry, start, numel):
                low, high = ITEM_BYTES * (one.low - one.begins), ITEM_BYTES * (one.high - one.begins)
                first, last = widened(low, high, _stored(entry, one.rank, one.begins), BLOCK_BYTES)
                pages = 1 + -(-(last - first) // (BLOCK_BYTES * BLOCKS_PER_PAGE))  # as if no two ranges shared one
                size, ranges = size + KINDS * (last - first + pages * PAGE_BYTES), ranges + KINDS
                files.add(one.rank)
        size += sum(4 * (2 + file_blocks[file] // BLOCKS_PER_PAGE) for file in files)
        readers.update(files)
        read.append(size)
        most_ranges, most_files = max(most_ranges, ranges), max(most_files, len(files))
    return Plan(read, most_ranges, most_files, max(readers.values()), time.perf_counter() - began)


def _stored(entry: dict[str, Any], rank: int, begins: int) -> int:
    """Bytes of one stored tensor: a piece of a parameter."""
    if "piece" in entry:
        return ITEM_BYTES * min(entry["piece"], math.prod(entry["shape"]) - begins)
    return next(ITEM_BYTES * numel for owner, start, numel in entry["fragments"] if owner == rank and start == begins)


def run(trials: int | None, seed: int) -> Outcome:
    """Every case once."""
    rows = []
    parameters = sum(math.prod(shape) for shape in SEVENTY_B.values())
    state = KINDS * ITEM_BYTES * parameters
    rows.append(Row("parameters", parameters / 1e9, "B", note=f"state {state / 1e9:.0f} GB"))
    for ranks_before, stage_before, ranks_after, stage_after in CASES:
        label = f"{ranks_before} ranks stage {stage_before} -> {ranks_after} stage {stage_after}"
        found = plan(SEVENTY_B, (ranks_before, stage_before), (ranks_after, stage_after))
        mean = statistics.mean(found.bytes)
        note = (
            f"per rank {min(found.bytes) / 1e9:.3f} to {max(found.bytes) / 1e9:.3f} GB in {found.ranges} ranges of "
            f"{found.files} files; a file has {found.readers} readers"
        )
        rows.append(Row(f"{label}: bytes read / state", sum(found.bytes) / state, "x", at_most=1.1, note=note))
        rows.append(Row(f"{label}: skew", max(found.bytes) / mean, "x", at_most=1.1))
        rows.append(Row(f"{label}: computed in", found.seconds, "s", at_most=10))
    parameters = sum(math.prod(shape) for shape in ONE_T.values())
    found = plan(ONE_T, (4096, 3), (3000, 3), every=3000 // SAMPLE)
    mean = statistics.mean(found.bytes)
    share = KINDS * ITEM_BYTES * parameters / 3000
    note = f"{parameters / 1e12:.2f} T, {mean / 1e9:.2f} GB per rank in {found.ranges} ranges of {found.files} files"
    rows.append(
        Row("4096 -> 3000 ranks of 1 T, stage 3: bytes read / share", mean / share, "x", at_most=1.1, note=note)
    )
    return Outcome(rows, len(CASES))
