"""Records of chat formats become packed rows: the same whatever the workers, and nothing is left out untold."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dsgpt.cli.data import data as command
from dsgpt.data.chat import ChatChoices, open_chat, prepare_chat
from dsgpt.data.choices import Share, Unfinished
from dsgpt.data.dataset import IGNORED
from dsgpt.data.indexed import IndexedReader
from dsgpt.data.manifest import DatasetManifest
from dsgpt.data.verify import verify_dataset
from dsgpt.errors import ConfigError, DataError
from dsgpt.tokenizer import Tokenizer
from tests.data.test_prepare import files_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]},
        "answer",
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "answer"}]}, "answer"),
    "alpaca": ({"instruction": "q", "input": "", "output": "answer"}, "answer"),
    "completion": ({"prompt": "q", "completion": "answer"}, "answer"),
    "pairs": ({"document": "q", "summary": "answer"}, "answer"),
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_format_is_told_and_read(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    record, answer = FORMATS[name]
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(record)] * 20))
    arguments = ["prepare-chat", str(tmp_path / "x.jsonl"), "--tokenizer", str(tokenizer_folder), "--workers", "1"]
    ran = CliRunner().invoke(command, [*arguments, "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert ran.exit_code == 0 and f"20 of 20 records are {name}" in ran.stderr
    assert verify_dataset(tmp_path / "out") == []
    samples = open_chat(tmp_path / "out", "train", seq_length=150)
    tokenizer = Tokenizer.load(tokenizer_folder)
    labels = [label for i in range(len(samples)) for label in samples[i].labels.tolist() if label != IGNORED]
    assert tokenizer.decode(labels) == f"{answer}<|im_end|></s>" * 20
    again = ["--format", name, "--output", str(tmp_path / "named"), "--json"]
    ran = CliRunner().invoke(command, [*arguments, *again], catch_exceptions=False)
    assert json.loads(ran.stdout)["splits"]["train"]["documents"] == 20


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": "the cat " * (i % 40 + 1)},
            ]
        }
        for i in range(count)
    ]


def make(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Path, out: str, **choices: Any
) -> DatasetManifest | Unfinished:
    folder.mkdir(exist_ok=True)
    source = folder / "x.jsonl"
    if not source.exists():
        source.write_text("\n".join(map(json.dumps, rows)))
    return prepare_chat([source], tokenizer, folder / out, ChatChoices(**choices))


@pytest.mark.slow
def test_the_output_does_not_depend_on_workers_and_tasks(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{**row, "note": "x" * 900} for row in records(3000)]
    one = make(tmp_path, rows, tokenizer_folder, "one", validation=0.1)
    assert isinstance(one, DatasetManifest) and len(one.splits["train"].shards) > 1
    make(tmp_path, rows, tokenizer_folder, "two", validation=0.1, workers=2)
    left = make(tmp_path, rows, tokenizer_folder, "tasks", validation=0.1, share=Share(1, 2))
    assert isinstance(left, Unfinished)
    make(tmp_path, rows, tokenizer_folder, "tasks", validation=0.1, share=Share(0, 2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "tasks")
    assert 0.07 < one.splits["validation"].documents / 3000 < 0.13
    assert make(tmp_path, rows, tokenizer_folder, "one", validation=0.1) == one
    with pytest.raises(DataError, match="different settings"):
        make(tmp_path, rows, tokenizer_folder, "one", validation=0.1, loss_on="all")


def test_what_cannot_be_learned_from_is_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = records(40)
    rows[3]["messages"][1]["train"] = False
    rows[5]["messages"][1]["content"] = "the cat " * 500
    rows[6]["messages"][0]["content"] = "the cat " * 500
    made = make(tmp_path, rows, tokenizer_folder, "drop", seq_length=400)
    assert isinstance(made, DatasetManifest)
    nothing = "nothing to learn from: no message of it has loss"
    assert made.left_out == {nothing: 1, "too long": 2} and made.splits["train"].documents == 37
    named = [json.loads(line) for line in (tmp_path / "drop" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in named] == [(4, nothing), (6, "too long"), (7, "too long")]
    cut = make(tmp_path, rows, tokenizer_folder, "truncate", seq_length=400, too_long="truncate")
    assert isinstance(cut, DatasetManifest) and cut.splits["train"].documents == 38
    assert cut.left_out == {nothing: 1, "truncated": 1, "nothing to learn from once it is truncated": 1}
    reader = IndexedReader(tmp_path / "truncate" / "train-00000")
    assert max(reader.lengths) == 401
    with pytest.raises(DataError, match="longer than 400 tokens"):
        make(tmp_path, rows, tokenizer_folder, "refuse", seq_length=400, too_long="refuse")


def test_bad_records_are_set_aside_and_too_many_fail(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = records(30)
    rows[7] = {"messages": [{"role": "user", "content": "no answer"}]}
    with pytest.raises(DataError, match="no assistant turn"):
        make(tmp_path, rows, tokenizer_folder, "out")
    made = make(tmp_path, rows, tokenizer_folder, "out", max_bad_fraction=0.05)
    assert isinstance(made, DatasetManifest) and made.bad_lines.count == 1
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert bad["line"] == 8 and "no assistant turn" in bad["reason"]


def test_rows_hold_whole_conversations_that_do_not_see_each_other(tmp_path: Path, tokenizer_folder: Path) -> None:
    made = make(tmp_path, records(200), tokenizer_folder, "out")
    assert isinstance(made, DatasetManifest)
    reader, mask = (
        IndexedReader(tmp_path / "out" / "train-00000"),
        np.fromfile(tmp_path / "out" / "train-00000.mask", np.uint8),
    )
    expected = []
    for i in range(len(reader)):
        start = int(reader.offsets[i]) // reader.dtype.itemsize
        ids, learned = reader[i].tolist(), mask[start : start + len(reader[i])].tolist()
        expected.append((ids, [token if on else IGNORED for token, on in zip(ids[1:], learned[1:], strict=True)]))
    samples = open_chat(tmp_path / "out", "train", seq_length=512)
    found = []
    for block in (samples[i] for i in range(len(samples))):
        for number in range(int(block.document_ids.max()) + 1):
            here = np.flatnonzero(block.document_ids == number)
            assert block.position_ids[here].tolist() == list(range(len(here)))
            found.append((block.input_ids[here].tolist(), block.labels[here].tolist()))
        assert (block.labels[block.document_ids < 0] == IGNORED).all()
    # The last token of a full row is a target only; otherwise what comes after a conversation is none of its targets.
    whole = {tuple(ids): [*targets, IGNORED] for ids, targets in expected}
    full = {tuple(ids[:-1]): targets for ids, targets in expected}
    assert len(found) == len(whole) == len(full) == 200
    assert {(whole if tuple(ids) in whole else full)[tuple(ids)] == labels for ids, labels in found} == {True}
    assert {
        ids if ids in whole else next(one for one in whole if one[:-1] == ids)
        for ids in (tuple(ids) for ids, _ in found)
    } == set(whole)
    with pytest.raises(DataError, match="do not fit into rows"):
        open_chat(tmp_path / "out", "train", seq_length=64)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{**row, "note": "x" * 900} for row in records(4000)]
    make(tmp_path, rows, tokenizer_folder, "whole", validation=0.1)
    out = tmp_path / "killed"
    arguments = ["prepare-chat", str(tmp_path / "x.jsonl"), "--tokenizer", str(tokenizer_folder), "--output", str(out)]
    words = [sys.executable, "-m", "dsgpt", "data", *arguments, "--validation", "10%", "--workers", "1"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as job:
        while not list(out.glob(".prepare/part-*.json")) and job.poll() is None:
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
    assert job.returncode == -signal.SIGKILL and not (out / "dataset.json").exists()
    numbers = [json.loads(path.read_text())["number"] for path in out.glob(".prepare/part-*.json")]
    kept = {path: path.stat().st_mtime_ns for n in numbers for path in out.glob(f"*-{n:05d}.*")}
    assert len(kept) >= 3
    (out / ".prepare" / "train-00099.mask.elsewhere.1.tmp").write_bytes(b"left behind")
    make(tmp_path, rows, tokenizer_folder, "killed", validation=0.1)
    assert files_of(tmp_path / "whole") == files_of(out)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "a finished part was done again"


def test_no_other_version_of_the_library_goes_on_with_a_dataset(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = records(40)
    make(tmp_path, rows, tokenizer_folder, "out", share=Share(1, 2))
    plan = tmp_path / "out" / ".prepare" / "plan.json"
    plan.write_text(plan.read_text().replace('"tokenizers 0.', '"tokenizers 9.'))
    with pytest.raises(DataError, match="another library"):
        make(tmp_path, rows, tokenizer_folder, "out")


def test_the_dataset_keeps_the_template_that_made_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    make(tmp_path, records(50), tokenizer_folder, "out", max_bad_fraction=0.0)
    reader = IndexedReader(tmp_path / "out" / "train-00000")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for i, record in enumerate(records(50)):
        assert theirs.apply_chat_template(record["messages"])["input_ids"] == reader[i].tolist()
    with pytest.raises(DataError, match="different settings"):
        make(
            tmp_path,
            records(50),
            tokenizer_folder,
            "out",
            chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        )


def test_records_of_tables_and_packed_files_are_read_alike(tmp_path: Path, tokenizer_folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{**one, "at": datetime(2024, 1, 1), "tool_calls": None} for one in row["messages"]]}
        for row in records(30)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        json.dump(records(30), stream)
    with open(tmp_path / "c.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(
            {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
            for row in records(30)
        )
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records(30))))
    hashes = set()
    for name in ("a.parquet", "b.json.gz", "c.csv", "d.jsonl"):
        made = prepare_chat([tmp_path / name], tokenizer_folder, tmp_path / f"out-{name}", ChatChoices())
        assert isinstance(made, DatasetManifest)
        (shard,) = made.splits["train"].shards
        hashes.add((shard.sha256_bin, shard.sha256_idx, shard.sha256_mask))
    assert len(hashes) == 1


def test_a_record_that_is_nested_too_deeply_is_only_a_bad_record(tmp_path: Path, tokenizer_folder: Path) -> None:
    deep: Any = "x"
    for _ in range(450):
        deep = [{"a": deep}]
    rows = records(10)
    rows[4]["messages"][1]["note"] = deep
    made = make(tmp_path, rows, tokenizer_folder, "out", max_bad_fraction=0.1)
    assert isinstance(made, DatasetManifest) and made.bad_lines.count == 1
    assert made.splits["train"].documents == 9


def test_a_mask_that_is_cut_or_changed_is_found(tmp_path: Path, tokenizer_folder: Path) -> None:
    make(tmp_path, records(50), tokenizer_folder, "out")
    mask = tmp_path / "out" / "train-00000.mask"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"what dataset\.json says"):
        open_chat(tmp_path / "out", "train", seq_length=512)
    mask.write_bytes(bytes([1 - whole[0]]) + whole[1:])
    assert any("mask" in str(problem) for problem in verify_dataset(tmp_path / "out"))
    mask.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_chat(tmp_path / "out", "train", seq_length=512)


def test_choices_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for wrong in ({"loss_on": "user"}, {"too_long": "cut"}, {"seq_length": 1}, {"validation": 1.5}, {"workers": 0}):
        with pytest.raises(ConfigError):
            ChatChoices(**wrong)
    with pytest.raises(ConfigError, match="pairs alone"):
        _ = ChatChoices(format="alpaca", instruction="Summarise:").named_format


def real_records(name: str) -> list[dict[str, Any]]:
    """Real texts; where nobody has published them in a format, their records are put into its fields."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    if name == "messages":
        speakers = {"agent": "assistant", "customer": "user"}
        dialogues = [one["original"] for one in json.loads((SHARED / "support/abcd_sample.json").read_text("utf-8"))]
        return [
            {"messages": [{"role": speakers[who], "content": text} for who, text in turns if who in speakers]}
            for turns in dialogues
        ]
    if name == "alpaca":
        tasks = map(json.loads, (SHARED / "instruct/self_instruct_seed_tasks.jsonl").read_text("utf-8").splitlines())
        return [{"instruction": task["instruction"], **case} for task in tasks for case in task["instances"]]
    if name == "pairs":
        return list(json.loads((SHARED / "legal/legalsum_tosdr_annotated_v1.json").read_text("utf-8")).values())
    if name == "sharegpt":
        found: list[dict[str, Any]] = json.loads((SHARED / "instruct/glaive_toolcall_en_demo.json").read_text("utf-8"))
        return found
    return [json.loads(line) for line in (SHARED / "news/xsum_200.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("messages", []),
        ("sharegpt", []),
        ("alpaca", []),
        ("completion", []),
        ("pairs", ["--fields", "original_text,reference_summary", "--instruction", "In plain words:"]),
    ],
)
def test_real_data_is_prepared(tmp_path: Path, tokenizer_folder: Path, name: str, options: list[str]) -> None:
    rows = real_records(name)
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["prepare-chat", str(tmp_path / "real.jsonl"), "--tokenizer", str(tokenizer_folder)]
    options = ["--output", str(tmp_path / "out"), "--workers", "1", *options]
    ran = CliRunner().invoke(command, [*arguments, *options], catch_exceptions=False)
    assert ran.exit_code == 0 and name in ran.stderr and "loss on" in ran.stdout
    ran = CliRunner().invoke(command, [*arguments, *options, "--json"], catch_exceptions=False)
    made = json.loads(ran.stdout)
    assert (made["bad_lines"]["count"], made["left_out"]) == (0, {})
    assert made["splits"]["train"]["documents"] == len(rows)
    assert verify_dataset(tmp_path / "out") == []


def test_records_of_several_formats_are_refused_with_the_count_of_each(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = [FORMATS["messages"][0]] * 12 + [FORMATS["alpaca"][0]] * 7 + [{"text": "of no format"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "first.jsonl").write_text("\n".join(map(json.dumps, records[:12])))
    (tmp_path / "second.jsonl").write_text("\n".join(map(json.dumps, records[12:19])))
    for inputs, counted in (
        (["mixed"], "20 records: 12 messages, 7 alpaca, 1 of no known"),
        (["first", "second"], "19"),
    ):
        with pytest.raises(DataError) as caught:
            prepare_chat([tmp_path / f"{name}.jsonl" for name in inputs], tokenizer_folder, tmp_path / "out")
        (problem,) = caught.value.problems
        assert "the records have several formats" in problem.what and counted in problem.seen
        assert "prepare each kind for itself" in problem.do
    # Named, the others are counted as bad and told one by one.
    with pytest.raises(DataError, match=r"8 of 20 records cannot be read(.|\n)*mixed.jsonl:13: there is no 'messages'"):
        prepare_chat([tmp_path / "mixed.jsonl"], tokenizer_folder, tmp_path / "named", ChatChoices(format="messages"))


def test_which_template_is_used_is_said_and_what_it_writes_that_are_no_tokens(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(FORMATS["messages"][0])] * 20))
    words = [
        "prepare-chat",
        str(tmp_path / "x.jsonl"),
        "--tokenizer",
        str(tokenizer_folder),
        "--workers",
        "1",
        "--output",
    ]

    def said(name: str, *more: str) -> str:
        ran = CliRunner().invoke(command, [*words, str(tmp_path / name), *more], catch_exceptions=False)
        assert ran.exit_code == 0
        return ran.stderr

    plain = said("plain")
    assert "chat template: the default, ChatML" in plain
    assert "<|im_start|> and <|im_end|> are several tokens each; --add-tokens" in plain
    adding = ["--add-tokens", "<|im_start|>", "--add-tokens", "<|im_end|>"]
    assert "several tokens" not in said("added", *adding)
    assert "<|im_end|> are several tokens" in said("half", *adding[:2])
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    own = said("own", "--chat-template", str(tmp_path / "own.jinja"))
    assert "chat template: given" in own and "several tokens" not in own
    # One token each, and the loss is on the end of an answer as before.
    tokenizer = Tokenizer.load(tmp_path / "added" / "tokenizer")
    samples = open_chat(tmp_path / "added", "train", seq_length=150)
    labels = [label for label in samples[0].labels.tolist() if label != IGNORED]
    assert labels.count(tokenizer.vocab_size - 1) == tokenizer.decode(labels).count("answer") > 0
    assert Tokenizer.load(tmp_path / "plain" / "tokenizer").vocab_size == tokenizer.vocab_size - 2
