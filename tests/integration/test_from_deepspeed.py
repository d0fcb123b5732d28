"""Runs that start from what DeepSpeed or transformers' Trainer saved, against transformers and torch's own AdamW."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.deepspeed_files import find_deepspeed
from dsgpt.checkpoint.deepspeed_state import DeepSpeedState
from dsgpt.config import load_config
from dsgpt.data.mixture import MixtureStream
from dsgpt.errors import CheckpointError, ConfigError
from dsgpt.process import free_port
from dsgpt.train.order import first_segments
from dsgpt.train.resolve import resolve_run
from tests.checkpoint.deepspeed_saves import STEPS, adamw, native_state, save_on_ranks, transformers_model
from tests.checkpoint.test_deepspeed_import import assembled, import_on_ranks
from tests.integration.test_resume import metrics, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks
from tests.test_loss_scale import train_run

LEARNING_RATE = 3e-3


@pytest.fixture(scope="module")
def saved(tmp_path_factory, dataset):
    """A DeepSpeed checkpoint (ZeRO 2, fp32) of a model with the dataset's vocabulary, and its live tensors."""
    folder = tmp_path_factory.mktemp("deepspeed")
    vocabulary = json.loads((dataset / "dataset.json").read_text())["tokenizer"]["vocab_size"]
    live, _ = ranks(2).run(save_on_ranks, str(folder), "llama", 2, "fp32", "", None, "adamw", STEPS, vocabulary)[0]
    return folder, live, vocabulary


def started(write_run, saved, name, steps=3, **settings):
    common = {
        "model": {"init_from": f"deepspeed:{saved[0]}"},
        "training.max_steps": steps,
        "training.dtype": "fp32",
        "data.document_mask": False,
        "optimizer": {"learning_rate": LEARNING_RATE, "warmup_steps": 0, "lr_schedule": "constant"},
        "deepspeed": "zero1",
        "checkpoint.save_interval": 100,
    }
    return write_run(name, **{**common, **settings})


def plain_losses(yaml, live, vocabulary, steps, moments):
    """The same steps by transformers' model and torch's AdamW, its state set from the saved tensors or empty."""
    plan = resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    sources = [source.open(plan.config, plan.model.vocab_size) for source in plan.data.train]
    model = transformers_model("llama", vocabulary)
    optimizer = adamw(model)
    for name, parameter in model.named_parameters():
        weight, average, square = live[name]
        parameter.data.copy_(weight)
        if moments:
            state = {"step": torch.tensor(float(STEPS)), "exp_avg": average.clone(), "exp_avg_sq": square.clone()}
            optimizer.state[parameter] = state
    settings = plan.config.optimizer
    for group in optimizer.param_groups:
        group |= {"lr": LEARNING_RATE, "betas": tuple(settings.betas), "eps": settings.eps}
        group["weight_decay"] = settings.weight_decay if group["weight_decay"] else 0.0
    stream, losses = MixtureStream(sources, first_segments(plan), plan.config.run.seed), []
    for step in range(steps):
        rows = stream.read(np.arange(step * 16, (step + 1) * 16))
        ids, labels = (torch.from_numpy(np.ascontiguousarray(rows[key])).long() for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.config.training.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def losses_of(folder):
    return [float.fromhex(values[0]) for _, values in sorted(metrics(folder).items())]


def test_the_first_loss_is_transformers_and_the_next_are_those_of_a_continued_adamw(write_run, saved, tmp_path):
    folder, live, vocabulary = saved
    yaml = started(write_run, saved, "imported")
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [3, 3]
    ours = losses_of(tmp_path / "imported")
    continued = plain_losses(yaml, live, vocabulary, 3, moments=True)
    anew = plain_losses(yaml, live, vocabulary, 3, moments=False)
    print("dsgpt", ours, "continued", continued, "without moments", anew)
    assert ours == pytest.approx(continued, rel=1e-5)
    assert abs(anew[1] - continued[1]) > 1e-3 * continued[1], "moments change nothing, so nothing was tested"
    told = events(tmp_path / "imported", "imported")[0]
    assert told["moments"] is True and told["optimizer_steps"] == told["global_steps"] == STEPS
    assert "not carried: the position in the data" in told["text"] and str(folder) in told["text"]
    counters = commit.read_manifest(tmp_path / "imported/checkpoints/step-00000003")["counters"]
    assert counters["step"] == 3 and counters["consumed_samples"] == 48 and counters["optimizer_steps"] == STEPS + 3


@pytest.mark.slow
def test_an_imported_run_goes_on_as_if_it_had_not_stopped_also_when_its_source_is_gone(write_run, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "source")
    saved = (tmp_path / "source", *saved[1:])
    straight, stopped = (started(write_run, saved, name, steps=5) for name in ("straight", "stopped"))
    assert ranks(2).run(train_here, straight, [], 0, "a") == [5, 5]
    assert "stopped at step 2" in ranks(2).run(train_here, stopped, [], 2, "a")[0]
    shutil.rmtree(tmp_path / "source")
    assert ranks(2).run(train_here, stopped, [], 0, "b") == [5, 5]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert len(events(tmp_path / "stopped", "imported")) == 1


def test_without_config_json_the_runs_own_model_section_is_the_shape(write_run, saved, tmp_path):
    folder = saved[0]
    tag = tmp_path / "alone" / f"global_step{STEPS}"
    tag.parent.mkdir()
    os.symlink(folder / f"global_step{STEPS}", tag)
    (tag.parent / "latest").write_text(tag.name)
    model = {"init_from": f"deepspeed:{tag.parent}"}
    with pytest.raises(ConfigError, match="whose folder has no config"):
        load_config([started(write_run, saved, "refused", model=model)])
    model |= {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 44,
              "tie_word_embeddings": False, "norm_eps": 1e-6}  # fmt: skip
    described = started(write_run, saved, "described")
    written = started(write_run, saved, "written", model=model)
    assert load_config([written]).warnings == []
    assert any(
        "num_attention_heads has no effect" in one
        for one in load_config([described], ["model.num_attention_heads=6"]).warnings
    )
    for yaml in (described, written):
        assert ranks(2).run(train_here, yaml, [], 0, "a") == [3, 3]
    assert metrics(tmp_path / "written") == metrics(tmp_path / "described")


def test_a_folder_that_is_not_read_is_refused_before_ranks_are_started(write_run, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    yaml = started(write_run, saved, "run", model={
        "init_from": f"deepspeed:{tmp_path / 'empty'}", "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5,
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="no DeepSpeed checkpoint here"):
        resolve_run(load_config([yaml]).config, world_size=2, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("stage, there", [(2, 3), (3, 1)])
def test_what_a_real_trainer_saved_is_read_bit_for_bit(tmp_path, stage, there):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "tests.integration.trainer_job", str(stage), str(tmp_path)]
    port, root = str(free_port()), str(Path(__file__).parents[2])
    common = {**os.environ, "PYTHONPATH": root, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [(tmp_path / f"log{rank}").open("w") for rank in range(2)]
    jobs = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    assert [job.wait(timeout=170) for job in jobs] == [0, 0], (tmp_path / "log0").read_text()[-2000:]
    live = torch.load(tmp_path / "live.pt", weights_only=True)
    results = ranks(3).run(import_on_ranks, str(tmp_path / f"checkpoint-{STEPS}"), there)
    found = assembled(results)
    for name, values in native_state("llama", live).items():
        for kind, value in zip(("master", "exp_avg", "exp_avg_sq"), values, strict=True):
            assert torch.equal(found[(name, kind)], value), (name, kind)
    assert results[0][4] == {STEPS} and len(found) == 3 * len(live)


@pytest.mark.slow
def test_a_run_in_fp16_begins_with_the_imported_loss_scale_and_tells_it(write_run, dataset, tmp_path):
    vocabulary = json.loads((dataset / "dataset.json").read_text())["tokenizer"]["vocab_size"]
    (tmp_path / "saved").mkdir()
    arguments = (str(tmp_path / "saved"), "llama", 2, "fp16", "", None, "adamw", STEPS, vocabulary)
    ranks(2).run(save_on_ranks, *arguments)
    yaml = started(write_run, (tmp_path / "saved",), "fp16", steps=2)
    ranks(2).run(train_run, yaml, {"initial_scale_power": 12}, 0, "a")
    assert "loss scale 128" in events(tmp_path / "fp16", "imported")[0]["text"], "64 in the file's config, doubled once"
    lines = [json.loads(line) for line in (tmp_path / "fp16/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss_scale"] == 128.0, "this run's own initial scale is 4096"


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_range_opens_only_the_file_that_holds_it(tmp_path, stage):
    live, _ = ranks(2).run(save_on_ranks, str(tmp_path), "llama", stage, "fp32")[0]
    name = "model.layers.0.mlp.up_proj.weight" if stage == 3 else "model.embed_tokens.weight"
    state = DeepSpeedState(find_deepspeed(tmp_path), trust=False)
    first = state.read(name, "exp_avg", 5, 20)
    assert torch.equal(first, live[name][1].flatten()[5:25]) and len(state._files) == 2, "the model's and rank 0's"
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in state._files), "mapped, not read as a whole"
    last = "lm_head.weight"
    assert torch.equal(state.read(last, "exp_avg", 3000, 30), live[last][1].flatten()[3000:]) and len(state._files) == 3
