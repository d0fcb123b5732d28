"""Runs tasks in worker processes and adds up what they report while they work.

    with Pool(4) as pool:
        for result in pool.run(function, [(1, "a"), (2, "b")], on_progress): ...

Workers are started afresh (spawn), so they inherit no threads, locks or accelerators; with one worker the tasks run in
this process, which spares small jobs the start. A worker dies with its parent: nobody has to look for orphans after a
kill -9.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, fields
from typing import Any, TypeVar

from dsgpt.errors import DsgptError

Result = TypeVar("Result")
_TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Counts:
    """What was done so far."""

    num_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    bad_lines: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class _Cancelled(Exception):
    """Ends a task whose result nobody waits for any more."""


# Where `count` goes: set in each worker process by _start_worker, in the parent while tasks run there.
_report: Callable[[Counts], None] | None = None


def count(**amounts: int) -> None:
    """Called by a task, a few times a second, to say what it has done since it last said so. Names as in Counts."""
    if _report is not None:
        _report(Counts(**amounts))


class Pool:
    """`workers` processes, started at the first task and ended on leaving the with block."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("spawn")
        self._workers = workers
        self._context = context
        self._executor: ProcessPoolExecutor | None = None
        self._totals = context.Array("q", len(fields(Counts)))
        self._stop = context.RawValue("b", 0)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is not None:
            # After an error or Ctrl-C nobody waits for half-done work.
            self._stop.value = kind is not None
            self._executor.shutdown(cancel_futures=True)

    def ask(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """One call in a worker, while this process does other things; with one worker it happens here and now.

        All workers start with it, and import what the function needs.
        """
        if self._workers == 1:
            future: Future[Result] = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future
        futures = [self._started().submit(function, *arguments) for _ in range(self._workers)]
        return futures[0]

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._workers, self._context, initializer=_start_worker, initargs=(self._totals, self._stop)
            )
        return self._executor

    def run(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], tell: Callable[[Counts], None]
    ) -> Generator[Result, None, None]:
        """Results as they come, in any order; close the iterator to do without the rest.

        `tell` gets the counts of this run some times a second and at the end.

        Raises what a task raised, and DsgptError where a worker was killed.
        """
        tell(Counts())
        if self._workers == 1 or len(tasks) <= 1:
            yield from _run_here(function, tasks, tell)
        else:
            yield from self._run_apart(function, tasks, tell)

    def _run_apart(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], tell: Callable[[Counts], None]
    ) -> Generator[Result, None, None]:
        self._totals[:] = [0] * len(self._totals)
        waiting: set[Future[Result]] = set()
        try:
            executor = self._started()
            waiting = {executor.submit(function, *task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, timeout=_TICK_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                tell(Counts(*self._totals[:]))
        except BrokenProcessPool as error:
            raise DsgptError(
                "a worker process died",
                seen=f"{self._workers} workers; most often the machine ran out of memory",
                do="run the same command again with fewer --workers; finished parts are kept",
            ) from error
        finally:
            # After an error, and where nobody wants the rest, no task may go on behind the caller's back.
            self._stop.value = 1
            for future in waiting:
                future.cancel()
            wait(waiting)
            self._stop.value = 0


def _run_here(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], tell: Callable[[Counts], None]
) -> Iterator[Result]:
    global _report
    totals, told = Counts(), time.monotonic()

    def report(counts: Counts) -> None:
        nonlocal totals, told
        totals += counts
        if time.monotonic() - told > _TICK_SECONDS:
            told = time.monotonic()
            tell(totals)

    for task in tasks:
        _report = report
        try:
            result = function(*task)
        finally:
            _report = None
        yield result
    tell(totals)


def _start_worker(totals: Any, stop: Any) -> None:
    global _report

    def report(counts: Counts) -> None:
        if stop.value:
            raise _Cancelled
        with totals.get_lock():
            for i, amount in enumerate(astuple(counts)):
                totals[i] += amount

    _report = report
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
