"""Saving: every rank its own partition, indexed by parameter name and range; in the foreground, or while training goes on.

Layout of `checkpoints/step-00001000/`:

    manifest.json                 counters, model, fingerprints, versions, sizes and hashes, where each range lies
    rank-00000.safetensors        this rank's fragments: "<kind>:<parameter>", kind = master, exp_avg, exp_avg_sq;
                                  rank 0 also "buffer:<name>", running statistics, which are equal on all ranks
    frozen-00000.safetensors      this rank's share of what is not trained, in its own precision; written once and linked
                                  into every later checkpoint, also of another start on as many ranks, so that
                                  each is whole and the disk holds it once

A checkpoint holds 12 bytes per trained parameter with AdamW; low-precision copies are recomputed from the masters. Nothing
in it can execute.

`Saver.begin` copies the state (asynchronous) or writes it (synchronous); `Saver.finish` meets the other ranks and commits.
One save is under way at a time: who begins the next one finishes the last. Both ways write the same bytes.

Growth: each rank writes and hashes only its own file, in parallel. Rank 0 gathers one entry per rank (about 300 bytes) and
writes them into one manifest: 4,096 ranks are 1.2 MB. Its index has one entry per fragment at ZeRO 1-2 (parameters + ranks)
and one number per parameter at ZeRO 0 and 3, where all ranks hold equal pieces; a state of 1 T parameters is 3 GB per rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.files import Layout, write_file
from dsgpt.checkpoint.reader import buffer_key, frozen_file, partition_file
from dsgpt.checkpoint.writer import WriterProcess, write_memory
from dsgpt.distributed import World
from dsgpt.engine import Engine
from dsgpt.errors import LockedError, SaveError
from dsgpt.model.safetensors_folder import DTYPE_NAMES, bytes_of
from dsgpt.partitioned import Fragment

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Saved:
    """`seconds` from `begin` to the commit; `retries` of writes; `takeovers`: writer processes that were lost."""

    step: int
    path: Path
    seconds: float
    retries: int
    takeovers: int


@dataclass
class _Part:
    """What one rank has done of a save."""

    entries: dict[str, Any] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] | None = None
    retries: int = 0
    takeovers: int = 0
    error: str = ""


@dataclass
class _Pending:
    """A save under way: its temporary folder, rank 0's manifest, this rank's part."""

    step: int
    folder: Path
    manifest: dict[str, Any]
    part: _Part
    began: float


class Saver:
    """Writes and commits checkpoints of one engine; all ranks call everything but `is_written` together.

    `guard` is called on rank 0 right before the commit; what it raises is raised there, and PeerError on the others.
    A writer process that dies, or does not answer for `patience_seconds`, is replaced by the rank itself, for good.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        checkpoints_dir: Path,
        guard: Callable[[], None] = lambda: None,
        asynchronous: bool = False,
        patience_seconds: float = math.inf,
    ):
        self.engine, self.world, self.checkpoints_dir, self.guard = engine, world, checkpoints_dir, guard
        self.asynchronous, self.patience_seconds = asynchronous, patience_seconds
        self.pending: _Pending | None = None
        self._frozen: tuple[Path, dict[str, Any]] | None = None  # where this rank's frozen file lies already, its entry
        self._memory: mmap.mmap | None = None
        self._writer: WriterProcess | None = None

    def for_engine(self, engine: Engine) -> Saver:
        """One like this for another engine of the run; close this one first."""
        return Saver(engine, self.world, self.checkpoints_dir, self.guard, self.asynchronous, self.patience_seconds)

    def begin(self, manifest: Mapping[str, Any], attempt: str, wait: bool = False) -> None:
        """Take the state of this moment; with `wait`, or synchronously, it is written on return. Raises SaveError.

        `manifest` is rank 0's; it holds at least "step".
        """
        assert self.pending is None, "finish the last save first"
        began, step = time.monotonic(), manifest["step"]
        folder, retries = _begin(self.world, self.checkpoints_dir, step, attempt)
        buffers = {name: list(value.shape) for name, value in self.engine.buffers().items()}
        contents = {**manifest, "buffers": buffers, "frozen": self._frozen_index()}
        part = _Part(retries=retries)
        self.pending = _Pending(step, folder, contents, part, began)
        try:
            fragments = self.engine.fragments()
            if self.engine.stage in (1, 2):
                part.ranges = [(f.name, f.start, f.numel) for f in fragments]
            self._put_frozen(folder, part)
            layout, values = self._partition(fragments)
            path = folder / partition_file(self.world.rank)
            if self.asynchronous and not wait:
                self._hand_over(path, layout, values)
            else:
                self._write(path, part, layout, values)
        except Exception as problem:  # whatever it is, this rank must still meet the others in `finish`
            part.error = f"rank {self.world.rank}: {problem}"

    def is_written(self) -> bool:
        """Whether this rank's writer has answered, or is lost: then `finish` writes. Costs nothing and waits for nobody."""
        if self.pending is None or self._writer is None or self._job is None:
            return True
        if self._answer is None:
            self._answer = self._writer.poll()
        if self._answer is None and time.monotonic() - self.pending.began > self.patience_seconds:
            self._answer = {"died": "no answer"}
        return self._answer is not None

    def finish(self) -> Saved:
        """Wait for the writers of all ranks and commit. Raises SaveError on every rank when any rank failed.

        Then nothing is committed and the temporary folder is removed.
        """
        pending = self.pending
        assert pending is not None
        while not self.is_written():
            time.sleep(POLL_SECONDS / 10)
        if self._job is not None:
            self._settle(self._answer or {"died": "closed"})
        self.pending = None
        gathered = self.world.gather_objects(pending.part)
        path, failure, forbidden, retries, takeovers = "", "", None, 0, 0
        if gathered is not None:
            again = [part.retries for part in gathered]
            failure = "; ".join(part.error for part in gathered if part.error)
            try:
                if not failure:
                    contents = self._contents(pending, gathered)
                    path = str(commit.commit(self.checkpoints_dir, pending.folder, contents, self.guard, again.append))
            except OSError as problem:
                failure = str(problem)
            except LockedError as problem:
                forbidden = problem
            if failure or forbidden:
                shutil.rmtree(pending.folder, ignore_errors=True)
            retries, takeovers = sum(again), sum(part.takeovers for part in gathered)
        self.world.agree(forbidden, "committing the checkpoint")
        path, failure, retries, takeovers = self.world.broadcast_object((path, failure, retries, takeovers))
        if takeovers:
            self.asynchronous = False
            self.close()
        if failure:
            what = f"the checkpoint of step {pending.step} was not written"
            raise SaveError(what, seen=failure, do="free space, or mend the disk")
        name = frozen_file(self.world.rank)
        if name in pending.part.entries:
            self._frozen = Path(path) / name, pending.part.entries[name]
        return Saved(pending.step, Path(path), time.monotonic() - pending.began, retries, takeovers)

    def close(self) -> None:
        """End the writer process, and give its memory back; what it was writing stays unfinished."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._memory = None

    # ---- this rank's files ---------------------------------------------------------------------------------------

    def _partition(self, fragments: Sequence[Fragment]) -> tuple[Layout, dict[str, Callable[[], Tensor]]]:
        """The layout of this rank's file and, by name, how to get at each tensor."""
        values: dict[str, Callable[[], Tensor]] = {}
        table: list[tuple[str, str, Sequence[int]]] = []
        for fragment in fragments:
            for kind in self.engine.state_kinds:
                name = f"{kind}:{fragment.name}"
                values[name] = lambda fragment=fragment, kind=kind: self.engine.read(fragment, kind)  # type: ignore[misc]
                table.append((name, "F32", (fragment.numel,)))
        if self.world.rank == 0:
            for name, buffer in self.engine.buffers().items():
                values[buffer_key(name)] = lambda buffer=buffer: buffer  # type: ignore[misc]
                table.append((buffer_key(name), DTYPE_NAMES[buffer.dtype], tuple(buffer.shape)))
        starts = {fragment.name: fragment.start for fragment in fragments}
        return Layout(table, {"starts": json.dumps(starts)}), values

    def _write(self, path: Path, part: _Part, layout: Layout, values: Mapping[str, Callable[[], Tensor]]) -> None:
        """In the foreground, one tensor at a time in host memory."""

        def write() -> dict[str, Any]:
            return write_file(path, layout.header, (_host_bytes(values[name]()) for name in layout.ranges))

        part.entries[path.name], retries = commit.retrying(write)
        part.retries += retries

    def _hand_over(self, path: Path, layout: Layout, values: Mapping[str, Callable[[], Tensor]]) -> None:
        """Copy everything into memory that the writer process shares, and let it write."""
        size = len(layout.header) + layout.data_bytes
        if self._memory is None or len(self._memory) < size or self._writer is None:
            self.close()
            descriptor = os.memfd_create("dsgpt-checkpoint")
            try:
                os.ftruncate(descriptor, max(size, 1))
                self._memory = mmap.mmap(descriptor, 0)
                self._writer = WriterProcess(descriptor)
            finally:
                os.close(descriptor)
        self._memory[: len(layout.header)] = layout.header
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        for name, (start, stop) in layout.ranges.items():
            whole[start:stop].copy_(values[name]().detach().contiguous().view(-1).view(torch.uint8))
        self._job, self._answer = (path, len(layout.header), layout.data_bytes), None
        if not self._writer.write(*self._job):
            self._answer = {"died": "before it was asked"}

    def _settle(self, answer: dict[str, Any]) -> None:
        """Take the writer's answer; where it has none, write from the same memory here."""
        assert self.pending is not None and self._job is not None and self._memory is not None
        (path, header_bytes, data_bytes), part = self._job, self.pending.part
        self._job = None
        if "died" in answer:
            if self._writer is not None:
                self._writer.close()
            part.takeovers += 1
            try:
                entry, retries = write_memory(memoryview(self._memory), path, header_bytes, data_bytes)
                answer = {"entry": entry, "retries": retries}
            except OSError as problem:
                answer = {"error": str(problem)}
        if "error" in answer:
            part.error = f"rank {self.world.rank}: {answer['error']}"
        else:
            part.entries[path.name] = answer["entry"]
            part.retries += answer["retries"]

    _job: tuple[Path, int, int] | None = None  # what the writer was asked, and its answer once it is there
    _answer: dict[str, Any] | None = None

    # ---- what is not trained -------------------------------------------------------------------------------------

    def continue_from(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        """The engine's state was read from this checkpoint: link what is frozen there too, where it is divided as here."""
        entry = manifest["files"].get(frozen_file(self.world.rank))
        if entry is not None and manifest.get("frozen") == self._frozen_index():
            self._frozen = checkpoint / frozen_file(self.world.rank), entry

    @property
    def frozen_bytes(self) -> int:
        """That the next save writes, over all ranks, because no checkpoint has them yet."""
        shapes = self.engine.frozen_shapes().values() if self._frozen is None else ()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    def _frozen_index(self) -> dict[str, Any]:
        return {
            name: {"shape": list(shape), "dtype": DTYPE_NAMES[dtype], "piece": -(-math.prod(shape) // self.world.size)}
            for name, (shape, dtype) in self.engine.frozen_shapes().items()
        }

    def _put_frozen(self, folder: Path, part: _Part) -> None:
        """Link this rank's share of the frozen parameters from the last checkpoint, or write it."""
        fragments = self.engine.frozen_fragments()
        if not fragments:
            return
        path = folder / frozen_file(self.world.rank)
        if self._frozen is not None:
            with contextlib.suppress(OSError):  # deleted meanwhile, or a file system without links
                os.link(self._frozen[0], path)
                part.entries[path.name] = self._frozen[1]
                return
        shapes = self.engine.frozen_shapes()
        layout = Layout([(f.name, DTYPE_NAMES[shapes[f.name][1]], (f.numel,)) for f in fragments])
        by_name = {fragment.name: fragment for fragment in fragments}
        values = {name: lambda name=name: self.engine.read_frozen(by_name[name]) for name in by_name}
        self._write(path, part, layout, values)  # type: ignore[arg-type]

    def _contents(self, pending: _Pending, parts: Sequence[_Part]) -> dict[str, Any]:
        """The manifest: what the run gave, all files, and where each range lies."""
        files = {name: entry for part in parts for name, entry in part.entries.items()}
        index = _index(self.engine, self.world, [part.ranges or () for part in parts])
        return {**pending.manifest, "files": files, "parameters": index}


def _index(engine: Engine, world: World, ranges: Sequence[Sequence[tuple[str, int, int]]]) -> dict[str, Any]:
    """{name: {"shape", "fragments": [[rank, start, numel], …]}}, or "piece": elements per rank where all are equal."""
    index: dict[str, Any] = {name: {"shape": list(shape)} for name, shape in engine.parameter_shapes().items()}
    if engine.stage not in (1, 2):
        for entry in index.values():
            entry["piece"] = -(-math.prod(entry["shape"]) // world.size)
        return index
    for entry in index.values():
        entry["fragments"] = []
    for rank, owned in enumerate(ranges):
        for name, start, numel in owned:
            index[name]["fragments"].append([rank, start, numel])
    return index


def _host_bytes(tensor: Tensor) -> memoryview:
    return bytes_of(tensor.detach().cpu().contiguous())


def save_checkpoint(
    engine: Engine,
    world: World,
    checkpoints_dir: Path,
    attempt: str,
    manifest: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Write and commit one checkpoint, and return its folder. Raises as `Saver` does."""
    saver = Saver(engine, world, checkpoints_dir, guard)
    saver.begin(manifest, attempt)
    return saver.finish().path


def _begin(world: World, checkpoints_dir: Path, step: int, attempt: str) -> tuple[Path, int]:
    """Rank 0 makes the temporary folder; no rank writes before it is there. (folder, retries on rank 0)."""
    folder, failure, retries = "", "", 0
    if world.is_main:
        try:
            made, retries = commit.retrying(lambda: commit.begin(checkpoints_dir, step, attempt))
            folder = str(made)
        except OSError as problem:
            failure = str(problem)
    folder, failure = world.broadcast_object((folder, failure))
    if failure:
        raise SaveError(f"the checkpoint of step {step} cannot be begun", seen=failure)
    return Path(folder), retries
