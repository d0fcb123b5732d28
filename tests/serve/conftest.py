"""A server in a process of its own, on a small model of transformers with a chat template."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests import chat_folder
from tests.hf_models import make_hf_folder

model_folder = chat_folder.model_folder


@contextmanager
def serving(folder, *options, **environment):
    """(process, URL) of `dsgpt serve` on a free port, once it answers."""
    command = [
        sys.executable,
        "-m",
        "dsgpt",
        "serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        *map(str, options),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://\S+", line):
                yield process, found[0]
                return
        raise AssertionError("".join(said))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def long_folder(dataset, tmp_path_factory):
    """A context that takes minutes to fill."""
    folder = tmp_path_factory.mktemp("long") / "long"
    return make_hf_folder(
        folder, "llama", dataset.parent / "tokenizer", 300, max_position_embeddings=30_000, eos_token_id=None
    )


@pytest.fixture(scope="session")
def server(model_folder):
    """Its URL."""
    with serving(model_folder, "--batch-size", 8) as (_, url):
        yield url


@pytest.fixture
def client(server):
    import openai

    return openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=60)
