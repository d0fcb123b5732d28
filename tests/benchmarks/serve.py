"""`dsgpt serve` under 50 streaming clients at once: none lost, memory flat over 1,000 requests, wrong ones answered by 4xx.

A real server process with a small Llama of random weights; the clients are threads with the openai client. Memory is the
server's resident size, after each hundred requests: what it grows from the first hundreds to the last ones is what leaks.
Every answer is compared with that of the first client with the same prompt.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.frame import Outcome, Row

CLIENTS, EACH_REPORT, NEW = 50, 100, 24
MOST_GROWTH = 8.0  # MB from the third hundred to the last: what the allocator moves about
WRONG = (
    b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "temperature": -1}', b'{"prompt": "x", "n": 3}',
    b'{"prompt": "' + b"word " * 5000 + b'"}', b'{"prompt": "' + b"x" * (6 << 20) + b'"}',
)  # fmt: skip


def run(trials: int | None, seed: int) -> Outcome:
    """1,000 requests unless `trials` says otherwise."""
    requests = trials or 1000
    with tempfile.TemporaryDirectory(prefix="dsgpt-serve-") as name:
        folder = _model(Path(name), seed)
        with _serving(folder) as (process, url):
            rows = _load(process.pid, url, requests)
    return Outcome(rows, requests)


def _model(folder: Path, seed: int) -> Path:
    from tests.hf_models import make_hf_folder
    from tests.run_fixtures import make_dataset

    dataset = make_dataset(folder / "dataset")
    return make_hf_folder(folder / "model", "llama", dataset.parent / "tokenizer", 300, max_position_embeddings=256)


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "dsgpt", "serve", str(folder), "--port", "0", "--name", "model"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        yield process, url
    finally:
        process.terminate()
        process.wait()


def _load(pid: int, url: str, requests: int) -> list[Row]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    first: dict[str, str] = {}

    def ask(number: int) -> tuple[str, str, str | None, float]:
        prompt, began, text, finish = f"def f{number % 7}(x):", time.monotonic(), "", None
        for piece in client.completions.create(
            model="model", prompt=prompt, max_tokens=NEW, temperature=0, stream=True
        ):
            text, finish = text + piece.choices[0].text, piece.choices[0].finish_reason or finish
        return prompt, text, finish, time.monotonic() - began

    lost, different, seconds, sizes = 0, 0, [], []
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in range(0, requests, EACH_REPORT):
            for prompt, text, finish, took in threads.map(ask, range(done, min(requests, done + EACH_REPORT))):
                lost += finish is None
                different += first.setdefault(prompt, text) != text
                seconds.append(took)
            sizes.append(_resident(pid))
    took = time.monotonic() - began
    refused = sum(400 <= _status(url, body) < 500 for body in WRONG)
    growth = sizes[-1] - sizes[min(2, len(sizes) - 1)]
    tokens = requests * NEW / took
    return [
        Row("requests lost", lost, at_most=0, note=f"of {requests}, {CLIENTS} at once; {tokens:.0f} tokens/s"),
        Row("answers that differ", different, at_most=0, note="from the first one to the same prompt"),
        Row("growth of memory", growth, "MB", at_most=MOST_GROWTH, note=", ".join(f"{size:.0f}" for size in sizes)),
        Row("wrong requests answered by 4xx", refused, at_least=len(WRONG), note=f"of {len(WRONG)}"),
        Row("seconds of an answer, median", statistics.median(seconds), "s", note=f"slowest {max(seconds):.2f}"),
        Row("answers after all of these", float(ask(0)[2] is not None), at_least=1),
    ]


def _resident(pid: int) -> float:
    """MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _status(url: str, body: bytes) -> int:
    request = urllib.request.Request(f"{url}/completions", data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        json.load(error)  # in its form too
        return int(error.code)
