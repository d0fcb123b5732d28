"""What training a part leads to, against plain PyTorch in one process: AdamW, and transformers' model with peft's adapters.

The rules of what is trained, from when on and how fast are written here a second time, by name and by hand.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsgpt.checkpoint.reader import CheckpointReader
from dsgpt.config import load_config, parse_model
from dsgpt.data.mixture import MixtureStream
from dsgpt.model.gpt import GPT
from dsgpt.model.lora import initial_adapter
from dsgpt.train.order import first_segments
from dsgpt.train.resolve import resolve_run
from tests.integration.test_fine_tuning import SHORT
from tests.integration.test_resume import train_here
from tests.pool import ranks

EPS = 1e-5  # of Adam: with less, gradients of almost zero would be divided by their own rounding
STEPS, BLOCKS, RATE, DECAY, CLIP, TOLERANCE = 5, 3, 2e-3, 0.1, 1.0, 1e-5
SETTINGS = SHORT | {"training.max_steps": STEPS, "training.max_grad_norm": CLIP}
SETTINGS["optimizer"] = {"learning_rate": RATE, "lr_schedule": "constant", "warmup_steps": 0, "eps": EPS}
SETTINGS["optimizer"]["weight_decay"] = DECAY


def block(name):
    found = re.search(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def from_the_output(name):
    """Blocks between a parameter and the output; the embeddings are behind all of them."""
    if name.startswith("embed"):
        return BLOCKS
    return 0 if block(name) is None else BLOCKS - 1 - block(name)


def gradually(name):
    """The last block from the start, the second from step 2 on, everything from step 3 on."""
    return {None: 0, 2: 0, 1: 2, 0: 3}[block(name)] if not name.startswith("embed") else 3


# settings, the step from which a parameter is trained (None: never), its learning rate
WAYS = {
    "decay": (
        {"learning_rate_decay_per_block": 0.5, "learning_rate_scales": {"*mlp*": 3.0}},
        lambda name: 0,
        lambda name: RATE * 0.5 ** from_the_output(name) * (3 if "mlp" in name else 1),
    ),
    "last_blocks": (
        {"train": "last_blocks", "num_last_blocks": 2},
        lambda name: 0 if from_the_output(name) < 2 else None,
        lambda name: RATE,
    ),
    "unfreezing": (
        {
            "train": "last_blocks",
            "num_last_blocks": 1,
            "unfreeze_at": {2: 2, 3: "all"},
            "learning_rate_decay_per_block": 0.5,
        },
        gradually,
        lambda name: RATE * 0.5 ** from_the_output(name),
    ),
}


def steps_of(yaml):
    """The samples of each step."""
    plan = resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    sources = [one.open(plan.config, plan.model.vocab_size) for one in plan.data.train]
    stream = MixtureStream(sources, first_segments(plan), plan.config.run.seed)
    size = plan.config.training.global_batch_size
    for step in range(STEPS):
        batch = stream.read(np.arange(step * size, (step + 1) * size))
        yield {key: torch.from_numpy(value.astype(np.int64)) for key, value in batch.items()}


def train_plainly(model, yaml, starts, rate, logits_of):
    """AdamW over all that is trained; what is trained later is added to it when its time comes."""
    optimizer, trained = None, []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for step, batch in enumerate(steps_of(yaml)):
        groups = [
            {"params": [parameter], "lr": rate(name), "weight_decay": DECAY if parameter.dim() > 1 else 0.0}
            for name, parameter in model.named_parameters()
            if starts(name) == step
        ]
        trained += [group["params"][0].requires_grad_(True) for group in groups]
        if optimizer is None:
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
        else:
            for group in groups:
                optimizer.add_param_group(group)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_of(batch).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        (loss / (batch["labels"] != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()


def differences(run, expected, before):
    """Relative difference of each trained parameter; what is frozen must have kept its bits."""
    reader = CheckpointReader(run / f"checkpoints/step-{STEPS:08d}")
    found, differing = reader.weights(), {}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name in reader.frozen:
            assert torch.equal(value, before[name]), name
        else:
            assert not torch.equal(value, before[name]), f"{name} was not trained"
            differing[name] = float((value - expected[name].detach()).norm() / expected[name].detach().norm())
    return differing


@pytest.fixture()
def pretrained(write_run, tmp_path):
    """A run of two steps from scratch; its head has a matrix of its own."""
    shape = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "tie_word_embeddings": False}
    yaml = write_run("base", **SHORT | {"model": shape, "training.max_steps": 2})
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [2, 2]
    return tmp_path / "base"


@pytest.mark.parametrize(
    "way, stage",
    [
        ("decay", "zero2"),
        pytest.param("decay", "zero3", marks=pytest.mark.slow),
        pytest.param("last_blocks", "zero2", marks=pytest.mark.slow),
        ("last_blocks", "zero3"),
        ("unfreezing", "zero2"),
        pytest.param("unfreezing", "zero3", marks=pytest.mark.slow),
    ],
)
def test_each_parameter_is_trained_from_its_step_on_at_its_rate(way, stage, pretrained, write_run, tmp_path):
    settings, starts, rate = WAYS[way]
    model = {"init_from": f"checkpoint:{pretrained}"}
    yaml = write_run("run", **SETTINGS | {"deepspeed": stage, "model": model, "fine_tuning": settings})
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]
    reader = CheckpointReader(pretrained / "checkpoints/step-00000002")
    before, plain = reader.weights(), GPT(parse_model(reader.manifest["model"]))
    plain.load_state_dict(before)

    def logits_of(batch):
        return plain(batch["input_ids"], position_ids=batch["position_ids"], document_ids=batch["document_ids"])

    train_plainly(plain, yaml, starts, rate, logits_of)
    found = differences(tmp_path / "run", dict(plain.named_parameters()), before)
    assert found.keys() == {name for name in before if starts(name) is not None}
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize(
    "use_dora, stage",
    [
        pytest.param(False, "zero2", id="lora-zero2", marks=pytest.mark.slow),
        pytest.param(False, "zero3", id="lora-zero3"),
        pytest.param(True, "zero2", id="dora-zero2"),
        pytest.param(True, "zero3", id="dora-zero3", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_trained_as_by_peft_in_transformers(use_dora, stage, hf_folder, write_run, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = hf_folder("mistral")
    tuning = {"train": "lora", "lora": {"rank": 4, "alpha": 8.0, "use_dora": use_dora}}
    model = {"init_from": f"hf:{folder}"}
    yaml = write_run("run", **SETTINGS | {"deepspeed": stage, "model": model, "fine_tuning": tuning})
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", use_dora=use_dora)
    plain = get_peft_model(theirs, lora).get_base_model()
    for name, parameter in plain.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(
                initial_adapter(name, parameter.shape, load_config([yaml]).config.run.seed, lambda: None)
            )
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}

    def logits_of(batch):
        """Each document alone."""
        rows = []
        for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
            cuts = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
            rows.append(torch.cat([plain(input_ids=piece[None]).logits[0] for piece in ids.split(cuts)]))
        return torch.stack(rows)

    train_plainly(plain, yaml, lambda name: 0 if "lora_" in name else None, lambda name: RATE, logits_of)
    found = differences(tmp_path / "run", dict(plain.named_parameters()), before)
    assert len(found) == BLOCKS * 7 * (3 if use_dora else 2)
    # B begins at zero: its norm is that of the updates alone.
    assert {name: one for name, one in found.items() if one > TOLERANCE * (5 if "lora_B" in name else 1)} == {}
