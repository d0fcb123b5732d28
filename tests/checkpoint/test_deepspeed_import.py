"""What DeepSpeed saved is read bit for bit, at any stage and world size, and what cannot be read is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsgpt.checkpoint.deepspeed_files import find_deepspeed
from dsgpt.checkpoint.deepspeed_import import deepspeed_weights
from dsgpt.config import load_config
from dsgpt.config.deepspeed import fill_deepspeed
from dsgpt.config.schema import OptimizerSection
from dsgpt.engine import Engine, construct
from dsgpt.errors import CheckpointError, DsgptError
from dsgpt.model.gpt import GPT
from dsgpt.model.hf_import import read_hf_config
from dsgpt.optimizer import build_optimizer
from dsgpt.train.step import largest_micro_batch
from tests.checkpoint.deepspeed_saves import STEPS, WORLD, native_state, save_on_ranks
from tests.pool import ranks

IN_DEFAULT_TIER = [("llama", 1, "fp32"), ("llama", 3, "fp32"), ("gpt2", 0, "bf16"), ("llama", 2, "bf16")]
IN_SLOW_TIER = [("llama", 0, "fp32"), ("gpt2", 2, "fp32"), ("gpt2", 1, "bf16_sums"), ("gpt2", 3, "bf16")]
SAVES = [*IN_DEFAULT_TIER, *(pytest.param(*one, marks=pytest.mark.slow) for one in IN_SLOW_TIER)]
ALL = list(itertools.product(("llama", "gpt2"), range(4), ("fp32", "bf16")))


def import_on_ranks(world, folder, stage, dtype="fp32", optimizer="adamw", trust=False):
    """Import into an engine of this stage; all fragments of this rank, what is told, and the optimizer's step."""
    config = read_hf_config(folder)
    overrides = [f"training.dtype={dtype}", "training.micro_batch_size_per_gpu=2", f"deepspeed=zero{stage}"]
    overrides += [f"training.global_batch_size={2 * world.size}"]
    filled = fill_deepspeed(load_config(["quickstart"], overrides).config, world.size)
    model = construct(lambda: GPT(config), filled)
    engine = Engine(model, build_optimizer(model, OptimizerSection(name=optimizer, learning_rate=1e-2)), filled, world)
    engine.rehearse(largest_micro_batch(config.vocab_size, 16, 2, world.device))
    weights = deepspeed_weights(Path(folder), config, engine.parameter_shapes(), engine.state_kinds, world, trust)
    engine.load(weights.read, weights.kinds, weights.optimizer_steps)
    kinds = engine.state_kinds
    read = {(f, kind): engine.read(f, kind).clone() for f in engine.fragments() for kind in kinds}
    steps = {int(s["step"]) for s in engine._torch_optimizer.state.values() if "step" in s}
    return read, engine.parameter_shapes(), weights.told, weights.text, steps, weights.loss_scale, weights.buffers


def assembled(results):
    """(parameter, kind) -> whole tensor from all ranks' fragments; every element must come exactly once."""
    shapes, whole = results[0][1], {}
    for read, *_ in results:
        for (fragment, kind), values in read.items():
            into = whole.setdefault((fragment.name, kind), torch.full(shapes[fragment.name], torch.nan).flatten())
            assert into[fragment.start :][: fragment.numel].isnan().all()
            into[fragment.start :][: fragment.numel] = values
    return {key: values.view(shapes[key[0]]) for key, values in whole.items()}


def assert_imported(results, kind, live, moments=True):
    saved, adam_steps = live
    expected = native_state(kind, saved)
    found = assembled(results)
    kinds = ("master", "exp_avg", "exp_avg_sq") if moments else ("master",)
    assert {name for name, _ in found} == set(expected)
    for name, values in expected.items():
        for one, value in zip(kinds, values, strict=False):
            assert torch.equal(found[(name, one)], value), (name, one)
            assert value.abs().max() > 0, "nothing was saved, so nothing was tested"
    if not moments:
        assert all(not values.any() for (_, one), values in found.items() if one != "master")
    assert results[0][2]["moments"] is moments
    assert all(one[4] == (adam_steps if moments else {0}) for one in results)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """save(kind, stage, dtype, …) -> (folder, live tensors), each made once."""
    made = {}

    def save(kind, stage, dtype, **options):
        key = (kind, stage, dtype, *sorted(options.items(), key=str))
        if str(key) not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[str(key)] = (
                folder,
                ranks(WORLD).run(save_on_ranks, str(folder), kind, stage, dtype, *_positional(options))[0],
            )
        return made[str(key)]

    return save


def _positional(options):
    names = {"freeze": "", "zero": None, "optimizer": "adamw", "steps": STEPS}
    return [options.get(name, default) for name, default in names.items()]


@pytest.mark.parametrize("kind, stage, dtype", SAVES, ids=str)
def test_weights_and_moments_are_read_bit_for_bit_at_another_stage(saves, kind, stage, dtype):
    folder, saved = saves(kind, stage, dtype)
    there = {0: 3, 1: 2, 2: 0, 3: 1}[stage]
    assert_imported(ranks(2).run(import_on_ranks, str(folder), there), kind, saved)


@pytest.mark.slow
@pytest.mark.parametrize("there, dtype", [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
@pytest.mark.parametrize("kind, stage, saved_dtype", ALL, ids=str)
def test_every_stage_is_read_into_every_stage_at_another_world_size(saves, kind, stage, saved_dtype, there, dtype):
    folder, live = saves(kind, stage, saved_dtype)
    assert_imported(ranks(3).run(import_on_ranks, str(folder), there, dtype), kind, live)


def test_another_world_size_reads_the_same(saves):
    for kind, stage, there in (("gpt2", 2, 3), ("llama", 3, 1)):
        folder, live = saves(kind, stage, "fp32")
        assert_imported(ranks(1).run(import_on_ranks, str(folder), there), kind, live)


FROZEN = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}


@pytest.mark.parametrize("kind, stage, dtype", [("llama", 1, "fp32"), ("gpt2", 2, "bf16"), ("llama", 3, "bf16")])
def test_of_a_model_with_frozen_parameters_the_weights_are_read_and_the_reason_is_told(saves, kind, stage, dtype):
    folder, live = saves(kind, stage, dtype, freeze=FROZEN[kind])
    results = ranks(2).run(import_on_ranks, str(folder), 1)
    assert_imported(results, kind, live, moments=False)
    assert "that are trained here" in results[0][2]["why"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, zero",
    [(3, {"sub_group_size": 3000}), (2, {"elastic_checkpoint": True})],
    ids=["small sub-groups", "elastic"],
)
def test_other_layouts_of_the_same_stage_are_read_too(saves, stage, zero):
    folder, live = saves("llama", stage, "bf16" if stage == 3 else "fp32", zero=zero)
    assert_imported(ranks(2).run(import_on_ranks, str(folder), 3), "llama", live)


@pytest.mark.slow
def test_partitions_in_round_robin_order_are_those_of_the_same_run_in_plain_order(saves):
    """DeepSpeed's own gathering functions return other elements with this setting, so the other run is the oracle."""
    folder, _ = saves("llama", 1, "fp32", zero={"round_robin_gradients": True})
    assert_imported(ranks(2).run(import_on_ranks, str(folder), 3), "llama", saves("llama", 1, "fp32")[1])


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_parameters_under_dsgpts_own_names_are_read_with_their_running_statistics(saves, stage):
    folder, live = saves("dsgpt", stage, "fp32")
    results = ranks(2).run(import_on_ranks, str(folder), 4 - stage)
    assert_imported(results, "dsgpt", live)
    buffers = torch.load(folder / "buffers", weights_only=True)
    assert buffers and results[0][6].keys() == buffers.keys()
    assert all(torch.equal(results[0][6][name], value) for name, value in buffers.items())


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_loss_scale_of_fp16_comes_with_the_moments(saves, stage):
    folder, live = saves("llama", stage, "fp16")
    results = ranks(2).run(import_on_ranks, str(folder), 2)
    assert_imported(results, "llama", live)
    scale = dict(results[0][5])
    assert scale["cur_scale"] == 2.0**7 and scale["cur_iter"] == STEPS, "64, doubled once within three steps"


def test_before_the_first_step_there_are_weights_only(saves):
    folder, _ = saves("llama", 2, "fp32", steps=0)
    told, steps = (ranks(2).run(import_on_ranks, str(folder), 2)[0][i] for i in (2, 4))
    assert told["moments"] is False and steps == {0}


def permute(head):
    """The optimizer's groups in an order that nothing recorded."""
    state = head["optimizer"]["optimizer_state_dict"]["state"]
    masters = head["optimizer"]["fp32_groups"]
    masters[0][1], masters[0][2] = masters[0][2], masters[0][1]
    state[1], state[2] = state[2], state[1]


def test_an_order_of_stage_0_that_does_not_fit_the_weights_leaves_the_moments_out(copied):
    """q_proj and k_proj have one shape here: only the masters tell that the optimizer had them the other way round."""
    folder, tag, (saved, _) = copied(stage=0, dtype="bf16")
    change(head_of(tag), permute)
    results = ranks(2).run(import_on_ranks, str(folder), 1)
    found = assembled(results)
    for name, values in native_state("llama", saved).items():
        assert torch.equal(found[(name, "master")], values[0].bfloat16().float()), name
    assert results[0][2]["moments"] is False and "order of parameters cannot be told" in results[0][2]["why"]


def test_a_trainers_safetensors_are_read_where_stage_3_lost_its_optimizer_files(copied):
    folder, tag, (saved, _) = copied("llama", 3, "fp32")
    for file in tag.glob("*_optim_states.pt"):
        file.unlink()
    assert "at stage 3 only they hold the weights" in refusal(folder)
    save_file({name: values[0] for name, values in saved.items()}, folder / "model.safetensors")
    results = ranks(2).run(import_on_ranks, str(folder), 3)
    found = assembled(results)
    for name, values in native_state("llama", saved).items():
        assert torch.equal(found[(name, "master")], values[0]), name
    assert "weights from its safetensors; no moments" in results[0][3]


def test_moments_that_are_not_adams_or_not_there_are_left_out_with_a_reason(saves):
    folder, _ = saves("llama", 1, "fp32", optimizer="sgd")
    told = ranks(2).run(import_on_ranks, str(folder), 1)[0][2]
    assert told["moments"] is False and "momentum_buffer" in told["why"]
    folder, _ = saves("llama", 1, "fp32")
    results = ranks(2).run(import_on_ranks, str(folder), 1, "fp32", "sgd")
    assert results[0][2]["moments"] is False and "this run's optimizer has other state" in results[0][3]


@pytest.fixture()
def copied(saves, tmp_path):
    """copied(stage) -> (a copy of a small save to be damaged, its tag folder, its live tensors)."""

    def copy(kind="llama", stage=2, dtype="bf16"):
        folder, live = saves(kind, stage, dtype)
        shutil.copytree(folder, tmp_path / "copy")
        return tmp_path / "copy", tmp_path / "copy" / f"global_step{STEPS}", live

    return copy


def test_without_any_optimizer_file_the_modules_weights_are_read_and_that_is_told(copied):
    folder, tag, (saved, _) = copied()
    for file in tag.glob("*_optim_states.pt"):
        file.unlink()
    results = ranks(2).run(import_on_ranks, str(folder), 1)
    found = assembled(results)
    for name, values in native_state("llama", saved).items():
        assert torch.equal(found[(name, "master")], values[0].bfloat16().float()), name
    assert "the module (bfloat16)" in results[0][3] and "the optimizer's files are missing" in results[0][3]


def test_a_tag_folder_can_be_named_itself_and_parameters_may_be_wrapped(copied):
    folder, tag, live = copied(stage=1, dtype="fp32")
    head = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    head["module"] = OrderedDict((f"module.{name}", value) for name, value in head["module"].items())
    head["param_shapes"] = [OrderedDict((f"module.{n}", s) for n, s in group.items()) for group in head["param_shapes"]]
    torch.save(head, tag / "mp_rank_00_model_states.pt")
    shutil.copy(folder / "config.json", tag)
    assert_imported(ranks(2).run(import_on_ranks, str(tag), 2), "llama", live)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def refuse_on_ranks(world, folder):
    config = read_hf_config(folder)
    shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    try:
        return deepspeed_weights(Path(folder), config, shapes, ("master", "exp_avg", "exp_avg_sq"), world)
    except DsgptError as error:
        return f"{type(error).__name__}: {error}"


def refusal(folder):
    results = ranks(2).run(refuse_on_ranks, str(folder))
    assert all(isinstance(one, str) for one in results), "not every rank refused"
    return " ".join(results)


def change(path, edit):
    """Rewrite one of DeepSpeed's files with something changed in it."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def second(tag):
    return next(tag.glob("*zero_pp_rank_1_*optim_states.pt"))


def first(tag):
    return next(tag.glob("*zero_pp_rank_0_*optim_states.pt"))


def head_of(tag):
    return next(path for path in sorted(tag.glob("*model_states.pt")))


def leave_out(head):
    head["module"].pop("model.norm.weight")
    head["param_shapes"][1].pop("model.norm.weight")


def other_name(head):
    shapes = head["param_shapes"][1]
    head["param_shapes"][1] = OrderedDict((name.replace("model.norm", "model.nose"), shapes[name]) for name in shapes)


def other_address(saved):
    vars(saved["optimizer_state_dict"]["param_slice_mappings"][0]["lm_head.weight"]).update(start=7)


def adam(saved):
    return saved["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def copy_as(path, before, after):
    shutil.copy(path, path.with_name(path.name.replace(before, after)))


DAMAGE = {
    "a rank's file is missing": (lambda tag: second(tag).unlink(), ["files of 1 of 2 ranks are missing", "rank 1"]),
    "rank 0's file is missing": (lambda tag: first(tag).unlink(), ["rank 0's file is missing"]),
    "a rank's file is cut off": (lambda tag: cut(second(tag)), ["cut off", "zero_pp_rank_1"]),
    "the model's file is cut off": (lambda tag: cut(head_of(tag)), ["cut off", "mp_rank_00"]),
    "a file of an earlier save": (lambda tag: change(second(tag), lambda s: adam(s).update(step=1)), ["of other steps"]),
    "a file of a larger save": (lambda tag: copy_as(second(tag), "rank_1_", "rank_2_"), ["not of one group", "3 files"]),
    "two files of a rank": (lambda tag: copy_as(second(tag), "bf16_", "fp16_"), ["two files are of rank 1"]),
    "tensor parallel": (lambda tag: copy_as(head_of(tag), "mp_rank_00", "mp_rank_01"), ["tensor parallelism", "mp_rank_01"]),
    "tensor parallel by its word": (
        lambda tag: change(head_of(tag), lambda head: head.update(mp_world_size=2)),
        ["tensor or pipeline parallelism", "'mp_world_size': 2"],
    ),
    "pipeline layers": (lambda tag: (tag / "layer_00-model_00-model_states.pt").touch(), ["pipeline", "layer_00"]),
    "experts": (lambda tag: (tag / "expert_0_mp_rank_00_model_states.pt").touch(), ["mixture-of-experts", "expert_0"]),
    "universal": (lambda tag: (tag / "zero").mkdir(), ["universal checkpoint"]),
    "NVMe": (lambda tag: (tag / "offloaded_tensors").mkdir(), ["NVMe"]),
    "a parameter is left out": (lambda tag: change(head_of(tag), leave_out), ["do not fit together"]),
    "a name of another model": (lambda tag: change(head_of(tag), other_name), ["no place for", "model.nose.weight"]),
    "another address": (lambda tag: change(second(tag), other_address), ["elsewhere than computed"]),
    "cut moments": (lambda tag: change(second(tag), lambda s: adam(s).update(exp_avg=torch.ones(9))), ["fewer elements"]),
    "not a model's file": (lambda tag: change(head_of(tag), lambda head: head.pop("module")), ["not a file of DeepSpeed's"]),
    "no shapes": (lambda tag: change(head_of(tag), lambda head: head.pop("param_shapes")), ["not laid out", "param_shapes"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_refused_on_all_ranks_and_says_what_was_seen(copied, name):
    folder, tag, _ = copied()
    damage, words = DAMAGE[name]
    damage(tag)
    told = refusal(folder)
    assert all(word in told for word in words), told


def test_another_shape_is_refused_with_the_parameters_names(copied):
    folder, _, _ = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    told = refusal(folder)
    assert "blocks.1.mlp.up_proj.weight" in told and "(44, 30), expected (40, 30)" in told


def test_a_head_of_its_own_is_refused_where_the_model_ties_it(copied):
    folder, _, _ = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "matrix of its own" in refusal(folder)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model_states", "optim_states"])
def test_a_hostile_pickle_is_refused_by_name_and_nothing_in_it_runs(copied, tmp_path, where):
    folder, tag, _ = copied()
    canary = tmp_path / "canary"
    change(sorted(tag.glob(f"*{where}.pt"))[-1], lambda content: content.update(client=Payload(canary)))
    told = refusal(folder)
    assert "mkdir" in told and "could execute code" in told and "trust_checkpoint" in told
    assert not canary.exists()
    ranks(1).run(import_on_ranks, str(folder), 1, "fp32", "adamw", True)
    assert canary.exists(), "the payload is not live, so nothing was tested"


def test_several_checkpoints_are_listed_and_none_is_chosen(copied, tmp_path):
    folder, _, _ = copied()
    for step in (9, 10):
        shutil.copytree(folder, tmp_path / "out" / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"checkpoint-9, deepspeed:.*checkpoint-10"):
        find_deepspeed(tmp_path / "out")
    (folder / "latest").write_text("global_step99")
    with pytest.raises(CheckpointError, match="global_step99"):
        find_deepspeed(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_deepspeed(tmp_path / "nowhere")
