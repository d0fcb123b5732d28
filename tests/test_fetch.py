"""`dsgpt fetch` against a hub on loopback: whole and right or not there, begun once, refused with what to do."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from dsgpt.data.formats import kind_of
from dsgpt.fetch import DATA, RECORD
from tests.hub_server import TOKEN, Hub, Repository

NAME = "somebody/tiny"


def noise(seed: int, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


SHARDS = {f"model-0000{n}-of-00002.safetensors": noise(n) for n in (1, 2)}
BESIDE = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}" + b" " * 2000,
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# tiny",
    "LICENSE": b"Apache",
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
LEFT_OUT = {
    ".gitattributes": b"*",
    "modeling_tiny.py": b"raise SystemExit('code of a model ran')",
    "pytorch_model.bin": noise(8),
    "pytorch_model.bin.index.json": b"{}",
    "onnx/model.onnx": noise(9),
    "original/config.json": b"{}",
    "../outside.json": b"{}",
    "/outside.json": b"{}",
    RECORD: b"{}",
}


@pytest.fixture()
def model(hub: Hub) -> Repository:
    hub.repositories[f"models/{NAME}"] = Repository({**SHARDS, **BESIDE, **LEFT_OUT})
    return hub.repositories[f"models/{NAME}"]


def fetch(hub: Hub, tmp_path: Path, source: str, *words: str, output: str = "out", **variables: str):
    found = hub.run(
        tmp_path / "home", "-m", "dsgpt", "fetch", source, "--output", tmp_path / output, *words,
        **{"HF_TOKEN": TOKEN, **variables},
    )  # fmt: skip
    assert TOKEN not in found.stdout + found.stderr
    return found


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "\n  do:   " in done.stderr and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_arrives_byte_for_byte_with_its_record_and_without_code_or_pickle(hub, tmp_path, model):
    done = fetch(hub, tmp_path, f"hf:{NAME}")
    assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "out")
    record = json.loads(found.pop(RECORD))
    assert found == {**SHARDS, **BESIDE}
    assert (record["source"], record["revision"]) == (f"hf:{NAME}", model.commit)
    assert record["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in found.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "modeling_tiny.py" in done.stdout


def test_the_same_command_again_downloads_nothing_and_another_one_changes_nothing(hub, tmp_path, model):
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0
    before, gets = contents(tmp_path / "out"), dict(hub.gets)
    again = fetch(hub, tmp_path, f"hf:{NAME}", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["was_there"] is True
    model.commit = "d" * 40
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 78, "c0ffee", "dddd", "another --output")
    assert (contents(tmp_path / "out"), dict(hub.gets)) == (before, gets)


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path, model):
    name = min(SHARDS)
    model.files[name] = noise(4, 3 * DOWNLOAD_CHUNK_SIZE)
    model.breaks[name] = 2
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0
    assert (tmp_path / "out" / name).read_bytes() == model.files[name]
    assert hub.ranges == [(name, f"bytes={n * DOWNLOAD_CHUNK_SIZE}-") for n in (1, 2)]


def test_what_arrived_whole_before_an_interruption_is_not_downloaded_again(hub, tmp_path, model):
    last = max(SHARDS)
    model.breaks[last], model.unavailable = 1, {last}
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 76, "broke off", "run the command again")
    assert not (tmp_path / "out").exists()
    model.unavailable = set()
    model.files["README.md"] = b"# tiny, newer"  # and what has changed meanwhile is
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0
    assert contents(tmp_path / "out").items() >= {**SHARDS, **BESIDE, "README.md": b"# tiny, newer"}.items()
    assert hub.gets == {**dict.fromkeys({**SHARDS, **BESIDE}, 1), last: 3, "README.md": 2}


@pytest.mark.parametrize("name", [max(SHARDS), "config.json"], ids=["large", "small"])
def test_changed_bytes_are_refused_and_nothing_looks_complete(name, hub, tmp_path, model):
    right = model.files[name]
    model.other_bytes[name] = bytes([right[0] ^ 1]) + right[1:]
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 65, name, model.digest(name))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(f"**/{name}"))
    model.other_bytes.clear()
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0
    assert contents(tmp_path / "out")[name] == right


def test_a_file_that_was_damaged_between_two_calls_is_downloaded_again(hub, tmp_path, model):
    first, last = sorted(SHARDS)
    model.breaks[last], model.unavailable = 1, {last}
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 76)
    [half_way] = tmp_path.glob(f".*/{first}")
    half_way.write_bytes(SHARDS[last])
    model.unavailable = set()
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0
    assert contents(tmp_path / "out").items() >= SHARDS.items()


def test_more_than_the_disk_has_room_for_is_refused_before_the_first_file(hub, tmp_path, model):
    model.claimed_size[min(SHARDS)] = 1 << 60
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 73, "1048576.0 TiB", "make room")
    assert (not hub.gets and [path.name for path in tmp_path.iterdir()] == ["home"]) or not hub.gets


def test_what_cannot_be_had_is_told_with_what_to_do(hub, tmp_path, model):
    refused(fetch(hub, tmp_path, "hf:somebody/absent"), 78, "not on the hub", "OWNER/NAME", "HF_TOKEN")
    refused(fetch(hub, tmp_path, f"hf:{NAME}", "--revision", "v9"), 78, "no such revision", "--revision")
    refused(fetch(hub, tmp_path, f"hf:{NAME}", HF_HUB_OFFLINE="1"), 78, "HF_HUB_OFFLINE")
    refused(fetch(hub, tmp_path, NAME), 78, "hf:NAME")
    refused(fetch(hub, tmp_path, "hf:a/b/c"), 78, "OWNER/NAME")
    refused(fetch(hub, tmp_path, f"hf:{NAME}", HF_ENDPOINT="http://127.0.0.1:9"), 76, "cannot be reached")
    model.refused_token = True
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 78, "does not accept the token")
    model.refused_token, model.gated = False, True
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 78, "is gated", "accept the licence", "HF_TOKEN")
    assert not (tmp_path / "out").exists() and not hub.gets


def test_an_output_that_holds_something_else_is_left_alone(hub, tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 78, "another --output")
    assert contents(tmp_path / "out") == {"mine": b"mine"} and not hub.gets


def test_two_fetches_to_one_output_do_not_mix(hub, tmp_path, model):
    (tmp_path / ".fetching-out").mkdir()
    held = os.open(tmp_path / ".fetching-out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 73, "another process")
    os.close(held)
    assert fetch(hub, tmp_path, f"hf:{NAME}").returncode == 0


def test_pickled_weights_come_only_for_who_trusts_them_and_where_there_are_no_others(hub, tmp_path, model):
    assert fetch(hub, tmp_path, f"hf:{NAME}", "--trust-checkpoint", output="both").returncode == 0
    assert not list((tmp_path / "both").glob("*.bin*"))
    for name in [*SHARDS, "model.safetensors.index.json"]:
        del model.files[name]
    refused(fetch(hub, tmp_path, f"hf:{NAME}"), 78, "pytorch_model.bin", "--trust-checkpoint")
    assert fetch(hub, tmp_path, f"hf:{NAME}", "--trust-checkpoint").returncode == 0
    assert contents(tmp_path / "out")["pytorch_model.bin"] == LEFT_OUT["pytorch_model.bin"]
    del model.files["pytorch_model.bin"]
    refused(fetch(hub, tmp_path, f"hf:{NAME}", output="none"), 78, "no model that dsgpt reads", "onnx/model.onnx")


def test_a_data_set_is_prepared_from_what_was_fetched(hub, dataset, tmp_path):
    lines = "".join(json.dumps({"text": f"A line of text, number {n}."}) + "\n" for n in range(60)).encode()
    data = {"data/a.jsonl": lines, "data/b.txt": b"Another document.", "README.md": b"# data"}
    others = {
        "load.py": b"raise SystemExit",
        "dataset_infos.json": b"{}",
        "LICENSE.txt": b"Apache",
        "x/image.png": noise(3),
    }
    hub.repositories["datasets/somebody/texts"] = Repository({**data, **others})
    assert fetch(hub, tmp_path, "dataset:somebody/texts").returncode == 0
    found = contents(tmp_path / "out")
    assert {name: content for name, content in found.items() if name != RECORD} == data
    words = ("data", "prepare", tmp_path / "out", "--tokenizer", dataset.parent / "tokenizer", "--workers", "1")
    done = hub.run(tmp_path / "home", "-m", "dsgpt", *words, "--output", tmp_path / "prepared")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "prepared/dataset.json").read_text())
    assert {Path(one["path"]).name for one in made["sources"]} == {"a.jsonl", "b.txt"}
    refused(fetch(hub, tmp_path, "dataset:somebody/texts", "--include", "nothing*", output="c"), 78, "data/a.jsonl")
    assert fetch(hub, tmp_path, "dataset:somebody/texts", "--include", "*/b.*", output="b").returncode == 0
    assert contents(tmp_path / "b").keys() == {"data/b.txt", "README.md", RECORD}


def test_all_that_is_fetched_of_a_data_set_is_what_prepare_reads():
    assert all(kind_of(pattern.replace("*", "x")) for pattern in DATA)
    assert kind_of(RECORD) is None
