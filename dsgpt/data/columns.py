"""Reads rows of .parquet and .arrow files, `datasets.save_to_disk` folders and data sets of the Hugging Face Hub.

    for item in read_parquet(piece, reading): ...      also read_arrow, read_hub
    saved_files(folder)                                the files of a save_to_disk folder, in its order

A row group (.parquet) or record batch (.arrow) belongs to the piece in which its first byte lies, so large files feed
many workers. Only the columns that are asked for are read, some megabytes at once.

Trade-off: an .arrow stream has no table of contents, so each piece steps over the batches before it; that costs
microseconds for each. A stream without its end mark is refused: whoever wrote it may have been killed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsgpt.data.formats import BadLine, Piece, Record, Row, excerpt_of, reason_of
from dsgpt.errors import DataError

HUB = "hf:"
_BATCH_BYTES = 16 << 20
_PIECEMEAL = {
    "pre_buffer": False,
    "buffer_size": 1 << 20,
}  # a row group can be most of the file, so it is not read whole
_FILE_MAGIC, _END_MARKS = b"ARROW1", (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")
_HUB_NAME = re.compile(r"hf:(?P<name>[^@#]+)(@(?P<revision>[^#]+))?(#(?P<split>.+))?")


def read_parquet(piece: Piece, fields: tuple[str, ...]) -> Iterator[Row]:
    """The fields named, which have to be text; all there are where none is named."""
    import pyarrow.parquet

    with _naming(piece.path), pyarrow.parquet.ParquetFile(piece.path, **_PIECEMEAL) as file:
        _check_columns(piece.path, file.schema_arrow, fields)
        before = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if piece.start <= _first_byte(group) < piece.stop:
                rows = max(1, group.num_rows * _BATCH_BYTES // max(1, group.total_byte_size))
                row = before
                for batch in file.iter_batches(min(rows, 4096), [number], columns=list(fields) or None):
                    yield from _rows(batch, row, decode=bool(fields))
                    row += batch.num_rows
            before += group.num_rows


def _first_byte(group: Any) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return min(
        int(min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)) for chunk in chunks
    )


def read_arrow(piece: Piece, fields: tuple[str, ...]) -> Iterator[Row]:
    """As read_parquet, of Arrow files and streams."""
    import pyarrow

    with _naming(piece.path), open(piece.path, "rb") as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            raise EOFError("no bytes at all")
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if not mapped[-8:].endswith(_END_MARKS):
            raise EOFError("no end mark: the file is cut off, or its writer was stopped")
        file = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
        # A file is a stream between a magic number, padded to 8 bytes, and a table of contents.
        file.seek(8 if mapped[: len(_FILE_MAGIC)] == _FILE_MAGIC else 0)
        with pyarrow.ipc.open_stream(file) as stream:
            _check_columns(piece.path, stream.schema, fields)
            before, position = 0, file.tell()
            for batch in stream:
                if piece.start <= position < piece.stop:
                    for some, row in _slices(batch.select(fields) if fields else batch):
                        yield from _rows(some, before + row, decode=bool(fields))
                        mapped.madvise(mmap.MADV_DONTNEED)  # else all of the file would count as memory of this process
                before, position = before + batch.num_rows, file.tell()


def _slices(batch: Any) -> Iterator[tuple[Any, int]]:
    """Some megabytes of a record batch, and the rows before them; whole tables are written as one batch, too."""
    rows = max(1, batch.num_rows * _BATCH_BYTES // max(1, batch.nbytes))
    return ((batch.slice(row, rows), row) for row in range(0, batch.num_rows, rows))


def _rows(batch: Any, before: int, decode: bool) -> Iterator[Row]:
    """The records of a record batch, which comes after `before` rows; with `decode`, binary columns are text."""
    names, columns = batch.schema.names, batch.columns
    for i in range(batch.num_rows):
        try:
            values = (column[i].as_py() for column in columns)
            decoded = (value.decode("utf-8") if decode and isinstance(value, bytes) else value for value in values)
            yield Record(before + i + 1, dict(zip(names, decoded, strict=True)))
        except UnicodeDecodeError as error:
            yield BadLine(before + i + 1, reason_of(error), excerpt_of(error.object))


def _check_columns(path: str, schema: Any, fields: tuple[str, ...]) -> None:
    """Every row would fail alike, so a table without the columns is refused as a whole."""
    import pyarrow.types as kinds

    for name in fields:
        if name not in schema.names:
            raise _no_column(f"{path}: no column {name}; columns: {', '.join(schema.names) or 'none'}")
        kind = schema.field(name).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
        if not any(getattr(kinds, test)(kind) for test in tests):
            raise _no_column(f"{path}: column {name} is {kind}, not text")


def _no_column(seen: str) -> DataError:
    do = "name a column that holds text, or a template of some, as the text field"
    return DataError("a table does not have the columns asked for", seen=seen, do=do)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Arrow's own errors become a DataError with the path."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        do = "get the file anew: it is cut off, damaged or of another format"
        raise DataError("an input cannot be read to its end", seen=f"{path}: {error}", do=do) from error


def saved_files(folder: Path) -> list[Path] | None:
    """The .arrow files of a `datasets.save_to_disk` folder in the order of its state.json; None for other folders.

    Raises DataError where the folder holds several splits (one of them has to be named), and where files are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or len(splits) != 1:
            seen = f"{folder}: {', '.join(map(str, splits or []))}"
            raise DataError("a saved data set has several splits", seen=seen, do="name the folders of those to read")
        folder = folder / str(splits[0])
    if not (folder / "state.json").is_file() or "_data_files" not in (state := _json(folder / "state.json")):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            "a saved data set is a selection of its rows", seen=str(folder), do="save it after flatten_indices()"
        )
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise _damaged(folder / "state.json", error) from error
    if missing := [str(file) for file in files if not file.is_file()]:
        raise DataError("a saved data set lacks files", seen=", ".join(missing[:5]), do="copy the whole folder anew")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError("a saved data set is damaged", seen=f"{path}: {error!r}", do="copy the folder anew")


def open_hub(path: str) -> Any:
    """The `datasets.IterableDataset` behind hf:NAME[@REVISION][#SPLIT]; nothing is downloaded before it is iterated.

    NAME is what `datasets.load_dataset` takes, NAME:CONFIG for one of several configurations; the split is "train"
    unless named.
    """
    match = _HUB_NAME.fullmatch(path)
    if match is None:
        raise DataError("not the name of a data set", seen=path, do="write hf:NAME, hf:NAME:CONFIG#SPLIT")
    name, _, config = match["name"].partition(":")
    try:
        from datasets import load_dataset

        return load_dataset(
            name, config or None, split=match["split"] or "train", revision=match["revision"], streaming=True
        )
    except Exception as error:  # the errors of the libraries that reach the Hub have no base in common
        do = "check the name, the split, the network and HF_TOKEN"
        raise DataError("a data set of the Hub cannot be opened", seen=f"{path}: {error}", do=do) from error


def read_hub(piece: Piece, fields: tuple[str, ...]) -> Iterator[Row]:
    """The rows of files [start, stop) of the data set, counted through; of all files where stop is 0."""
    stream = open_hub(piece.path)
    row = 0
    for number in range(piece.start, piece.stop or stream.num_shards):
        try:
            for record in stream.shard(stream.num_shards, number):
                if not row and (missing := [name for name in fields if name not in record]):
                    raise _no_column(f"{piece.path}: no column {missing[0]}; columns: {', '.join(record)}")
                row += 1
                yield Record(row, record)
        except DataError:
            raise
        except Exception as error:  # as in open_hub
            do = "run the command again; if it fails again, check the network"
            raise DataError("a data set of the Hub broke off", seen=f"{piece.path}: {error}", do=do) from error
