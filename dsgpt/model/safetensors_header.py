"""The header of a safetensors file: where its tensors lie. What dsgpt writes and reads itself goes through here.

    header, places = lay_out([("w", "F32", (4, 3))])        # to be followed by w's 48 bytes
    header, places = read_header(lambda position, size: os.pread(descriptor, size, position))

A file is eight bytes of length, that many of JSON, and the tensors one after another without a gap. A header that says
anything else is refused, so that what is read by position is what was written there, or no tensor at all.

Neither torch nor numpy is imported: the process that writes checkpoints starts in 0.1 s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
LENGTH_BYTES = 8  # of the header, before it
_LARGEST_HEADER = 100_000_000  # the format's own limit
_MOST = 1 << 62  # of anything counted here; torch counts in 64 bits
_METADATA = "__metadata__"


class Place(NamedTuple):
    """A tensor in a file: its safetensors dtype, its shape, positions of its first byte and of the one after its last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return ITEM_BYTES[dtype] * math.prod(shape)


def lay_out(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, Place]]:
    """Header of a file that holds tensors (name, safetensors dtype, shape) in this order, and their places in it."""
    table: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    sizes, position = {}, 0
    for name, dtype, shape in tensors:
        size = num_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        sizes[name], position = (dtype, tuple(shape), position, position + size), position + size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    begin = LENGTH_BYTES + len(text)
    places = {name: Place(dtype, shape, begin + a, begin + b) for name, (dtype, shape, a, b) in sizes.items()}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, places


def read_header(read: Callable[[int, int], bytes]) -> tuple[bytes, dict[str, Place]]:
    """The header's bytes and the places of the tensors, in their order in the file.

    `read(position, size)` gives bytes of the file and raises where there are not that many. Raises ValueError, which says
    what is wrong.
    """
    first = read(0, LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    if length > _LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    text = read(LENGTH_BYTES, length)
    try:
        table = json.loads(text)
    except RecursionError as error:
        raise ValueError("a header nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("a header that is no JSON object")
    found = [(name, _place(name, entry, LENGTH_BYTES + length)) for name, entry in table.items() if name != _METADATA]
    found.sort(key=lambda one: (one[1].start, one[1].stop))
    end = LENGTH_BYTES + length
    for name, place in found:
        if place.start != end:
            raise ValueError(f"{name!r} begins at byte {place.start}, where byte {end} is next")
        end = place.stop
    return first + text, dict(found)


def _place(name: str, entry: Any, begin: int) -> Place:
    """An entry of the table in a file whose tensors begin at a byte."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} has dtype {dtype!r}, which is not read")
    if any(type(number) is not int or not 0 <= number < _MOST for number in (*shape, start, stop)):
        raise ValueError(f"{name!r} has shape {list(shape)} and offsets {start!r} to {stop!r}")
    if stop - start != num_bytes(dtype, shape):
        raise ValueError(
            f"{name!r} has {stop - start} bytes, and {num_bytes(dtype, shape)} are its {dtype} {list(shape)}"
        )
    return Place(dtype, shape, begin + start, begin + stop)
