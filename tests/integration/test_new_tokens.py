"""A tokenizer with tokens added: models of every origin grow by mean rows, as transformers' do, and come out again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from dsgpt.cli.data import data as data_command
from dsgpt.config import load_config
from dsgpt.errors import ConfigError
from dsgpt.tokenizer.tokenizer import Tokenizer
from dsgpt.train.resolve import resolve_run
from tests.hf_models import BLOCKS
from tests.integration.test_fine_tuning import SHORT, export_and_load, first_loss
from tests.integration.test_resume import stop_changes_nothing, train_here
from tests.integration.test_rewind import events
from tests.pool import ranks

STEPS = 3
NEW = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def chats(dataset, tmp_path_factory):
    """Conversations in ChatML, whose tokens the tokenizer lacked."""
    folder = tmp_path_factory.mktemp("chats")
    answers = ["yes", "no, as errors.py says", "the exit code is 65"]
    rows = [{"prompt": f"What of {i}?", "completion": answers[i % 3] + " ." * (i % 7)} for i in range(60)]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "prepare-chat",
        str(folder / "qa.jsonl"),
        "--tokenizer",
        str(dataset.parent / "tokenizer"),
        "--workers",
        "1",
    ]
    words += ["--output", str(folder / "chat"), "--seq-length", "48"]
    for token in NEW:
        words += ["--add-tokens", token]
    ran = CliRunner().invoke(data_command, words, catch_exceptions=False)
    assert ran.exit_code == 0 and "several tokens each" not in ran.stderr
    return folder / "chat"


def grown(folder, output):
    """What transformers makes of the folder's model with two tokens more, whose rows are set to the mean."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model.config.vocab_size
    model.resize_token_embeddings(before + len(NEW), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in layer.parameters():
                parameter[before:] = parameter[:before].mean(0)
    model.save_pretrained(output)
    return output


def settings_of(origin, chats, **fine_tuning):
    settings = {"model": {"init_from": origin}, "data.train": [{"path": str(chats)}], "training.max_steps": STEPS}
    return SHORT | settings | {"training.seq_length": 48, "fine_tuning": fine_tuning}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# Native models: a head of its own, and a tied one. Of transformers: a head with a bias, and a tied one.
@pytest.mark.parametrize(
    "kind, stage",
    [
        ("llama", "zero2"),
        ("phi", "zero3"),
        pytest.param("gpt2", "zero3", marks=pytest.mark.slow),
        pytest.param("opt", "zero2", marks=pytest.mark.slow),
    ],
)
def test_a_hugging_face_model_grows_as_in_transformers_trains_resumes_and_comes_out(
    kind,
    stage,
    hf_folder,
    chats,
    write_run,
    tmp_path,
):
    folder = hf_folder(kind)
    settings = settings_of(f"hf:{folder}", chats) | {"deepspeed": stage}
    straight = write_run("straight", **settings)
    plan = resolve_run(load_config([straight]).config, world_size=2, device="cpu")
    assert (plan.grown_from, plan.model.vocab_size) == (300, 302)
    assert "vocabulary grows from 300 to 302: the data's tokenizer has 2 tokens more" in plan.describe()
    found = stop_changes_nothing(straight, write_run("stopped", **settings), 2, STEPS)
    (event,) = events(tmp_path / "straight", "vocabulary_grown")
    assert (event["before"], event["after"]) == (300, 302) and not events(tmp_path / "straight", "new_tokens_frozen")
    reference = grown(folder, tmp_path / "reference")
    assert found[0] == pytest.approx(first_loss(reference, straight), abs=2e-5)
    _, model = export_and_load(tmp_path / "straight", tmp_path / "export")
    assert model.config.vocab_size == 302 and model.get_output_embeddings().weight.shape[0] == 302
    tokenizer = Tokenizer.load(tmp_path / "export")
    assert [tokenizer.backend.token_to_id(token) for token in NEW] == [300, 301]
    new = model.get_output_embeddings().weight[300:]
    assert not torch.equal(new[0], new[1]), "the new rows were not trained"


def test_a_run_and_its_export_grow_alike(dataset, chats, write_run, tmp_path):
    pool = ranks(2)
    shape = {"dropout": {"embedding": 0.0, "attention": 0.0, "residual": 0.0}}
    shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    first = write_run("first", **{"model": shape, "training.max_steps": 2, "optimizer.warmup_steps": 0})
    assert pool.run(train_here, first, [], 0, "a") == [2, 2]
    export_and_load(tmp_path / "first", tmp_path / "export")
    reference = grown(tmp_path / "export", tmp_path / "reference")
    for name, origin in {"on": f"checkpoint:{tmp_path / 'first'}", "of": f"hf:{tmp_path / 'export'}"}.items():
        yaml = write_run(name, **settings_of(origin, chats))
        assert pool.run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]
        assert losses(tmp_path / name)[0] == pytest.approx(first_loss(reference, yaml), abs=2e-5), name
    assert losses(tmp_path / "on") == losses(tmp_path / "of")
    fork = write_run("fork", **settings_of(f"fork:{tmp_path / 'first'}@2", chats))
    with pytest.raises(ConfigError, match="another tokenizer than fork:"):
        resolve_run(load_config([fork]).config, world_size=2, device="cpu")
    # A run does not grow while it goes on: its optimizer's state has the old shape.
    longer = write_run("first", **{**settings_of("scratch", chats), "model": shape, "training.max_steps": 4})
    assert "holds another run: model.vocab_size differs" in pool.run(train_here, longer, [], 0, "b")[0]


@pytest.mark.parametrize(
    "fine_tuning, frozen",
    [
        ({"train": "last_blocks", "num_last_blocks": 1}, ["embed_tokens.weight"]),
        ({"train": "lora"}, ["embed_tokens.weight", "lm_head.weight"]),
        ({"train": "last_blocks", "num_last_blocks": 1, "train_embeddings": True}, []),
        pytest.param(
            {"train": "last_blocks", "num_last_blocks": 1, "unfreeze_at": {2: "all"}}, [], marks=pytest.mark.slow
        ),
    ],
)
def test_new_rows_that_are_never_trained_are_told(fine_tuning, frozen, hf_folder, chats, write_run, tmp_path):
    yaml = write_run("part", **settings_of(f"hf:{hf_folder('llama')}", chats, **fine_tuning))
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [STEPS, STEPS]
    told = events(tmp_path / "part", "new_tokens_frozen")
    assert [event["parameters"] for event in told] == ([frozen] if frozen else [])
    if frozen:
        assert "train_embeddings=true" in told[0]["text"] and told[0]["text"].startswith("warning")
        _, model = export_and_load(tmp_path / "part", tmp_path / "export")
        new = model.get_input_embeddings().weight[300:]
        assert torch.equal(new[0], new[1])


def test_only_an_extension_grows_a_model_and_never_makes_it_smaller(hf_folder, dataset, chats, write_run, tmp_path):
    def resolved(folder, data=chats):
        yaml = write_run("one", **settings_of(f"hf:{folder}", data))
        return resolve_run(load_config([yaml]).config, world_size=2, device="cpu")

    roomy = resolved(hf_folder("llama", vocab_size=320))
    assert roomy.model.vocab_size == 320 and roomy.grown_from is None
    assert "2 tokens more than the model's ('<|im_start|>', '<|im_end|>'): they take rows" in roomy.describe()
    # The other way round the model has tokens that the data's tokenizer lacks.
    with pytest.raises(ConfigError, match=r"another tokenizer(.|\n)*have other ids or are missing"):
        export = tmp_path / "more"
        shutil.copytree(hf_folder("llama", vocab_size=302), export)
        Tokenizer.load(chats / "tokenizer").save(export)
        resolved(export, dataset)
    # Tokens were added to the folder, and its model was not resized.
    same = tmp_path / "same"
    shutil.copytree(hf_folder("mistral"), same)
    Tokenizer.load(chats / "tokenizer").save(same)
    plan = resolved(same)
    assert (plan.grown_from, plan.model.vocab_size) == (300, 302)
    parameters = 2 * len(NEW) * plan.model.hidden_size
    assert plan.model.num_parameters == resolved(hf_folder("mistral"), dataset).model.num_parameters + parameters
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (same / name).unlink()
    with pytest.raises(ConfigError, match="vocabulary is smaller than the tokenizer's"):
        resolved(same)


def test_more_blocks_than_there_are_are_refused_with_their_number(hf_folder, dataset, write_run):
    settings = settings_of(f"hf:{hf_folder('llama')}", dataset, train="last_blocks", num_last_blocks=BLOCKS + 1)
    settings["fine_tuning"]["unfreeze_at"] = {1: BLOCKS + 2, 2: "all"}
    with pytest.raises(ConfigError) as caught:
        resolve_run(load_config([write_run("one", **settings)]).config, world_size=2, device="cpu")
    assert [problem.seen for problem in caught.value.problems] == [
        f"fine_tuning.unfreeze_at.1={BLOCKS + 2}, the model has {BLOCKS}",
        f"fine_tuning.num_last_blocks={BLOCKS + 1}, the model has {BLOCKS}",
    ]
