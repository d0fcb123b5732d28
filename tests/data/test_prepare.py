"""Preparing loses nothing, and its output is the same for any number of workers and any number of restarts."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsgpt.cli.data import data as command
from dsgpt.data.choices import Progress
from dsgpt.data.dataset import BlockDataset
from dsgpt.data.indexed import IndexedReader
from dsgpt.data.manifest import DatasetManifest, load_manifest
from dsgpt.data.parts import plan_parts
from dsgpt.data.prepare import prepare
from dsgpt.data.tokenize_part import share_of
from dsgpt.errors import ConfigError, DataError, DsgptError, LockedError
from dsgpt.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"


def files_of(folder: Path) -> dict[str, str]:
    """Relative name to hash, for every file below."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split as text, read shard by shard."""
    manifest = load_manifest(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    texts = []
    for shard in manifest.splits[split].shards:
        reader = IndexedReader(folder / shard.path)
        for i in range(len(reader)):
            ids = reader[i].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids[1:-1]))
    return texts


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """The corpus as one worker prepares it."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    prepare([corpus], tokenizer_folder, folder, validation=0.05)
    return folder


def test_every_document_is_in_one_split_in_order(reference: Path, documents: list[str]) -> None:
    aside = [text for text in documents if share_of(text.encode()) < 0.05]
    assert decoded(reference, "validation") == aside
    assert decoded(reference, "train") == [text for text in documents if text not in set(aside)]
    assert 0.03 < len(aside) / len(documents) < 0.07


def test_dataset_json_counts_what_is_there(reference: Path, corpus: Path, documents: list[str]) -> None:
    manifest = load_manifest(reference)
    splits = manifest.splits.values()
    assert sum(split.documents for split in splits) == len(documents)
    assert sum(split.text_bytes for split in splits) == sum(len(text.encode()) for text in documents)
    assert len(manifest.splits["train"].shards) >= 3, "the corpus should make several parts"
    for shard in (shard for split in splits for shard in split.shards):
        assert hashlib.sha256((reference / f"{shard.path}.bin").read_bytes()).hexdigest() == shard.sha256_bin
    sources = [(path, path.read_bytes()) for path in (corpus / "a.jsonl", corpus / "sub" / "b.jsonl")]
    assert [(s.path, s.bytes, s.sha256) for s in manifest.sources] == [
        (str(path), len(content), hashlib.sha256(content).hexdigest()) for path, content in sources
    ]
    assert (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id, manifest.dtype) == (0, 1, "uint16")
    assert sorted(path.name for path in reference.iterdir() if path.suffix not in (".bin", ".idx")) == [
        "dataset.json",
        "tokenizer",
    ]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_output_does_not_depend_on_the_workers(
    tmp_path: Path, reference: Path, corpus: Path, tokenizer_folder: Path, workers: int
) -> None:
    seen: list[Progress] = []
    prepare([corpus], tokenizer_folder, tmp_path / "out", workers, validation=0.05, progress=seen.append)
    assert files_of(tmp_path / "out") == files_of(reference)
    last = seen[-1]
    manifest = load_manifest(reference)
    assert last.done.num_bytes == last.total_bytes
    assert last.done.tokens == sum(split.tokens for split in manifest.splits.values())
    assert last.done.documents == sum(split.documents for split in manifest.splits.values())


def test_a_killed_preparation_continues_to_the_same_output(
    tmp_path: Path, reference: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prepare", str(corpus), "--tokenizer", str(tokenizer_folder), "--output", str(out)]
    arguments += ["--workers", "2", "--validation", "5%"]
    program = "import sys; from dsgpt.cli.data import data; data(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob(".prepare/part-*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.bin") if not path.name.endswith(".tmp")}
    assert done and not (out / "dataset.json").exists()
    with pytest.raises(DataError, match="no finished dataset"):
        BlockDataset(out, "train", 16)

    seen: list[Progress] = []
    prepare([corpus], tokenizer_folder, out, 2, validation=0.05, progress=seen.append)
    assert files_of(out) == files_of(reference)
    assert seen[-1].resumed_bytes > 0
    kept = [path for path, changed in done.items() if path.stat().st_mtime_ns == changed]
    assert kept, "finished parts were done again"


def test_a_finished_dataset_is_returned_and_another_one_refused(
    tmp_path: Path, reference: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    assert prepare([corpus], tokenizer_folder, reference, validation=0.05) == load_manifest(reference)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}.items() <= before.items()
    with pytest.raises(DataError, match="different settings"):
        prepare([corpus], tokenizer_folder, reference, validation=0.06)
    with pytest.raises(DataError, match="different sources"):
        prepare([corpus / "a.jsonl"], tokenizer_folder, reference, validation=0.05)
    assert not (reference / ".prepare").exists()


def small(tmp_path: Path, tokenizer: Path, lines: list[str], **settings: object) -> DatasetManifest:
    source = tmp_path / "in" / "x.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join(lines))
    return prepare([source], tokenizer, tmp_path / "out", **settings)  # type: ignore[arg-type]


def row(text: object) -> str:
    return json.dumps({"text": text})


def test_bad_lines_are_set_aside_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [row(f"text {i}") for i in range(100)]
    lines[40], lines[41] = "{broken", row("")
    manifest = small(tmp_path, tokenizer_folder, lines, max_bad_fraction=0.01)
    assert (manifest.bad_lines.count, manifest.empty_documents) == (1, 1)
    assert manifest.splits["train"].documents == 98
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / str(manifest.bad_lines.file)).read_text().splitlines()]
    assert (bad["source"], bad["line"], bad["text"]) == (str(tmp_path / "in" / "x.jsonl"), 41, "{broken")
    assert bad["reason"].startswith("not JSON")


def test_too_many_bad_lines_fail_and_a_higher_bound_continues(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [row(f"text {i}") for i in range(98)] + ["{broken", "{broken"]
    with pytest.raises(DataError, match="2 of 100 records cannot be read") as caught:
        small(tmp_path, tokenizer_folder, lines)
    assert "x.jsonl:99: not JSON" in str(caught.value)
    assert len((tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert small(tmp_path, tokenizer_folder, lines, max_bad_fraction=0.02).splits["train"].documents == 98


def test_a_bad_line_in_a_later_part_has_its_line_in_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [row("a" * 1000 + str(i)) for i in range(5000)]
    lines[4321] = "{broken"
    manifest = small(tmp_path, tokenizer_folder, lines)
    assert len(manifest.splits["train"].shards) > 1
    assert json.loads((tmp_path / "out" / "bad_lines.jsonl").read_text())["line"] == 4322


def test_no_document_at_all_is_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="no document is left to train on"):
        small(tmp_path, tokenizer_folder, [row(""), row("")])


def test_special_tokens_in_the_text_stay_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    small(tmp_path, tokenizer_folder, [row("a </s> b <s> c")])
    assert decoded(tmp_path / "out", "train") == ["a </s> b <s> c"]
    reader = IndexedReader(tmp_path / "out" / "train-00000")
    assert reader.tokens.tolist().count(1) == 1


def test_text_files_are_documents_by_choice(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "x.txt"
    source.write_text("one\ntwo\n\nthree\n")
    expected = {
        "file": ["one\ntwo\n\nthree\n"],
        "blank-line": ["one\ntwo", "three"],
        "line": ["one", "two", "three"],
    }
    for choice, texts in expected.items():
        prepare([source], tokenizer_folder, tmp_path / choice, documents=choice)  # type: ignore[arg-type]
        assert decoded(tmp_path / choice, "train") == texts


def test_two_preparations_do_not_write_into_one_folder(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "out" / ".prepare" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another process is preparing"):
            small(tmp_path, tokenizer_folder, [row("x")])


def test_a_full_disk_is_an_error_after_which_the_same_command_continues(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [row("a" * 1000 + str(i)) for i in range(3000)]
    replace = os.replace

    def full(source: object, target: object) -> None:
        if "train-00001" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DsgptError, match="No space left on device") as caught:
        small(tmp_path, tokenizer_folder, lines)
    assert "1 of 3 parts are finished" in str(caught.value)
    monkeypatch.undo()
    assert small(tmp_path, tokenizer_folder, lines).splits["train"].documents == 3000
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {"", ".json", ".bin", ".idx"}


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        small(tmp_path, tokenizer_folder, [row("x")])
    assert files_of(tmp_path / "out").keys() == {"thesis.tex"}


@pytest.mark.parametrize("setting", [{"validation": 1.0}, {"workers": 0}, {"documents": "page"}])
def test_impossible_arguments_are_refused(tmp_path: Path, tokenizer_folder: Path, setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        small(tmp_path, tokenizer_folder, [row("x")], **setting)


def test_parts_cover_every_byte_once_and_do_not_split_whole_files() -> None:
    sources = [("a.txt", 9_000_000), ("b.jsonl", 50_000_001), ("c.txt", 10), ("d.jsonl", 0), ("e.jsonl", 7)]
    parts = plan_parts(sources, "file")
    pieces = [piece for part in parts for piece in part.pieces]
    assert [part.number for part in parts] == list(range(len(parts)))
    for path, size in sources:
        ranges = [(piece.start, piece.stop) for piece in pieces if piece.path == path]
        assert sum(stop - start for start, stop in ranges) == size
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))
        assert path.endswith(".jsonl") or len(ranges) == 1
    assert max(part.num_bytes for part in parts[1:]) <= sum(size for _, size in sources) // 16


def test_workers_import_neither_torch_nor_transformers() -> None:
    program = "import sys, dsgpt.data.parts; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_command_prepares_real_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    arguments = ["prepare", str(SHARED / "code"), str(SHARED / "pretrain" / "tiny*.txt")]
    arguments += ["--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(command, [*arguments, "--documents", "blank-line", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["splits"]["train"]["documents"] > 1000
    packed = [json.loads(line)["text"] for line in (SHARED / "code" / "click_py.jsonl").read_text("utf-8").splitlines()]
    assert decoded(tmp_path / "out", "train")[: len(packed) - 3] == [text for text in packed if text][: len(packed) - 3]
