"""The saver beside a writer process that is lost: who writes then, and when."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.saver import Saver
from dsgpt.distributed import World
from dsgpt.partitioned import Fragment

VALUES = torch.arange(1000.0)


class OneTensor:
    """What a saver asks of an engine, with one parameter."""

    stage, state_kinds = 0, ("master",)

    def parameter_shapes(self):
        return {"w": (1000,)}

    def fragments(self):
        return [Fragment("w", 0, 1000)]

    def read(self, fragment, kind):
        return VALUES

    def buffers(self):
        return {}

    frozen_shapes = buffers

    def frozen_fragments(self):
        return []


def manifest(step):
    return {"step": step, "state_kinds": ["master"]}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_writer_is_replaced_where_the_save_is_finished_and_its_memory_is_given_back(tmp_path, number):
    """Asked in the middle of a step, which has a third of a save's time, the saver must not begin to write there."""
    saver = Saver(OneTensor(), World(), tmp_path, asynchronous=True, patience_seconds=0.5)
    saver.begin(manifest(1), "a")
    assert saver.finish().takeovers == 0
    os.kill(saver._writer.pid, number)
    saver.begin(manifest(2), "a")
    until = time.monotonic() + 20
    while not saver.is_written() and time.monotonic() < until:
        time.sleep(0.01)
    assert saver.is_written() and not list(tmp_path.glob(".tmp-*/*"))
    saved = saver.finish()
    assert saved.takeovers == 1 and not saver.asynchronous
    assert CheckpointReader(saved.path).tensor("w").equal(VALUES)
    assert saver._memory is None and saver._writer is None
    saver.begin(manifest(3), "a")
    assert CheckpointReader(saver.finish().path).tensor("w").equal(VALUES)
