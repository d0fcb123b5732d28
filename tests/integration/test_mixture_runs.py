"""Runs on several sources: what they read is the order that was asked for, across stops, appended sources and refusals."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from dsgpt.checkpoint import commit
from dsgpt.config import load_config
from dsgpt.data.dataset import BlockDataset
from dsgpt.data.indexed import IndexedReader
from dsgpt.data.mixture import SLOTS, MixtureStream, Segment, share_slots
from dsgpt.train.resolve import resolve_run
from tests.integration.test_resume import hashes, metrics, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks
from tests.run_fixtures import SEQ_LENGTH
from tests.tokenizer.texts import fuzz

GLOBAL, MICRO = 16, 4


@pytest.fixture(scope="module")
def others(dataset, tmp_path_factory) -> dict[str, Path]:
    """Two more datasets of the same tokenizer, one with and one without a validation split."""
    from dsgpt.data.prepare import prepare

    folder = tmp_path_factory.mktemp("others")
    made = {}
    for seed, (name, validation) in enumerate((("fuzz", 0.1), ("more", 0.0))):
        lines = [json.dumps({"text": text}) for text in fuzz(300, seed=seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        made[name] = folder / name
        prepare([folder / f"{name}.jsonl"], dataset / "tokenizer", made[name], workers=1, validation=validation)
    return made


def sources(*pairs: tuple[Path, float]) -> list[dict[str, object]]:
    return [{"path": str(path), "weight": weight} for path, weight in pairs]


def expected_crc(stream: MixtureStream, step: int, size: int) -> int:
    """What the ranks together say of the ids they read in a step, by the layout that train/step.py promises."""
    total = 0
    for rank in range(size):
        crc = 0
        for first in range(step * GLOBAL + rank * MICRO, (step + 1) * GLOBAL, size * MICRO):
            crc = zlib.crc32(stream.read(np.arange(first, first + MICRO))["input_ids"].tobytes(), crc)
        total += crc
    return total


def crcs(folder: Path) -> dict[int, int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["data_crc"] for line in lines if "step" in line}


def open_all(*paths: Path) -> list[BlockDataset]:
    return [BlockDataset(path, "train", SEQ_LENGTH) for path in paths]


def saved_data(folder: Path, step: int) -> dict[str, object]:
    return commit.read_manifest(folder / f"checkpoints/step-{step:08d}")["data"]


def test_a_mixture_stopped_inside_equals_an_uninterrupted_one_and_reads_what_was_asked(
    write_run, tmp_path, dataset, others
):
    mixed = sources((dataset, 0.7), (others["fuzz"], 0.3))
    settings = {"training.max_steps": 24, "data.train": mixed}
    straight, stopped = write_run("straight", **settings), write_run("stopped", **settings)
    plan = resolve_run(load_config([straight]).config, world_size=2, device="cpu")
    assert plan.data.train[0].num_samples < 0.7 * 24 * GLOBAL, "a source must be passed more than once"
    assert ranks(2).run(train_here, straight, [], 0, "a") == [24, 24]
    assert "stopped at step 7 of 24" in ranks(2).run(train_here, stopped, [], 7, "b1")[0]
    assert ranks(2).run(train_here, stopped, [], 0, "b2") == [24, 24]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert hashes(tmp_path / "stopped/checkpoints/step-00000024") == hashes(
        tmp_path / "straight/checkpoints/step-00000024"
    )
    stream = MixtureStream(open_all(dataset, others["fuzz"]), [Segment(0, share_slots([0.7, 0.3]))], 5)
    assert crcs(tmp_path / "straight") == {step + 1: expected_crc(stream, step, 2) for step in range(24)}
    # Both sources have something set aside; each is a set of its own, and the loss is the mean over all their tokens.
    (evaluation,) = events(tmp_path / "straight", "evaluation")
    sets = evaluation["sets"]
    assert list(sets) == ["data", "fuzz"]
    tokens = sum(one["tokens"] for one in sets.values())
    assert evaluation["tokens"] == tokens
    assert evaluation["loss"] == pytest.approx(sum(one["loss"] * one["tokens"] for one in sets.values()) / tokens)
    kept = json.loads((tmp_path / "straight/checkpoints/step-00000024/evaluation.json").read_text())
    assert kept["loss"] == evaluation["loss"] and kept["sets"] == sets


@pytest.mark.slow
def test_other_weights_or_sources_are_refused_and_appended_ones_only_on_purpose(write_run, tmp_path, dataset, others):
    """The whole life of a run that takes in a source: refused, allowed, recorded, and then simply its order."""
    base = {"checkpoint.save_interval": 2, "optimizer.warmup_steps": 0, "optimizer.lr_schedule": "constant"}
    first = sources((dataset, 0.7), (others["fuzz"], 0.3))
    grown = sources((dataset, 0.5), (others["fuzz"], 0.2), (others["more"], 0.3))

    def go(data: list[dict[str, object]], steps: int, attempt: str, **more: object) -> str | int:
        yaml = write_run("grown", **{**base, "data.train": data, "training.max_steps": steps, **more})
        return ranks(2).run(train_here, yaml, [], 0, attempt)[0]

    folder = tmp_path / "grown"
    assert go(first, 5, "a") == 5
    result = go(sources((dataset, 0.6), (others["fuzz"], 0.4)), 8, "b")
    assert "shares of the sources: checkpoint 70 % / 30 %, now 60 % / 40 %" in result
    assert "data.append_sources" in result and "model.init_from=fork:" in result
    result = go(first[::-1], 8, "c", **{"data.append_sources": True})
    assert "data.train.0 fingerprint: checkpoint" in result and "data.train.1 fingerprint: checkpoint" in result
    assert go(first, 6, "d") == 6  # a third failed start in a row would end in another error
    result = go(grown, 8, "e")
    assert "data.train names sources that the checkpoint's run does not have" in result
    assert "data.append_sources=true takes them in" in result
    result = go(grown, 8, "f", **{"data.append_sources": True, "training.seq_length": 16})
    assert "training.seq_length differs" in result
    assert [step for step, _ in commit.list_committed(folder / "checkpoints")][-1] == 6

    assert go(grown, 8, "g", **{"data.append_sources": True}) == 8
    (event,) = events(folder, "sources_appended")
    assert event["first_sample"] == 6 * GLOBAL and event["sources"] == [str(others["more"])]
    weights = share_slots([0.7, 0.3]), share_slots([0.5, 0.2, 0.3])
    assert saved_data(folder, 8)["segments"] == [
        {"first_sample": 0, "slots": list(weights[0])},
        {"first_sample": 6 * GLOBAL, "slots": list(weights[1])},
    ]
    # It is now the run's order: no flag is needed to go on, nothing is appended twice.
    assert go(grown, 11, "h") == 11
    assert len(events(folder, "sources_appended")) == 1
    assert "data.train.2 fingerprint" in go(first, 12, "i0")
    assert "shares of the sources" in go(sources((dataset, 1), (others["fuzz"], 1), (others["more"], 1)), 12, "i")
    stream = MixtureStream(
        open_all(dataset, others["fuzz"], others["more"]),
        [Segment(0, weights[0]), Segment(6 * GLOBAL, weights[1])],
        5,
    )
    assert crcs(folder) == {step + 1: expected_crc(stream, step, 2) for step in range(11)}


def test_a_run_on_one_dataset_from_before_mixtures_goes_on_and_can_grow(write_run, tmp_path, dataset, others):
    yaml = write_run("old", **{"training.max_steps": 2, "optimizer.warmup_steps": 0})
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [2, 2]
    path = tmp_path / "old/checkpoints/step-00000002/manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("sources", "segments"):
        del manifest["data"][key]  # as it was written then
    path.write_text(commit.sealed(manifest))
    assert ranks(2).run(train_here, yaml, ["training.max_steps=3"], 0, "b") == [3, 3]
    assert saved_data(tmp_path / "old", 3)["segments"] == [{"first_sample": 0, "slots": [SLOTS]}]
    overrides = ["training.max_steps=4", "data.append_sources=true"]
    overrides.append(f"data.train={json.dumps(sources((dataset, 1), (others['more'], 1)))}")
    assert ranks(2).run(train_here, yaml, overrides, 0, "c") == [4, 4]
    assert [len(one["slots"]) for one in saved_data(tmp_path / "old", 4)["segments"]] == [1, 2]


def test_epochs_of_sources_give_the_length_and_the_shares(write_run, dataset, others):
    data = [{"path": str(dataset), "epochs": 2}, {"path": str(others["fuzz"]), "epochs": 0.5}]
    yaml = write_run("epochs", **{"data.train": data, "training.max_steps": None, "training.num_epochs": 1})
    plan = resolve_run(load_config([yaml]).config, world_size=1, device="cpu")
    one, other = (source.num_samples for source in plan.data.train)
    assert plan.data.samples_per_epoch == -(-(4 * one + other) // 2)
    assert plan.max_steps == -(-plan.data.samples_per_epoch // GLOBAL)
    assert plan.data.slots == share_slots([2 * one, 0.5 * other])
    lines = [line for line in plan.describe().splitlines() if line.startswith("data ")]
    assert len(lines) == 2
    for line, passes in zip(lines, (2, 0.5), strict=True):
        stated = float(line.split(": ")[1].split()[0])
        assert stated == pytest.approx(passes, abs=GLOBAL / min(one, other))


def test_named_validation_sets_are_evaluated_each(write_run, tmp_path, dataset, others):
    sets = [{"path": str(others["fuzz"])}, {"path": str(others["more"]), "name": "all-of-more"}]
    yaml = write_run("sets", **{"training.max_steps": 2, "optimizer.warmup_steps": 0, "data.validation": sets})
    assert ranks(1).run(train_here, yaml, [], 0, "a") == [2]
    (event,) = events(tmp_path / "sets", "evaluation")
    assert list(event["sets"]) == ["fuzz", "all-of-more"]
    assert "fuzz " in event["text"] and "all-of-more " in event["text"]
    wrong = write_run("wrong", **{"data.train": sources((others["more"], 1)), "data.validation": sets[1:]})
    with pytest.raises(Exception, match="names training data"):
        resolve_run(load_config([wrong]).config, world_size=1, device="cpu")
    copied = write_run("copied", **{"data.train": sources((dataset, 1), (dataset.parent / "data/../data", 1))})
    with pytest.raises(Exception, match=r"source twice|same data twice"):
        resolve_run(load_config([copied]).config, world_size=1, device="cpu")


def megatron_copy(dataset: Path, prefix: Path) -> None:
    """The training tokens of a dataset of ours, written by Megatron's builder without anything else beside them."""
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    import torch

    (index,) = dataset.glob("train*.idx")
    reader = IndexedReader(index.with_suffix(""))
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=reader.dtype.type)
    for i in range(len(reader)):
        builder.add_document(torch.from_numpy(reader[i].astype(np.int64)), [len(reader[i])])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.slow
def test_files_of_megatron_train_like_the_same_tokens_of_ours(write_run, tmp_path, dataset):
    megatron_copy(dataset, tmp_path / "theirs_text_document")
    theirs = [{"path": str(tmp_path / "theirs_text_document")}]
    settings = {"data.train": theirs, "data.validation": [{"path": str(dataset)}], "training.max_steps": 3}
    yaml = write_run("foreign", **settings, **{"model.vocab_size": 300, "optimizer.warmup_steps": 0})
    assert ranks(2).run(train_here, yaml, [], 2, "a")[0].startswith("stopped at step 2")
    assert ranks(2).run(train_here, yaml, [], 0, "b") == [3, 3]
    (told, _) = events(tmp_path / "foreign", "tokenizer_unknown")
    assert told["sources"] == [theirs[0]["path"]]
    # Another identity of the data keys another order; the blocks are the same.
    mine, other = (
        open_all(dataset)[0],
        resolve_run(load_config([yaml]).config, world_size=1, device="cpu").data.train[0],
    )
    assert other.num_samples == mine.num_samples
    both = other.open(load_config([yaml]).config, 300)
    assert all(np.array_equal(mine.read(np.arange(20))[name], both.read(np.arange(20))[name]) for name in ("labels",))

    small = write_run(
        "small", **{**settings, "model.vocab_size": 200, "optimizer.warmup_steps": 0, "data.validation": []}
    )
    assert "outside the model's vocabulary" in ranks(2).run(train_here, small, [], 0, "a")[0]
    unknown = write_run("unknown", **{**settings, "data.validation": [], "optimizer.warmup_steps": 0})
    with pytest.raises(Exception, match=r"size of the vocabulary is not known(.|\n)*tokenizer\.path"):
        resolve_run(load_config([unknown]).config, world_size=1, device="cpu")
    named = load_config([unknown], [f"tokenizer.path={dataset / 'tokenizer'}"]).config
    plan = resolve_run(named, world_size=1, device="cpu")
    assert plan.model.vocab_size == 300 and plan.data.tokenizer_folder == dataset / "tokenizer"


@pytest.mark.slow
def test_chats_and_text_are_mixed_and_a_stop_changes_nothing(write_run, tmp_path, dataset):
    from dsgpt.data.chat import ChatChoices, open_chat, prepare_chat

    answers = ["yes", "no, as errors.py says", "the exit code is 65"]
    rows = [{"prompt": f"What about {i}?", "completion": answers[i % 3] + " ." * (i % 7)} for i in range(120)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = prepare_chat([tmp_path / "qa.jsonl"], dataset / "tokenizer", tmp_path / "qa", ChatChoices(seq_length=128))
    assert made.splits["train"].documents == 120
    mixed = sources((tmp_path / "qa", 0.5), (dataset, 0.5))
    settings = {"training.max_steps": 8, "data.train": mixed, "training.seq_length": 128}
    straight, stopped = write_run("straight", **settings), write_run("stopped", **settings)
    assert ranks(2).run(train_here, straight, [], 0, "a") == [8, 8]
    assert "stopped at step 3 of 8" in ranks(2).run(train_here, stopped, [], 3, "b1")[0]
    assert ranks(2).run(train_here, stopped, [], 0, "b2") == [8, 8]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    chats, text = open_chat(tmp_path / "qa", "train", 128), BlockDataset(dataset, "train", 128)
    stream = MixtureStream([chats, text], [Segment(0, share_slots([0.5, 0.5]))], 5)
    assert crcs(tmp_path / "straight") == {step + 1: expected_crc(stream, step, 2) for step in range(8)}
