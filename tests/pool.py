"""Real ranks for tests: processes that have imported torch and DeepSpeed once and joined a gloo group.

    results = ranks(2).run(function, argument)        # function(world, argument) on every rank, results in rank order

Starting DeepSpeed costs seconds, so a pool lives as long as the test session. A task that fails or hangs ends the pool;
the next test gets a fresh one. Functions must be importable by name (module level in a test file).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from typing import Any

from dsgpt.process import free_port

_POOLS: dict[int, RankPool] = {}


class RankPool:
    def __init__(self, size: int):
        self.size = size
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Any, *arguments: Any, timeout: float = 180) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                failures.append(f"rank {rank}: no answer in {timeout} s")
                continue
            good, value = pipe.recv()
            (results if good else failures).append(value)
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        if _POOLS.get(self.size) is self:
            del _POOLS[self.size]


def ranks(size: int) -> RankPool:
    """The session's pool of `size` ranks."""
    if size not in _POOLS:
        _POOLS[size] = RankPool(size)
    return _POOLS[size]


def close_all() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


def _serve(pipe: Any, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    from dsgpt import distributed, engine

    torch.set_num_threads(1)
    engine.prepare_process()
    world = distributed.start("cpu")
    engine.init_distributed(world)
    linear = torch.nn.functional.linear
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(world, *arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        # DeepSpeed may replace F.linear for the whole process (memory_efficient_linear).
        torch.nn.functional.linear = linear
        gc.collect()
