"""Chats and plain text in one run of a pretrained model: what is learned from is what transformers says; and NEFTune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsgpt.config import load_config
from dsgpt.data.dataset import IGNORED
from dsgpt.data.mixture import MixtureStream
from dsgpt.train.order import first_segments
from dsgpt.train.resolve import resolve_run
from tests.integration.test_fine_tuning import SHORT
from tests.integration.test_resume import metrics, stop_changes_nothing, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks

STEPS, LENGTH, BATCH = 3, 96, 16
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)


def conversations() -> list[list[dict[str, str]]]:
    answers = ["yes", "no, as errors.py says", "the exit code is 65"]
    return [
        [
            {"role": "user", "content": f"Why {i}?"},
            {"role": "assistant", "content": answers[i % 3] + " ." * (i % 7)},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": answers[(i + 1) % 3]},
        ][: 2 + 2 * (i % 2)]
        for i in range(80)
    ]


@pytest.fixture(scope="module")
def chats(dataset, tmp_path_factory) -> Path:
    from dsgpt.data.chat import ChatChoices, prepare_chat

    folder = tmp_path_factory.mktemp("chats")
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in conversations()))
    choices = ChatChoices(seq_length=LENGTH, chat_template=TEMPLATE, validation=0.2)
    prepare_chat([folder / "chats.jsonl"], dataset / "tokenizer", folder / "chat", choices)
    return folder / "chat"


@pytest.fixture(scope="module")
def encoded(dataset, tmp_path_factory) -> list[tuple[list[int], list[int]]]:
    """(ids, mask of what assistants say) of each conversation, by transformers alone."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("theirs") / "tokenizer"
    shutil.copytree(dataset / "tokenizer", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for one in conversations():
        asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        told = tokenizer.apply_chat_template(one, chat_template=TEMPLATE, **asked)
        found.append((list(told["input_ids"]), list(told["assistant_masks"])))
    return found


def settings_of(folder, chats, dataset, **fine_tuning):
    mixed = [{"path": str(chats), "weight": 0.5}, {"path": str(dataset), "weight": 0.5}]
    settings = {"model": {"init_from": f"hf:{folder}"}, "data.train": mixed, "training.max_steps": STEPS}
    return SHORT | settings | {"training.seq_length": LENGTH, "fine_tuning": fine_tuning}


def documents(yaml):
    """(ids, labels) of each document in the rows of the first step."""
    plan = resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    sources = [one.open(plan.config, plan.model.vocab_size) for one in plan.data.train]
    arrays = MixtureStream(sources, first_segments(plan), plan.config.run.seed).read(np.arange(BATCH))
    for ids, labels, numbers in zip(arrays["input_ids"], arrays["labels"], arrays["document_ids"], strict=True):
        for number in np.unique(numbers[numbers >= 0]):
            yield ids[numbers == number].tolist(), labels[numbers == number].tolist(), numbers[-1] == number


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_first_loss_is_transformers_over_what_assistants_say_and_all_of_the_text(
    kind, hf_folder, chats, dataset, encoded, write_run, tmp_path
):
    from transformers import AutoModelForCausalLM

    yaml = write_run("mixed", **settings_of(hf_folder(kind), chats, dataset))
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]
    model = AutoModelForCausalLM.from_pretrained(hf_folder(kind), attn_implementation="eager", dtype=torch.float32)
    total, count, kinds = 0.0, 0, {"chat": 0, "text": 0}
    for ids, labels, is_last in documents(yaml):
        said = next((one for one in encoded if one[0][: len(ids)] == ids and len(one[0]) - len(ids) < 2), None)
        kinds["chat" if said else "text"] += 1
        if said:
            wanted = [said[0][i] if said[1][i] else IGNORED for i in range(1, len(said[0]))] + [IGNORED]
            wanted = wanted[: len(ids)]
        else:  # the token that follows; after the row's last position it is not in the row
            wanted = [*ids[1:], labels[-1] if is_last else IGNORED]
        assert labels == wanted
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        total += float(F.cross_entropy(logits, torch.tensor(wanted), reduction="sum"))
        count += sum(label != IGNORED for label in wanted)
    assert min(kinds.values()) > 5
    lines = [json.loads(line) for line in (tmp_path / "mixed/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(total / count, abs=2e-5)


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_noise_on_the_embeddings_changes_training_alone_and_resumes_bit_for_bit(
    stage, hf_folder, chats, dataset, write_run, tmp_path
):
    pool = ranks(2)
    noisy = settings_of(hf_folder("mistral"), chats, dataset, neftune_alpha=5.0) | {"deepspeed": stage}
    stop_changes_nothing(write_run("straight", **noisy), write_run("stopped", **noisy), 2, STEPS)
    # Where a step changes nothing, evaluations are those of a run without noise, bit for bit; losses of steps are not.
    still = ["optimizer.learning_rate=1e-30", "optimizer.min_learning_rate=0", "optimizer.weight_decay=0"]
    for name, alpha in (("with", 5.0), ("without", 0.0)):
        yaml = write_run(name, **{**noisy, "fine_tuning": {"neftune_alpha": alpha}})
        assert pool.run(train_here, yaml, still, 0, "a") == [STEPS, STEPS]
    (one,), (other,) = (events(tmp_path / name, "evaluation") for name in ("with", "without"))
    assert one["loss"] == other["loss"]
    steps = [metrics(tmp_path / name) for name in ("with", "without")]
    assert all(steps[0][step][0] != steps[1][step][0] for step in range(1, STEPS + 1))
