"""The comparison of ways from data to tables, as commands; and what the tables say of known numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from dsgpt.applications import tables
from dsgpt.applications.run import Comparison, unigram_entropy
from dsgpt.cli import cli
from dsgpt.commands import fingerprint, keep_options
from dsgpt.data.dataset import IGNORED, read_samples
from dsgpt.data.packing import open_chat
from dsgpt.errors import ConfigError
from tests.applications.test_prepare import REAL, SHARED, real_data, write

SIDES = ("train", "validation", "test")


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


RESULT = {
    "application": "support",
    "unigram_entropy": 3.5,
    "data": {
        "seed": 7,
        "kinds": {
            "faq": {"train": 10, "validation": 1, "test": 2, "near_copies": 3, "empty": 0, "cut": 5, "divided": 0,
                    "beyond": 0, "test_beyond": 2, "unknown_answers": 0, "answers_seen": 1, "questions": 3, "groups": 2},
            "intents": {"train": 9, "validation": 1, "test": 2, "near_copies": 0, "empty": 4, "cut": 0, "divided": 0,
                        "beyond": 0, "test_beyond": 0, "unknown_answers": 0, "answers_seen": 0, "questions": 2, "groups": 2},
        },
    },
    "base": "a-model",
    "last_blocks": 2,
    "ways": {
        way: {
            "loss": loss,
            "general_loss": 2.0,
            "kinds": {
                "faq": {"rougeL": interval(0.3), "token_f1": interval(0.2), "perplexity": interval(9.0), "questions": 3,
                        "long_inputs": {"asked": 3, "cut": 1}},
                "intents": {"accuracy": interval(0.5), "macro_f1": interval(0.4), "accuracy_pmi": interval(0.6),
                            "macro_f1_pmi": interval(0.7), "questions": 2, "long_inputs": {"asked": 2}},
            },
            **({} if way == "untuned" else {"trained": 1000, "tokens_per_second": 2000.0, "peak_memory_bytes": 1 << 30}),
        }
        for way, loss in (("untuned", 5.0), ("last_blocks", 3.0), ("full", 2.5))
    },
    "baselines": {"faq": {}, "intents": {"by chance": {"accuracy_pmi": {"value": 0.1}},
                                         "most frequent": {"accuracy": {"value": 0.2}, "macro_f1": {"value": 0.03}}}},
    "cells": {"1 of 10%": 3.04, "2 of 10%": 3.0, "6 of 10%": 3.2, "1 of 100%": 2.9, "2 of 100%": 2.7, "6 of 100%": 2.5},
    "chosen": {"10%": 1, "100%": 3},
}  # fmt: skip


def test_the_tables_show_each_number_under_its_heading():
    _, headings, rows = tables.ways_table(RESULT)
    cells = dict(zip(headings, rows[1], strict=True))
    assert (cells["held-out loss"], cells["perplexity"], cells["general text"]) == ("3.000", "20.1", "2.000")
    assert (cells["trained"], cells["memory"]) == ("1K", "1.0 GiB") and rows[0][-1] == ""
    scores = {"untuned": [0.1, 0.2, 0.3], "last_blocks": [0.2, 0.3, 0.4], "full": [0.5, 0.6, 0.7]}
    said = {way: [{"rougeL": value, "group": "a"} for value in side] for way, side in scores.items()}
    title, headings, rows = tables.kind_table(RESULT, "faq", said)
    assert title == "faq: 3 questions of 1 groups" and headings == [
        "",
        "ROUGE-L",
        "minus untuned",
        "token F1",
        "perplexity",
    ]
    assert rows[0][1:3] == ["0.300 [0.200, 0.400]", ""] and rows[2][2].startswith("0.400 [0.400") and len(rows) == 3
    chosen = {way: [{"choice_pmi": one, "answer": "a", "group": None} for one in "ab"] for way in said}
    _, headings, rows = tables.kind_table(RESULT, "intents", chosen)
    assert headings[1:] == ["accuracy, PMI", "minus untuned", "macro-F1, PMI", "accuracy", "macro-F1"]
    assert rows[1][1].startswith("0.600") and rows[1][2].startswith("0.000") and rows[1][4].startswith("0.500")
    assert rows[3] == ["by chance", "0.100", "", "", "", ""]
    assert rows[4] == ["most frequent", "", "", "", "0.200", "0.030"]
    _, headings, rows = tables.cells_table(RESULT)
    assert headings == ["of the data", "last 1", "last 2", "last 6", "auto"]
    assert rows[0][1:] == ["3.040 *", "3.000", "3.200", "1: within 0.05 of the best"]
    assert rows[1][-1] == "3: NOT within 0.05 of the best", "counted as the 2 that it is nearest to"
    text = "\n".join(tables.facts(RESULT))
    assert "5 (50%) cut to their lead" in text and "faq: 1 of 3 questions (33%) are longer" in text
    assert "3.500 nats" in text and "1 test answers stand word for word" in text and "2 have a passage beyond" in text
    assert (
        "intents: 9 to train on" in text and "4 without an answer left out" in text and "seed 7; base a-model" in text
    )
    told = tables.seen_line("faq", said["full"], [True, False, True], "rougeL")
    assert told.endswith("ROUGE-L where the answer stands in the training data 0.600 (2), else 0.600 (1)")
    assert tables.seen_line("faq", said["full"], [True] * 3, "rougeL") is None
    shown = tables.markdown(("a title", ["", "x"], [["one", "1"]]))
    assert shown == "**a title**\n\n|  | x |\n| --- | --- |\n| one | 1 |\n"


def test_a_folder_keeps_what_its_results_come_from(tmp_path):
    text, kept = tmp_path / "text.jsonl", tmp_path / "options.json"
    text.write_text("one\n")
    options = {
        "base": fingerprint("hf:a/b"),
        "texts": [fingerprint(str(tmp_path / "text.jsonl"))],
        "rates": {"full": 1e-4},
    }
    keep_options(kept, options, "again")
    keep_options(kept, options, "again")
    with pytest.raises(ConfigError, match="rates"):
        keep_options(kept, {**options, "rates": {}}, "again")
    text.write_text("two, and more\n")
    with pytest.raises(ConfigError, match="texts"):
        keep_options(kept, {**options, "texts": [fingerprint(str(text))]}, "again")


def test_rates_are_of_ways():
    words = ["application", "run", "news", "--source", "articles=x", "--base", "y", "--output-dir", "z", "--rate"]
    for rate, seen in (("full=fast", "a number is needed"), ("all=1e-4", "the ways are last_blocks")):
        done = CliRunner().invoke(cli, [*words, rate])
        assert done.exit_code == 2 and seen in done.output


def articles(count):
    """Each summary can be told from the article's first words."""
    return [{"document": f"City {i % 9} grows. It is said that number {i} matters. " * 3, "summary": f"City {i % 9} grows."}
            for i in range(count)]  # fmt: skip


@pytest.mark.slow
def test_ways_are_trained_evaluated_and_shown_and_a_second_call_does_nothing_again(model_folder, tmp_path):
    path = write(tmp_path / "articles.jsonl", articles(120))

    def run():
        words = ["application", "run", "news", "--source", f"articles={path}", "--base", model_folder]
        words += ["--output-dir", tmp_path / "out", "--samples", 5, "--max-new-tokens", 8]
        for override in ("training.num_epochs=null", "training.max_steps=3", "optimizer.warmup_steps=1"):
            words += ["--set", override]
        command = [sys.executable, "-m", "dsgpt", *map(str, words), "--set", "training.global_batch_size=4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = run()
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert set(result["ways"]) == {"untuned", "last_blocks", "lora", "full", "scratch"}
    assert len({way["loss"] for way in result["ways"].values()}) == 5
    assert set(result["cells"]) == {f"{n} of {share}" for n in (1, 2, 3) for share in ("10%", "100%")}
    shown = [way["loss"] for way in result["ways"].values()]
    assert all(f"{loss:.3f}" in first for loss in shown) and "lead-3" in first
    assert f"| {shown[0]:.3f} |" in (tmp_path / "out/report.md").read_text()
    assert (
        result["ways"]["lora"]["trained"] < result["ways"]["last_blocks"]["trained"] < result["ways"]["full"]["trained"]
    )
    told = subprocess.run(
        [sys.executable, "-m", "dsgpt", "evaluate", tmp_path / "out/full", "--data", tmp_path / "out/test", "--split", "train",
         "--json"], capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(told.stdout)["loss"] == pytest.approx(result["ways"]["full"]["loss"], rel=1e-6)
    samples = open_chat(tmp_path / "out/test", "train", 256)
    labels = np.concatenate(
        [read_samples(samples, np.array([i]))["labels"].ravel() for i in range(samples.num_samples)]
    )
    counts = np.bincount(labels[labels != IGNORED])
    shares = counts[counts > 0] / counts.sum()
    assert unigram_entropy(tmp_path / "out/test", 256) == pytest.approx(-(shares * np.log(shares)).sum())
    second = run()
    assert "$ dsgpt" not in second and second.strip() in first
    with pytest.raises(ConfigError, match="samples: 5, now 6"):
        Comparison("news", {"articles": [path]}, str(model_folder), tmp_path / "out", samples=6).run()


def customers(tmp_path):
    turns = [{"speaker": ("USER", "SYSTEM")[i % 2], "utterance": f"said {i}"} for i in range(6)]
    return {
        "dialogues": [{"dialogue_id": f"d{n}", "turns": [*turns, {"speaker": "USER", "utterance": f"bye {n}"},
                                                         {"speaker": "SYSTEM", "utterance": f"Bye {n}."}]} for n in range(60)],
        "faq": [{"question": f"What is {n * 7}?", "answer": f"A number, {n * 7}."} for n in range(60)],
        "manuals": [{"title": f"flow {n}", "steps": [f"Open {n}.", f"Close {n * n}."]} for n in range(60)],
        "intents": [{"text": f"my {word} no {n}", "category": word} for n in range(30) for word in ("card", "loan", "rate")],
    }  # fmt: skip


def documents(tmp_path):
    """Contracts of four contexts, whose passages are everywhere in them."""
    return {
        "summaries": [{"document": f"We may keep {n} of your things.", "summary": f"They keep {n}."} for n in range(60)],
        "clauses": [{"text": f"{word} change {n} times", "label": word} for n in range(30) for word in ("Terms", "Prices")],
        "contracts": [{"title": f"C{n}", "context": " ".join(f"Clause {i} of {n} says so." for i in range(60)),
                       "question": f"{n}?", "answers": {"text": [f"Clause {n % 60} of {n} says so."]}} for n in range(60)],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, make", [("support", customers), ("legal", documents)])
def test_every_kind_of_question_is_asked_and_shown(name, make, model_folder, tmp_path):
    words = ["application", "run", name, "--base", model_folder, "--output-dir", tmp_path / "out", "--no-grid"]
    words += ["--samples", 3, "--max-new-tokens", 8, "--long-input", "chunk_and_merge", "--test-share", 0.3]
    for kind, records in make(tmp_path).items():
        words += ["--source", f"{kind}={write(tmp_path / f'{kind}.jsonl', records)}"]
    for override in ("num_epochs=null", "max_steps=2", "global_batch_size=2"):
        words += ["--set", f"training.{override}"]
    command = [sys.executable, "-m", "dsgpt", *map(str, words), "--set", "optimizer.warmup_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "out/result.json").read_text())
    for row in result["ways"].values():
        assert set(row["kinds"]) == set(make(tmp_path)) and all(its["questions"] == 3 for its in row["kinds"].values())
    counts = [row["trained"] for way, row in result["ways"].items() if way != "untuned"]
    assert counts[2] == counts[3] == max(counts), "all weights, tuned and from scratch"
    if name == "legal":
        read = result["ways"]["full"]["kinds"]["contracts"]["long_inputs"]
        assert read["in pieces"] == 3 and read["pieces"] > 6 and "in pieces" in done.stdout
    for kind in make(tmp_path):
        assert f"{kind}: 3 questions" in done.stdout
    told = json.loads((tmp_path / "out/application/summary.json").read_text())["kinds"]
    test, all_ = (sum(numbers[side] for numbers in told.values() for side in sides) for sides in (("test",), SIDES))
    assert 0.2 < test / all_ < 0.4


@pytest.mark.slow
@real_data
@pytest.mark.parametrize("name", sorted(REAL))
def test_each_application_runs_on_real_data_and_a_real_model(name, tmp_path):
    """Two steps a way: stories260K, whose context of 512 divides dialogues and cuts contracts."""
    words = [f"{key}={SHARED / file}" for key, files in REAL[name][0].items() for file in files]
    command = ["application", "run", name, *(word for source in words for word in ("--source", source))]
    command += ["--base", SHARED / "weights/stories260K-hf", "--output-dir", tmp_path / "out", "--no-grid"]
    command += ["--samples", 3, "--max-new-tokens", 8, *(("--limit", "intents=200") if name == "support" else ())]
    for override in ("training.num_epochs=null", "training.max_steps=2", "optimizer.warmup_steps=1"):
        command += ["--set", override]
    command = [sys.executable, "-m", "dsgpt", *map(str, command), "--set", "training.global_batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert set(result["ways"]["full"]["kinds"]) == set(REAL[name][1])
    losses = [way["loss"] for way in result["ways"].values()]
    assert len(set(losses)) == 5 and result["unigram_entropy"] < 6.3


@pytest.mark.slow
def test_the_small_base_is_made_and_made_once(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(
            " ".join(f"The {w} of {i} goes {w * i}." for w in ("cat", "dog", "sun", "sea")) * 40
        )

    def run():
        words = ["application", "base", texts, "--output-dir", tmp_path / "base", "--set", "training.max_steps=2"]
        words += ["--set", "training.num_epochs=null", "--set", "optimizer.warmup_steps=1", "--vocab-size", 300]
        command = [sys.executable, "-m", "dsgpt", *map(str, words), "--set", "training.global_batch_size=2"]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)

    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base/export")
    assert model.config.max_position_embeddings == 1024 and model.config.num_hidden_layers == 6
    assert (
        len(AutoTokenizer.from_pretrained(tmp_path / "base/export").encode("<|im_end|>", add_special_tokens=False)) == 1
    )
    assert "$ dsgpt" not in run().stdout
