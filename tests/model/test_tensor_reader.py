"""Ranges of weights files against the safetensors library and transformers, and damage that must not pass as a weight."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from dsgpt.errors import ConfigError
from dsgpt.model import safetensors_folder
from dsgpt.model.hf_format import Part
from dsgpt.model.hf_import import open_hf_weights, open_weights, read_hf_config
from dsgpt.model.safetensors_folder import SafetensorsFolder
from dsgpt.model.tensor_reader import GrownReader, PartReader


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "double": torch.randn(7, 3, generator=generator, dtype=torch.float64),
        "single": torch.randn(41, 5, generator=generator),
        "half": torch.randn(6, 5, 4, generator=generator).half(),
        "brain": torch.randn(33, 9, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "count": torch.arange(-5, 5),
        "mask": torch.ones(3, 3).tril().bool(),
    }


def write_shards(folder, values, number, index=True):
    """Tensors dealt over files, whose names the index has."""
    names = [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    for i, file in enumerate(names):
        save_file({name: value for j, (name, value) in enumerate(values.items()) if j % number == i}, folder / file)
    if index:
        table = {name: names[j % number] for j, name in enumerate(values)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return [folder / name for name in names]


@pytest.mark.parametrize("number, index", [(1, False), (3, True), (3, False)])
def test_any_range_is_the_safetensors_library_s_and_costs_only_its_bytes(number, index, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_folder, "CHUNK_BYTES", 64)
    files = write_shards(tmp_path, tensors(), number, index)
    theirs = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            theirs |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    folder, rng = SafetensorsFolder(tmp_path), random.Random(5)
    assert folder.shapes == {name: tuple(value.shape) for name, value in theirs.items()}
    assert folder.dtypes == {name: value.dtype for name, value in theirs.items()}
    before = len(os.listdir("/proc/self/fd"))
    for name, value in theirs.items():
        assert torch.equal(folder.tensor(name), value.float()), name
        for _ in range(20):
            start, stop = sorted(rng.randint(0, value.numel()) for _ in range(2))
            read = folder.bytes_read
            assert torch.equal(folder.read(name, start, stop - start), value.flatten()[start:stop].float()), name
            assert folder.bytes_read - read == (stop - start) * value.element_size()
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        with pytest.raises(ConfigError, match="outside"):
            folder.read(name, 1, value.numel())


def test_all_ranges_together_cost_the_folder_and_its_headers_once(tmp_path):
    values = {"w": torch.randn(1000, 64), "v": torch.randn(64, 1000)}
    files = write_shards(tmp_path, values, 2)
    readers = [SafetensorsFolder(tmp_path) for _ in range(4)]
    for name, value in values.items():
        pieces = [reader.read(name, rank * 16000, 16000) for rank, reader in enumerate(readers)]
        assert torch.equal(torch.cat(pieces).view(value.shape), value)
    whole = sum(file.stat().st_size for file in files)
    headers = whole - sum(value.nbytes for value in values.values())
    assert sum(reader.bytes_read for reader in readers) == whole + 3 * headers


def test_the_whole_file_is_taken_as_transformers_does_where_both_are_there(tmp_path):
    write_shards(tmp_path, {"w": torch.zeros(3)}, 1)
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert torch.equal(SafetensorsFolder(tmp_path).tensor("w"), torch.ones(3))


def test_missing_double_and_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no safetensors files.*\n  seen: .*\n  do: "):
        SafetensorsFolder(tmp_path)
    files = write_shards(tmp_path, tensors(), 3)
    content = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(ConfigError, match=r"missing\n  seen: .*00002-of-00003.safetensors\n  do: "):
        SafetensorsFolder(tmp_path)
    os.mkfifo(files[1])  # which nobody writes to: opening it would wait for ever
    with pytest.raises(ConfigError, match="missing"):
        SafetensorsFolder(tmp_path)
    files[1].unlink()
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ConfigError, match=r"two files\n  seen: .*00001-of-00003.*00002-of-00003"):
        SafetensorsFolder(tmp_path)
    files[1].write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        "{",
        "[]",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": "../f"}}',
        "\xff",
    ):
        index.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="index"):
            SafetensorsFolder(tmp_path)


def opened(path):
    folder = SafetensorsFolder(path)
    return {name: folder.tensor(name) for name in folder.shapes}, folder.dtypes


def test_a_damaged_header_is_refused_or_changes_no_value(tmp_path):
    """Bits of the whole header: what the safetensors library refuses is refused, and no tensor gets other values."""
    path, whole = tmp_path / "model.safetensors", save(tensors())
    size = 8 + int.from_bytes(whole[:8], "little")
    refused, places = 0, range(0, 8 * size, 3)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            theirs = load_file(path)
        except Exception:
            theirs = None
        try:
            ours, dtypes = opened(tmp_path)
        except ConfigError as error:
            assert error.problems[0].seen and error.problems[0].do
            refused += 1
            continue
        assert theirs is not None, f"bit {place}: taken here, refused there"
        # What no reader can see, but who looks for the tensor can: another name, another dtype or shape of the same size.
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert dtypes[name] == value.dtype and torch.equal(ours[name].nan_to_num(7), value.float().nan_to_num(7))
    assert refused > len(places) / 2


def test_every_cut_and_every_addition_is_refused(tmp_path):
    path, whole = tmp_path / "model.safetensors", save(tensors())
    for size in (0, 5, 8, 9, 100, *range(300, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="not a whole safetensors file"):
            SafetensorsFolder(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        SafetensorsFolder(tmp_path)
    path.write_bytes(whole)
    folder = SafetensorsFolder(tmp_path)
    os.truncate(path, len(whole) - 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        [folder.tensor(name) for name in folder.shapes]


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "table, said",
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "begins at byte"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "begins at byte"),
        ({"a": entry(4, 12)}, "begins at byte"),
        ({"a": entry(0, 8), "b": entry(12, 16, (1,))}, "begins at byte"),
        ({"a": entry(0, 12)}, "bytes"),
        ({"a": entry(0, 8, (3,))}, "bytes"),
        ({"a": entry(8, 0)}, "bytes"),
        ({"a": entry(-8, 0)}, "offsets"),
        ({"a": entry(0, 8, (-2,))}, "shape"),
        ({"a": entry(0, 8, (2.0,))}, "shape"),
        ({"a": entry(0, 0, (0, 1 << 70))}, "shape"),
        ({"a": entry(0, 8, dtype="F8_E4M3")}, "dtype"),
        ({"a": entry(0, 8, dtype=["F32"])}, "dtype"),
        ({"a": {"dtype": "F32"}}, "no dtype, shape and data_offsets"),
        ({"a": 3}, "no dtype, shape and data_offsets"),
        ([], "object"),
    ],
)
def test_headers_that_lie_are_refused(table, said, tmp_path):
    text = json.dumps(table).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ConfigError, match=said):
        SafetensorsFolder(tmp_path)


def test_a_header_of_any_length_or_depth_is_refused_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    for first in (bytes([255] * 8), (1 << 40).to_bytes(8, "little"), (99_000_000).to_bytes(8, "little")):
        path.write_bytes(first + b"{}")
        with pytest.raises(ConfigError, match="header"):
            SafetensorsFolder(tmp_path)
    deep = b"[" * 200_000
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ConfigError, match="safetensors"):
        SafetensorsFolder(tmp_path)


def gpt2(folder, **changes):
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 97} | changes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.3, **sizes)).eval()
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def test_gpt2_s_transposed_matrices_are_those_of_transformers_by_any_range(tmp_path):
    state = gpt2(tmp_path).state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reader, rng = open_hf_weights(tmp_path, read_hf_config(tmp_path)), random.Random(5)
    for i in range(2):
        for number, name in enumerate("qkv"):
            for kind in ("weight", "bias"):
                joined = state[f"transformer.h.{i}.attn.c_attn.{kind}"]
                expected = (joined.t() if kind == "weight" else joined)[number * 32 : (number + 1) * 32].flatten()
                for _ in range(10):
                    start, stop = sorted(rng.randint(0, expected.numel()) for _ in range(2))
                    found = reader.read(f"blocks.{i}.attention.{name}_proj.{kind}", start, stop - start)
                    assert torch.equal(found, expected[start:stop])
        for native, theirs in (("attention.o_proj", "attn.c_proj"), ("mlp.up_proj", "mlp.c_fc")):
            expected = state[f"transformer.h.{i}.{theirs}.weight"].t()
            assert torch.equal(reader.tensor(f"blocks.{i}.{native}.weight"), expected)


def test_three_parts_of_one_transposed_tensor_cost_it_once(tmp_path):
    save_file({"joined": torch.arange(48.0).view(4, 12)}, tmp_path / "model.safetensors")
    files = SafetensorsFolder(tmp_path)
    parts = {name: Part("joined", 4 * i, 4, transposed=True) for i, name in enumerate("qkv")}
    reader, before = PartReader(files, parts), files.bytes_read
    assert torch.equal(torch.cat([reader.tensor(name) for name in "qkv"]), torch.arange(48.0).view(4, 12).t())
    assert reader.bytes_read - before == 48 * 4


@pytest.mark.parametrize("rows, row", [(50, 8), (7, 3)])
def test_new_rows_are_the_mean_of_all_there_are(rows, row, tmp_path, monkeypatch):
    monkeypatch.setattr("dsgpt.model.tensor_reader.MEAN_ELEMENTS", 64)
    value = torch.randn(rows, row, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"w": value, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    wanted = torch.cat((value.float(), value.double().mean(0, keepdim=True).float().expand(5, row)))
    reader, rng = GrownReader(SafetensorsFolder(tmp_path), {"w": rows + 5, "of another model": 3}), random.Random(5)
    assert reader.shapes == {"w": (rows + 5, row), "b": (3,)}
    assert torch.equal(reader.tensor("w"), wanted) and torch.equal(reader.tensor("b"), torch.ones(3))
    for _ in range(50):
        start, stop = sorted(rng.randint(0, wanted.numel()) for _ in range(2))
        assert torch.equal(reader.read("w", start, stop - start), wanted.flatten()[start:stop])
    read = reader.bytes_read
    reader.read("w", rows * row, 5 * row)
    assert reader.bytes_read == read, "the mean is computed once"
    with pytest.raises(ConfigError, match=f"{rows}, expected {rows - 1}"):
        GrownReader(SafetensorsFolder(tmp_path), {"w": rows - 1})


def test_a_vocabulary_of_another_size_is_refused_unless_it_may_grow_and_then_is_transformers_mean(tmp_path):
    model = gpt2(tmp_path)
    config = read_hf_config(tmp_path)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight\n  seen: \(97, 32\), expected \(100, 32\)"):
        open_hf_weights(tmp_path, config.model_copy(update={"vocab_size": 100}))
    found = GrownReader(open_hf_weights(tmp_path, config), {"embed_tokens.weight": 100, "lm_head.weight": 100})
    embedding = found.tensor("embed_tokens.weight")
    assert torch.equal(embedding[:97], model.transformer.wte.weight)
    assert torch.allclose(embedding[97:], model.transformer.wte.weight.mean(0).expand(3, -1), atol=1e-6)


def test_whole_numbers_are_no_weights(tmp_path):
    gpt2(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        values = load_file(file)
        if "transformer.h.1.ln_1.weight" in values:
            values["transformer.h.1.ln_1.weight"] = torch.ones(32, dtype=torch.int8)
            save_file(values, file)
    with pytest.raises(ConfigError, match=r"transformer.h.1.ln_1.weight\n  seen: torch.int8"):
        open_hf_weights(tmp_path, read_hf_config(tmp_path))


def test_pickled_weights_are_read_the_same_way_and_only_where_they_are_trusted(tmp_path):
    values = tensors()
    torch.save({name: value for name, value in values.items() if name != "half"}, tmp_path / "pytorch_model-1.bin")
    torch.save({"half": values["half"]}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(ConfigError, match="--trust-checkpoint"):
        open_weights(tmp_path)
    found = open_weights(tmp_path, trust=True)
    assert found.shapes == {name: tuple(value.shape) for name, value in values.items()}
    assert torch.equal(found.read("half", 11, 50), values["half"].flatten()[11:61].float())
    assert found.bytes_read == sum(file.stat().st_size for file in tmp_path.glob("*.bin"))
    torch.save({"half": values["half"]}, tmp_path / "pytorch_model-3.bin")
    with pytest.raises(ConfigError, match="two files"):
        open_weights(tmp_path, trust=True)
