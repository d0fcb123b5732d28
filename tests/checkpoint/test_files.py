"""State files against the safetensors library, and every damage to them."""

from __future__ import annotations

import os
import random

import pytest
import torch
from safetensors.torch import load_file

from dsgpt.checkpoint import commit, reader
from dsgpt.checkpoint.files import BLOCK_BYTES, Layout, Places, StateFile, file_order, write_file
from dsgpt.errors import DamagedError
from dsgpt.model.safetensors_folder import DTYPE_NAMES, bytes_of
from dsgpt.model.safetensors_header import ITEM_BYTES


def tensors():
    generator = torch.Generator().manual_seed(3)
    values = {
        "master:w": torch.randn(3 * BLOCK_BYTES // 4 + 17, generator=generator),
        "exp_avg:w": torch.randn(BLOCK_BYTES // 4, generator=generator),
        "one": torch.randn(1, generator=generator),
        "none": torch.empty(0),
        "half": torch.randn(5001, generator=generator).bfloat16(),
        "buffer:count": torch.tensor(7),
        "buffer:mask": torch.tensor([[True, False], [False, True]]),
    }
    return values


def write(path, values):
    layout = Layout([(n, DTYPE_NAMES[v.dtype], tuple(v.shape)) for n, v in values.items()], {"starts": '{"w": 0}'})
    entry = write_file(path, layout.header, (bytes_of(values[name]) for name in layout.ranges))
    assert layout.size == entry["bytes"] == path.stat().st_size
    return layout, entry


def read(file, name, value, start=0, stop=None):
    into = memoryview(bytearray((value.nbytes if stop is None else stop) - start))
    file.read(name, start, start + len(into), into)
    return bytes(into)


def test_the_safetensors_library_reads_the_same_values(tmp_path):
    values = tensors()
    write(tmp_path / "f", values)
    theirs = load_file(tmp_path / "f")
    assert theirs.keys() == values.keys() | {"checksums"}
    assert all(theirs[name].dtype == values[name].dtype and theirs[name].equal(values[name]) for name in values)


def test_any_range_has_its_bytes_and_costs_at_most_a_block_at_each_end(tmp_path):
    values, rng = tensors(), random.Random(5)
    _, entry = write(tmp_path / "f", values)
    file = StateFile(tmp_path / "f", entry)
    for _ in range(300):
        name = rng.choice([*values])
        whole = bytes(bytes_of(values[name]))
        start, stop = sorted(rng.randint(0, len(whole)) for _ in range(2))
        before = file.bytes_read
        assert read(file, name, values[name], start, stop) == whole[start:stop]
        assert file.bytes_read - before <= stop - start + 2 * BLOCK_BYTES + 2048  # of the checksums
    with pytest.raises(DamagedError, match="outside"):
        read(file, "one", values["one"], 0, 5)
    with pytest.raises(DamagedError, match="lacks a tensor"):
        read(file, "two", values["one"])


def places_of(values, entry):
    """From names, types and sizes alone; the file's header is what it is compared with."""
    names = sorted(values, key=lambda name: file_order(name, DTYPE_NAMES[values[name].dtype]))
    sizes = (ITEM_BYTES[DTYPE_NAMES[values[name].dtype]] * values[name].numel() for name in names)
    return Places({name: number for number, name in enumerate(names)}, sizes, entry["header_bytes"])


def test_the_places_of_tensors_follow_from_their_sizes_and_save_the_header(tmp_path):
    values = tensors() | {
        f"master:{n}": torch.full((n,), float(n)) for n in range(1, 3000)
    }  # 18 MB: pages of checksums
    layout, entry = write(tmp_path / "f", values)
    places = places_of(values, entry)
    assert {name: places.find(name)[:2] for name in values} == layout.ranges
    file = StateFile(tmp_path / "f", entry, places=places)
    assert read(file, "master:2999", values["master:2999"]) == bytes(bytes_of(values["master:2999"]))
    assert file.bytes_read < 2999 * 4 + 2048
    assert all(read(file, name, values[name]) == bytes(bytes_of(values[name])) for name in values)


def test_a_checkpoint_of_more_files_than_a_process_may_open_is_read(tmp_path, monkeypatch):
    values, files = torch.arange(40.0), {}
    tmp = commit.begin(tmp_path, 1, "a")
    for rank, piece in enumerate(values.split(2)):
        path = tmp / reader.partition_file(rank)
        files[path.name] = write(path, {"master:w": piece.clone()})[1]
    index = {"w": {"shape": [40], "piece": 2}}
    manifest = {"step": 1, "files": files, "state_kinds": ["master"], "parameters": index}
    found = reader.CheckpointReader(commit.commit(tmp_path, tmp, manifest))
    monkeypatch.setattr(reader, "MAX_OPEN", 3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert found.tensor("w").equal(values)
    assert len(os.listdir("/proc/self/fd")) - before == 3


def test_wrong_places_are_not_taken(tmp_path):
    values = tensors()
    _, entry = write(tmp_path / "f", values)
    for other in (values | {"two": torch.zeros(2)}, values | {"one": torch.zeros(2)}):
        with pytest.raises(DamagedError, match="not those of the manifest"):
            StateFile(tmp_path / "f", entry, places=places_of(other, entry))
    swapped = values | {"master:w": values["exp_avg:w"], "exp_avg:w": values["master:w"]}
    file = StateFile(tmp_path / "f", entry, places=places_of(swapped, entry))
    with pytest.raises(DamagedError, match="differs from its checksum"):
        read(file, "exp_avg:w", swapped["exp_avg:w"])


def test_every_flipped_bit_is_found_by_who_reads_it_and_every_cut(tmp_path):
    values, rng, path = tensors(), random.Random(7), tmp_path / "f"
    layout, entry = write(path, values)
    whole = path.read_bytes()
    places = [rng.randrange(8 * len(whole)) for _ in range(400)] + list(range(0, 8 * len(layout.header), 61))
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            file = StateFile(path, entry)
            for name, value in values.items():
                read(file, name, value)
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError):
            file = StateFile(path, entry)
            for name, value in values.items():
                read(file, name, value)


def test_a_whole_file_of_another_checkpoint_is_not_taken(tmp_path):
    values = tensors()
    _, entry = write(tmp_path / "f", values)
    values["one"] += 1
    write(tmp_path / "f", values)
    with pytest.raises(DamagedError, match="not those of the manifest"):
        StateFile(tmp_path / "f", entry)
