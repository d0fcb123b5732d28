"""A hub of one's own: an HTTP server on loopback that speaks as much of the Hugging Face hub's API as a download needs.

Files of at least `LARGE` bytes have a sha256 (as git LFS gives them), smaller ones git's own sha1. What goes wrong is set
on a `Repository`; what was asked for is counted. A client is another process, because huggingface_hub reads its environment
when it is imported: `Hub.run(...)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE = 1000
TOKEN = "hf_never_to_be_printed"


@dataclass
class Repository:
    """Files by name at one commit, and what is wrong with them."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    gated: bool = False
    refused_token: bool = False
    breaks: dict[str, int] = field(default_factory=dict)  # name -> so many GETs end at half of what is left
    unavailable: set[str] = field(default_factory=set)  # names answered with 503 after their first GET
    other_bytes: dict[str, bytes] = field(default_factory=dict)  # name -> what arrives instead
    claimed_size: dict[str, int] = field(default_factory=dict)

    def digest(self, name: str) -> str:
        content = self.files[name]
        if len(content) >= LARGE:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listing(self, name: str) -> dict:
        siblings = []
        for file, content in self.files.items():
            size = self.claimed_size.get(file, len(content))
            lfs = {"size": size, "sha256": self.digest(file), "pointerSize": 130}
            one = {"rfilename": file, "size": size, "blobId": "0" * 40 if len(content) >= LARGE else self.digest(file)}
            siblings.append({**one, "lfs": lfs} if len(content) >= LARGE else one)
        return {"id": name, "sha": self.commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}


class Hub:
    """Repositories by path ("models/owner/name"), GETs of files by name, and the tokens that came with them."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.gets: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.endpoint = ""

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **variables,
        }

    def run(self, home: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """`python WORDS` as a client of this hub."""
        environment = self.environment(home, **variables)
        words = (sys.executable, *map(str, words))
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture()
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/"):
            name, _, revision = path.removeprefix("api/").partition("/revision/")
            self._list(name, revision)
            return
        place, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.hub.repositories.get(place if place.startswith("datasets/") else f"models/{place}")
        if repository is None or file not in repository.files or revision not in ("main", repository.commit):
            self._refuse(404, "EntryNotFound" if repository else "RepoNotFound")
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._send_file(repository, file, with_body)

    def _list(self, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif repository.refused_token:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif revision not in ("", "main", repository.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            body = json.dumps(repository.listing(name.partition("/")[2])).encode()
            self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            self.wfile.write(body)

    def _send_file(self, repository: Repository, name: str, with_body: bool) -> None:
        content = repository.other_bytes.get(name, repository.files[name])
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        common = {"ETag": f'"{repository.digest(name)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if with_body:
            self.hub.gets[name] += 1
            self.hub.ranges += [(name, asked)] if asked else []
            if name in repository.unavailable and self.hub.gets[name] > 1:
                self._refuse(503, "")
                return
        body = content[start:]
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._head(206 if asked else 200, {**common, **part, "Content-Length": str(len(body))})
        if with_body and repository.breaks.get(name, 0) > 0:
            repository.breaks[name] -= 1
            body = body[: len(body) // 2]
        if with_body:
            self.wfile.write(body)

    def _refuse(self, code: int, error: str, message: str = "") -> None:
        self._head(code, {"X-Error-Code": error, "X-Error-Message": message or error, "Content-Length": "0"})

    def _head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
