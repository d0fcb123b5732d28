"""One thread that decodes all requests together: new ones join between two steps, those that are done or given up leave.

    worker = Worker(loaded, batch_size=16, max_waiting=128)
    job = worker.submit(prompt, sampling, deliver)      # deliver(Event) is called from the worker's thread
    worker.cancel(job)

A model has one user at a time, so no lock is held while it computes. Memory is bounded: by the rows in the batch, each no
longer than the context, and by the number that may wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dsgpt.checkpoint.inference import Loaded
from dsgpt.generate.decoder import Decoder
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import Continuation, Prompt
from dsgpt.process import complain


@dataclass(frozen=True)
class Event:
    """More text of an answer; its last one has `finish`, or `error`."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A request on its way through the worker."""

    prompt: Prompt
    sampling: Sampling
    deliver: Callable[[Event], None]
    given_up: bool = False
    answer: Continuation | None = None


class Worker:
    """`submit` and `cancel` may be called from any thread."""

    def __init__(self, loaded: Loaded, batch_size: int, max_waiting: int):
        self._decoder, self._tokenizer = Decoder(loaded.model), loaded.tokenizer
        self.context = self._decoder.context
        self._batch_size, self._max_waiting = batch_size, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()  # guards `_waiting`
        self._active: list[Job] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None]) -> Job | None:
        """None where too many wait already."""
        job = Job(prompt, sampling, deliver)
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                return None
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody reads this answer any more."""
        job.given_up = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Give up what is running and end the thread."""
        self._closing = True
        with self._changed:
            self._changed.notify()
        self._thread.join(timeout=60)

    @property
    def load(self) -> dict[str, int]:
        """How many requests are being decoded, and how many wait."""
        return {"running": len(self._active), "waiting": len(self._waiting)}

    def _run(self) -> None:
        while not self._closing:
            try:
                self._admit()
                self._decoder.step()
                self._tell()
            except Exception as error:  # out of memory, say: these answers are lost, the server goes on
                complain(f"decoding failed, {len(self._active)} answers are lost: {error!r}")
                for job in self._active:
                    job.deliver(Event(error=error))
                self._active = []
                self._decoder.clear()

    def _admit(self) -> None:
        """Let waiting requests in, no more than the batch has places between two steps: the others wait for their prompts
        to be read. Where nothing else is to do, wait for one."""
        for _ in range(self._batch_size - len(self._active)):
            with self._changed:
                if not self._waiting and not self._active and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                job.answer = Continuation(self._decoder, self._tokenizer, job.prompt, job.sampling)
            except Exception as error:  # out of memory, say: this answer alone is lost
                job.deliver(Event(error=error))
                continue
            self._active.append(job)
            self._tell()

    def _tell(self) -> None:
        for job in self._active:
            assert job.answer is not None
            row = job.answer.row
            if job.given_up:
                row.finish = row.finish or "stop"
                continue
            text = job.answer.news()
            if row.error is not None:
                job.deliver(Event(text, error=row.error))
            elif text or row.finish is not None:
                job.deliver(Event(text, row.finish, len(row.new)))
        self._active = [job for job in self._active if job.answer is not None and job.answer.row.finish is None]
