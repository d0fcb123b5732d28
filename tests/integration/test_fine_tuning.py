"""Pretrained models of Hugging Face in, trained in part or whole under ZeRO, out again into transformers."""

from __future__ import annotations

import fnmatch
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsgpt.checkpoint.export import export_checkpoint
from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.checkpoint.weights import find_model
from dsgpt.config import load_config
from dsgpt.train.resolve import resolve_run
from tests.hf_models import BLOCKS
from tests.integration.test_resume import hashes, metrics, stop_changes_nothing, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks

KINDS = ("gpt2", "llama", "qwen3", "mistral", "gemma", "gpt_neox", "phi", "opt")
STAGES = ("zero2", "zero3")
STEPS = 4
LAST = f"checkpoints/step-{STEPS:08d}"
SHORT = {
    "training.max_steps": STEPS,
    "model": {},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.1},
    "logging": {"log_interval": 1, "eval_samples": 8},
}


def first_loss(folder, yaml):
    """Of the first step's samples by transformers itself, each document alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    plan = resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    from dsgpt.data.mixture import MixtureStream
    from dsgpt.train.order import first_segments

    sources = [one.open(plan.config, plan.model.vocab_size) for one in plan.data.train]
    stream = MixtureStream(sources, first_segments(plan), plan.config.run.seed)
    arrays = stream.read(np.arange(plan.config.training.global_batch_size))
    total, count = 0.0, 0
    for ids, labels, documents in zip(arrays["input_ids"], arrays["labels"], arrays["document_ids"], strict=True):
        for document in np.unique(documents[documents >= 0]):
            here = documents == document
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[here].astype(np.int64))[None]).logits[0]
            target = torch.from_numpy(labels[here].astype(np.int64))
            total += float(F.cross_entropy(logits, target, reduction="sum"))
            count += int((target != -100).sum())
    return total / count


def export_and_load(run, output):
    from transformers import AutoModelForCausalLM

    report = export_checkpoint(find_model(str(run)), output)
    model, told = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, dtype=torch.float32)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return report, model.eval()


def alternating(default, *dimensions):
    """Every combination of a first thing with the others; of those in `default` one each in the default tier, in turn."""
    first, *others = dimensions
    rest = list(itertools.product(*others))
    return [
        pytest.param(one, *other, marks=() if one in default and number % len(rest) == place else pytest.mark.slow)
        for number, one in enumerate(first)
        for place, other in enumerate(rest)
    ]


@pytest.mark.parametrize(("kind", "stage"), alternating(("gpt2", "gpt_neox", "phi"), KINDS, STAGES))
def test_every_architecture_trains_resumes_and_comes_out_again(kind, stage, hf_folder, write_run, tmp_path):
    folder = hf_folder(kind)
    settings = SHORT | {"deepspeed": stage, "model": {"init_from": f"hf:{folder}"}}
    straight = write_run("straight", **settings)
    losses = stop_changes_nothing(straight, write_run("stopped", **settings), 2, STEPS)
    assert losses[0] == pytest.approx(first_loss(folder, straight), abs=2e-5)
    assert losses[-1] < losses[0]
    report, _ = export_and_load(tmp_path / "straight", tmp_path / "export")
    assert report.checked_with == "transformers" and report.logit_difference < 1e-4


FEED_FORWARD = {"llama": "*mlp*", "mistral": "*mlp*", "opt": "*.fc?.*"}
WAYS = {
    "last_blocks": {"train": "last_blocks", "num_last_blocks": 1},
    "patterns": {"train": "patterns"},
    "lora": {"train": "lora", "lora": {"rank": 4, "alpha": 8.0}},
    "dora": {"train": "lora", "lora": {"rank": 4, "use_dora": True}},
    "decay": {"train": "all", "learning_rate_decay_per_block": 0.5},
    "unfreezing": {"train": "last_blocks", "num_last_blocks": 1, "unfreeze_at": {2: 2, 3: "all"}},
}


@pytest.mark.parametrize(
    ("way", "kind", "stage"),
    alternating(("last_blocks", "patterns", "lora", "decay"), WAYS, ("llama", "mistral", "opt"), STAGES),
)
def test_every_way_of_training_a_part(way, kind, stage, hf_folder, write_run, tmp_path):
    folder = hf_folder(kind)
    named = {"patterns": [FEED_FORWARD[kind]]} if way == "patterns" else {}
    settings = SHORT | {
        "deepspeed": stage,
        "model": {"init_from": f"hf:{folder}"},
        "fine_tuning": WAYS[way] | named,
        "checkpoint": {"save_interval": 1, "keep_last": 0},
    }
    straight = write_run("straight", **settings)
    losses = stop_changes_nothing(straight, write_run("stopped", **settings), 3, STEPS)
    assert losses[0] == pytest.approx(first_loss(folder, straight), abs=2e-5)
    assert losses[-1] < losses[0]
    if way not in ("decay", "unfreezing"):  # what is frozen is on the disk once, also after another start
        files = [tmp_path / f"stopped/checkpoints/step-{step:08d}/frozen-00000.safetensors" for step in (1, 3, STEPS)]
        assert len({file.stat().st_ino for file in files}) == 1
    _, model = export_and_load(tmp_path / "straight", tmp_path / "export")
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = set(CheckpointReader(tmp_path / "straight" / LAST).parameters)
    assert changed, "nothing was trained"
    if way == "last_blocks":
        assert all(f".{BLOCKS - 1}." in name or "norm" in name or "lm_head" in name for name in changed), changed
    if way == "patterns" and kind != "llama":  # which trains under dsgpt's own names
        assert changed == set(fnmatch.filter(before, FEED_FORWARD[kind])) == trained


@pytest.mark.slow
def test_the_number_of_blocks_is_measured_once_and_kept_for_every_start(hf_folder, write_run, tmp_path, dataset):
    """As written by hand with the number that was measured, bit for bit; a fork takes it over."""
    settings = SHORT | {"deepspeed": "zero3", "model": {"init_from": f"hf:{hf_folder('llama')}"}}
    auto = write_run("auto", **settings, fine_tuning={"train": "last_blocks", "num_last_blocks": "auto"})
    pool = ranks(2)
    assert "stopped at step 2" in pool.run(train_here, auto, [], 2, "a")[0]
    assert pool.run(train_here, auto, [], 0, "b") == [STEPS, STEPS]
    (told,) = events(tmp_path / "auto", "num_last_blocks")
    chosen = told["num_last_blocks"]
    assert told["domain_loss"] == pytest.approx(5.9, abs=0.3) and told["general_loss"] is None
    by_hand = write_run("by_hand", **settings, fine_tuning={"train": "last_blocks", "num_last_blocks": chosen})
    assert pool.run(train_here, by_hand, [], 0, "a") == [STEPS, STEPS]
    assert hashes(tmp_path / "auto" / LAST) == hashes(tmp_path / "by_hand" / LAST)
    forked = {"model": {"init_from": f"fork:{tmp_path / 'auto'}@2"}, "fine_tuning.num_last_blocks": "auto"}
    fork = write_run("fork", **settings | forked, **{"fine_tuning.train": "last_blocks"})
    assert pool.run(train_here, fork, [], 0, "a") == [STEPS, STEPS]
    assert not events(tmp_path / "fork", "num_last_blocks") and not events(tmp_path / "fork", "frozen")
    assert (
        CheckpointReader(tmp_path / "fork" / LAST).parameters == CheckpointReader(tmp_path / "auto" / LAST).parameters
    )


def test_what_is_trained_may_change_between_starts_and_each_change_is_told(hf_folder, write_run, tmp_path):
    settings = SHORT | {"model": {"init_from": f"hf:{hf_folder('llama')}"}, "fine_tuning": {"train": "last_blocks"}}
    yaml, pool = write_run("run", **settings), ranks(2)
    assert "stopped at step 1" in pool.run(train_here, yaml, [], 1, "a")[0]
    assert "stopped at step 2" in pool.run(train_here, yaml, ["fine_tuning.num_last_blocks=3"], 1, "b")[0]
    assert pool.run(train_here, yaml, ["fine_tuning.num_last_blocks=1"], 0, "c") == [STEPS, STEPS]
    (thawed,), (frozen,) = events(tmp_path / "run", "thawed"), events(tmp_path / "run", "frozen")
    assert thawed["parameters"] == 9 and "blocks.0." in thawed["text"], "the matrices and norms of one block"
    assert frozen["parameters"] == 18 and frozen["text"].startswith("warning")


def test_a_tied_head_stays_frozen_unless_it_is_asked_for(hf_folder, write_run, tmp_path):
    folder, pool = hf_folder("llama", tie_word_embeddings=True), ranks(2)
    settings = SHORT | {"model": {"init_from": f"hf:{folder}"}}
    for name, tied in (("frozen", False), ("trained", True)):
        ways = {"train": "last_blocks", "num_last_blocks": 1, "train_embeddings": tied}
        assert pool.run(train_here, write_run(name, **settings, fine_tuning=ways), [], 0, "a") == [STEPS, STEPS]
        reader = CheckpointReader(tmp_path / name / f"checkpoints/step-{STEPS:08d}")
        assert ("embed_tokens.weight" in reader.parameters) == tied
        assert ("embed_tokens.weight" in reader.frozen) == (not tied)
        told = events(tmp_path / name, "trained_parameters")[0]
        assert told["trained"] == sum(np.prod(shape) for shape in reader.parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("lora", "mistral"),
        ("decay", "mistral"),
        ("dora", "opt"),
        ("unfreezing", "phi"),
        ("lora", "llama"),
    ],
)
def test_partitions_in_bf16_start_with_the_folders_loss_and_resume(way, kind, hf_folder, write_run, tmp_path):
    """Rotary frequencies are exact although ZeRO-3 builds everything in bf16."""
    folder = hf_folder(kind)
    model = {"init_from": f"hf:{folder}"}
    settings = SHORT | {"deepspeed": "zero3", "model": model, "fine_tuning": WAYS[way], "training.dtype": "bf16"}
    straight = write_run("straight", **settings)
    losses = stop_changes_nothing(straight, write_run("stopped", **settings), 3, STEPS)
    assert losses[0] == pytest.approx(first_loss(folder, straight), rel=1e-3)
    assert losses[-1] < losses[0]
    export_and_load(tmp_path / "straight", tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dora", "unfreezing"])
def test_a_run_that_trains_a_part_goes_on_with_other_ranks_and_another_stage(way, hf_folder, write_run, tmp_path):
    settings = SHORT | {
        "deepspeed": "zero3",
        "model": {"init_from": f"hf:{hf_folder('mistral')}"},
        "fine_tuning": WAYS[way],
    }
    straight, moved = write_run("straight", **settings), write_run("moved", **settings)
    assert ranks(2).run(train_here, straight, [], 0, "a") == [STEPS, STEPS]
    assert "stopped at step 1" in ranks(2).run(train_here, moved, [], 1, "b")[0]
    assert ranks(1).run(train_here, moved, ["deepspeed=zero1"], 0, "c") == [STEPS]
    one, other = (CheckpointReader(tmp_path / name / f"checkpoints/step-{STEPS:08d}") for name in ("straight", "moved"))
    assert one.parameters == other.parameters and one.frozen == other.frozen
    expected = {step: float.fromhex(line[0]) for step, line in metrics(tmp_path / "straight").items()}
    found = {step: float.fromhex(line[0]) for step, line in metrics(tmp_path / "moved").items()}
    assert found == pytest.approx(expected, rel=1e-5)
    for name in one.frozen:
        assert torch.equal(one.tensor(name), other.tensor(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind", "policy"),
    [
        ("lora", "mistral", "full"),
        ("last_blocks", "opt", "selective"),
        pytest.param("lora", "llama", "full", marks=pytest.mark.slow),
        pytest.param("unfreezing", "phi", "full", marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_nothing_where_blocks_are_frozen(way, kind, policy, hf_folder, write_run, tmp_path):
    settings = SHORT | {
        "deepspeed": "zero3",
        "model": {"init_from": f"hf:{hf_folder(kind)}"},
        "fine_tuning": WAYS[way],
        "training.activation_checkpointing": "none",
    }
    kept = write_run("kept", **settings)
    again = write_run("again", **settings | {"training.activation_checkpointing": policy})
    for yaml in (kept, again):
        assert ranks(2).run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]
    assert metrics(tmp_path / "again") == metrics(tmp_path / "kept")
