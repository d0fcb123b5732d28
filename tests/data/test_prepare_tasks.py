"""Many tasks, kills and engines: the dataset is the one that a single process makes."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dsgpt.cli.data import data as command
from dsgpt.data import formats
from dsgpt.data.choices import Choices, Share, Unfinished
from dsgpt.data.filters import Filters
from dsgpt.data.finish import finish
from dsgpt.data.forecast import Forecast
from dsgpt.data.indexed import IndexedReader
from dsgpt.data.manifest import DatasetManifest, load_manifest
from dsgpt.data.prepare import prepare, prepare_share
from dsgpt.errors import DataError
from dsgpt.tokenizer import Tokenizer, encoder
from tests.data.test_prepare import decoded, files_of, row

PROGRAM = "import sys; from dsgpt.cli.data import data; data(sys.argv[1:])"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "out"
    prepare([corpus], tokenizer_folder, folder, validation=0.05)
    return folder


def share(
    corpus: Path, tokenizer: Path, out: Path, index: int, count: int, **choices: Any
) -> DatasetManifest | Unfinished:
    chosen = Choices(validation=0.05, share=Share(index, count), **choices)
    return prepare_share([corpus], tokenizer, out, chosen, lambda _: None)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 2, 1], [1, 1, 2, 0]])
def test_shares_in_any_order_and_twice_make_the_same_dataset(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, reference: Path, order: list[int]
) -> None:
    done = [share(corpus, tokenizer_folder, tmp_path / "out", index, 3) for index in order]
    assert all(isinstance(one, Unfinished) for one in done[:-1])
    assert done[-1] == load_manifest(tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(reference)


def test_finish_names_the_missing_parts_and_the_command_that_does_them(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, reference: Path
) -> None:
    out = tmp_path / "out"
    options = ["--tokenizer", str(tokenizer_folder), "--output", str(out), "--validation", "5%", "--workers", "1"]
    arguments = ["prepare", str(corpus), *options]
    first = CliRunner().invoke(command, [*arguments, "--shard", "1/3"])
    assert first.exit_code == 0 and "parts of other shares are missing" in first.output
    with pytest.raises(DataError, match="parts are missing") as caught:
        finish(out)
    words = shlex.split(caught.value.problems[0].do.removeprefix("run: "))
    assert words[:3] == ["dsgpt", "data", "prepare"] and words[-2] == "--parts"
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*.bin")}
    assert CliRunner().invoke(command, words[2:]).exit_code == 0
    assert files_of(out) == files_of(reference)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished part was done again"


def test_tasks_at_the_same_time_make_the_same_dataset(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, reference: Path
) -> None:
    arguments = ["prepare", str(corpus), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out")]
    arguments += ["--validation", "5%", "--workers", "1"]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments, "--shard", f"{index}/2"],
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for index in (0, 1, 1)
    ]  # fmt: skip
    endings = [(task.communicate()[1], task.returncode) for task in tasks]
    assert [code for _, code in endings] == [0, 0, 0], endings
    assert files_of(tmp_path / "out") == files_of(reference)


@pytest.mark.slow
def test_kills_at_random_instants_change_nothing(tmp_path: Path, documents: list[str], tokenizer_folder: Path) -> None:
    """By the reference engine, which takes some seconds."""
    source, whole, out, rng = tmp_path / "x.jsonl", tmp_path / "whole", tmp_path / "out", random.Random(1)
    source.write_text("\n".join(row(f"{i} {text}") for i in range(3) for text in documents))
    arguments = ["prepare", str(source), "--tokenizer", str(tokenizer_folder), "--output", str(out)]
    arguments += ["--validation", "5%", "--workers", "2", "--engine", "reference"]
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.5, 2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2, "it was done before it could be killed"
    prepare([source], tokenizer_folder, out, validation=0.05, engine="reference")
    prepare([source], tokenizer_folder, whole, validation=0.05, engine="reference")
    assert files_of(out) == files_of(whole)


def wrong_about_zebras(engine: encoder._Gigatoken, texts: Sequence[bytes]) -> tuple[Any, Any]:
    ids, lengths = right(engine, texts)
    ids = ids.copy()
    if len(ids) and any(b"zebra" in text for text in texts):
        ids[-1] ^= 1
    return ids, lengths


right = encoder._Gigatoken.__call__


@pytest.mark.slow
def test_one_difference_from_the_reference_and_it_does_all_of_the_job(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    source = tmp_path / "x.jsonl"
    lines = [row("some horses and cows " * 60)] * 2000 + [row("a zebra")] + [row("a horse " * 90)] * 2000
    source.write_text("\n".join(lines))
    honest = prepare([source], tokenizer_folder, tmp_path / "honest")
    assert honest.engine is not None and honest.engine.name.startswith("gigatoken ")
    plain = prepare([source], tokenizer_folder, tmp_path / "plain", engine="reference")
    monkeypatch.setattr(encoder._Gigatoken, "__call__", wrong_about_zebras)
    source.write_text("\n".join([row("a zebra " * 100)] * 3 + lines))
    found = prepare([source], tokenizer_folder, tmp_path / "out")
    assert found.engine is not None and found.engine.name == plain.engine.name  # type: ignore[union-attr]
    assert "gigatoken" in found.engine.fallback and "expected" in found.engine.fallback
    monkeypatch.undo()
    again = prepare([source], tokenizer_folder, tmp_path / "again", engine="reference")
    assert again.fingerprint == found.fingerprint
    assert honest.fingerprint == plain.fingerprint


class Panic(BaseException):
    """What a panic in a Rust library is to Python."""


def test_an_engine_that_panics_over_a_text_is_replaced_for_all_of_the_job(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigatoken = pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    encode_batch = gigatoken.Tokenizer.encode_batch

    def panicking(self: Any, texts: list[bytes], **options: Any) -> Any:
        if any(b"zebra" in text for text in texts):
            raise Panic("index out of bounds")
        return encode_batch(self, texts, **options)

    source = tmp_path / "x.jsonl"
    source.write_text("\n".join([row("a horse " * 90)] * 3000 + [row("a zebra")]))
    plain = prepare([source], tokenizer_folder, tmp_path / "plain", engine="reference")
    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", panicking)
    found = prepare([source], tokenizer_folder, tmp_path / "out")
    assert found.engine is not None and found.engine.name.startswith("tokenizers ")
    assert "gigatoken failed: index out of bounds" in found.engine.fallback
    assert found.fingerprint == plain.fingerprint


def test_equal_documents_are_left_out_whatever_the_tasks(tmp_path: Path, tokenizer_folder: Path) -> None:
    rng = random.Random(2)
    texts = [f"text number {rng.randrange(1500)} " * 90 for _ in range(3000)]
    for name, chosen in (("a.jsonl", texts[:1200]), ("b.jsonl", texts[1200:])):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("\n".join(map(row, chosen)))
    found = prepare([tmp_path / "in"], tokenizer_folder, tmp_path / "out", deduplicate=True)
    assert decoded(tmp_path / "out", "train") == list(dict.fromkeys(texts))
    assert found.duplicates == len(texts) - len(set(texts))
    assert len(found.splits["train"].shards) > 2, "the repetitions should be in several parts"
    out = tmp_path / "tasks"
    chosen = {"deduplicate": True, "share": Share(0, 2)}
    first = prepare_share([tmp_path / "in"], tokenizer_folder, out, Choices(**chosen), lambda _: None)  # type: ignore[arg-type]
    assert isinstance(first, Unfinished) and first.hashed
    for index in (1, 0):
        chosen["share"] = Share(index, 2)
        last = prepare_share([tmp_path / "in"], tokenizer_folder, out, Choices(**chosen), lambda _: None)  # type: ignore[arg-type]
    assert isinstance(last, DatasetManifest) and last.fingerprint == found.fingerprint
    assert files_of(out) == files_of(tmp_path / "out")


def test_what_filters_leave_out_is_counted_by_name(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = ["short", "a long enough text that stays", "buy now, a long enough text", "12345 67890 12345 67890 !!"]
    (tmp_path / "x.jsonl").write_text("\n".join(map(row, texts)))
    filters = Filters(min_chars=10, exclude=("buy now",), min_letters=0.5)
    found = prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", filters=filters)
    assert decoded(tmp_path / "out", "train") == [texts[1]]
    assert found.left_out == {"min_chars": 1, "exclude": 1, "min_letters": 1}
    assert found.settings["filters"] == {"min_chars": 10, "exclude": ["buy now"], "min_letters": 0.5}
    assert prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", filters=filters) == found


def test_a_text_too_large_for_memory_gets_the_ids_of_the_whole(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    text = " ".join("".join(rng.choices("abcdefg, <|endoftext|>é漢", k=rng.randrange(1, 12))) for _ in range(150_000))
    (tmp_path / "x.txt").write_text(text)
    whole = prepare([tmp_path / "x.txt"], tokenizer_folder, tmp_path / "whole")
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 100_000)
    monkeypatch.setattr(encoder.Encoder.encode_chunks, "__defaults__", (200_000,))
    parts = prepare([tmp_path / "x.txt"], tokenizer_folder, tmp_path / "parts")
    assert parts.fingerprint == whole.fingerprint and parts.special_in_text == whole.special_in_text
    ids = IndexedReader(tmp_path / "parts" / "train-00000")[0]
    assert Tokenizer.load(tokenizer_folder).encode_document(text) == np.asarray(ids).tolist()


def test_a_source_that_changes_is_noticed_and_one_that_is_touched_is_not(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, reference: Path
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    for path in corpus.rglob("*.jsonl"):
        target = copy / path.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert isinstance(share(copy, tokenizer_folder, out, 0, 2), Unfinished)
    os.utime(copy / "a.jsonl", (1, 1))
    assert isinstance(share(copy, tokenizer_folder, out, 0, 2), Unfinished), "the first part knows the hash of a.jsonl"
    content = (copy / "a.jsonl").read_bytes()
    (copy / "a.jsonl").write_bytes(content.replace(b"a", b"b", 1))
    with pytest.raises(DataError, match="changed since this preparation began"):
        share(copy, tokenizer_folder, out, 1, 2)
    (copy / "a.jsonl").write_bytes(content)
    assert isinstance(share(copy, tokenizer_folder, out, 1, 2), DatasetManifest)
    shards = [
        {name: h for name, h in files_of(folder).items() if name != "dataset.json"} for folder in (out, reference)
    ]
    assert shards[0] == shards[1]
    (copy / "a.jsonl").write_bytes(content.replace(b"a", b"b", 1))
    with pytest.raises(DataError, match=r"a\.jsonl has changed"):
        share(copy, tokenizer_folder, out, 0, 1)


def test_the_forecast_is_near_what_comes(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    told: list[Forecast] = []
    done = prepare_share([corpus], tokenizer_folder, tmp_path / "out", Choices(), lambda _: None, told.append)
    assert isinstance(done, DatasetManifest)
    assert told[0].tokens == pytest.approx(done.splits["train"].tokens, rel=0.1)
    assert told[0].files == len(list((tmp_path / "out").glob("train-*")))
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("train-*"))
    assert told[0].bytes == pytest.approx(size, rel=0.1)


def test_standard_input_is_prepared(tmp_path: Path, tokenizer_folder: Path) -> None:
    arguments = ["prepare", "-", "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out"), "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=ENVIRONMENT, input=row("one") + "\n" + row("two"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["splits"]["train"]["documents"] == 2
    assert decoded(tmp_path / "out", "train") == ["one", "two"]


def test_a_wrong_text_field_ends_before_the_work_starts(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"body": "text"}) for _ in range(5000)))
    arguments = [
        "prepare",
        str(tmp_path / "x.jsonl"),
        "--tokenizer",
        str(tokenizer_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    ended = CliRunner().invoke(command, arguments)
    assert isinstance(ended.exception, DataError) and "no field 'text'; fields: body" in str(ended.exception)
    assert not list((tmp_path / "out").glob("train-*"))
    again = CliRunner().invoke(
        command, [*arguments[:-1], str(tmp_path / "other"), "--text-field", "body", "--workers", "1"]
    )
    assert again.exit_code == 0 and "5,000 documents" in again.output
