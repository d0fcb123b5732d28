"""Helpers to read what a file holds in one call."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsgpt.data.sources import BadLine, Document, Documents, LargeDocument, Piece, Reading, read_documents, read_records


def whole(path: str | Path) -> Piece:
    return Piece(str(path), 0, Path(path).stat().st_size)


def read(path: str | Path, documents: Documents = "file", text: str = "text") -> list[Any]:
    return list(read_documents(whole(path), Reading(text, documents)))


def texts(path: str | Path, documents: Documents = "file", text: str = "text") -> list[str]:
    """The texts of a file without bad records; that the two forms of each are the same text is checked."""
    found = read(path, documents, text)
    assert all(isinstance(item, Document) and item.utf8 == item.text.encode() for item in found), found
    return [item.text for item in found]


def kept_and_bad(
    path: str | Path, documents: Documents = "file"
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """((line, text) of what is good, (line, reason) of what is not)."""
    found = read(path, documents)
    assert not any(isinstance(item, LargeDocument) for item in found)
    good = [(item.line, item.text) for item in found if isinstance(item, Document)]
    return good, [(item.line, item.reason) for item in found if isinstance(item, BadLine)]


def records(path: str | Path) -> list[Any]:
    return list(read_records(whole(path)))


def in_pieces(path: Path, cuts: list[int], reading: Reading) -> list[tuple[Piece, Any]]:
    edges = [0, *cuts, path.stat().st_size]
    pieces = [Piece(str(path), start, stop) for start, stop in pairwise(edges)]
    return [(piece, item) for piece in pieces for item in read_documents(piece, reading)]


_PEAK = """
import os, resource, sys
from dsgpt.data.sources import Piece, Reading, read_documents
limit = int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
items = list(read_documents(Piece(sys.argv[1], 0, os.path.getsize(sys.argv[1])), Reading("text", sys.argv[3])))
print([(item.line, getattr(item, "reason", "") or getattr(item, "text", "")) for item in items])
"""


def read_within(megabytes: int, path: Path, documents: str = "file") -> str:
    """What is read from a file by a process that the kernel gives so much memory: (line, reason or text) as printed."""
    command = [sys.executable, "-c", _PEAK, str(path), str(megabytes), documents]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
