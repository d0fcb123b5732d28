"""What a run keeps of the model it started from, and the model card made of it, as the hub's own library reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dsgpt.checkpoint.base_model import keep_base, read_base
from dsgpt.checkpoint.model_card import Facts, model_card
from dsgpt.errors import CheckpointError

CLONE = Path(__file__).parents[2]
MANIFEST = {
    "step": 1200,
    "counters": {"consumed_tokens": 9_830_400},
    "parameters": {"w": {"shape": [10, 20]}},
    "frozen": {"e": {"shape": [100]}},
    "data": {"seq_length": 1024, "sources": [{"fingerprint": "f00d", "num_samples": 77}]},
    "dtype": "bf16",
    "versions": {"dsgpt": "0.1"},
}


def kept(folder: Path, files: dict[str, str], init_from: str = "") -> Path:
    """A run folder that started from a model with these files beside its weights."""
    model, run = folder / "model", folder / "run"
    for path in (model, run):
        path.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    keep_base(init_from or f"hf:{model}", run)
    return run


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: mit\n---\nAs it is.", "LICENSE": "other words"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        (
            {"README.md": "---\nlicense: [\n---\n", "config.json": '{"license": "bsd-3-clause"}'},
            {"license": "bsd-3-clause"},
        ),
        ({"README.md": "# No front matter", "LICENSE": (CLONE / "LICENSE").read_text()}, {"license": "apache-2.0"}),
        (
            {"LICENSE.txt": "Do as you like."},
            {"license": "other", "license_name": "of-the-base-model", "license_link": "LICENSE.txt"},
        ),
        ({"config.json": "{"}, {}),
    ],
)
def test_the_licence_is_what_the_base_model_says(tmp_path, files, licence):
    base = read_base(kept(tmp_path, files))
    assert base.licence() == licence
    facts = Facts(tmp_path, MANIFEST, {}, base)
    head = ModelCard(model_card(facts, "transformers", facts.licence(None), "fp32")).data
    assert head.license == licence.get("license", "unknown") and head.license_name == licence.get("license_name")


def test_a_person_s_licence_goes_first_and_the_base_model_s_is_told(tmp_path):
    run = kept(tmp_path, {"README.md": "---\nlicense: gemma\n---\n"})
    facts = Facts(tmp_path, MANIFEST, {}, read_base(run))
    card = model_card(facts, "transformers", facts.licence("apache-2.0"), "bf16")
    assert ModelCard(card).data.license == "apache-2.0" and "the base model's is gemma" in card


def test_a_run_of_a_run_knows_both_and_a_run_from_scratch_none(tmp_path):
    first = kept(tmp_path, {"generation_config.json": '{"top_k": 7}', "fetched.json": '{"source": "hf:toy/one"}'})
    (first / "tokenizer").mkdir()
    checkpoint = first / "checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 3}))
    second = tmp_path / "second"
    second.mkdir()
    keep_base(f"checkpoint:{checkpoint}", second)
    base = read_base(second)
    assert [one.partition(":")[0] for one in base.origins] == ["hf", "checkpoint"]
    assert base.hub_name == "toy/one" and base.read("generation_config.json") == {"top_k": 7}
    assert base.source == (str(checkpoint), None), "not the weights of toy/one any more"
    assert read_base(first).source == ("toy/one", None)
    keep_base("scratch", tmp_path)
    assert read_base(tmp_path) is None
    (second / "base_model/base.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_base(second)


def test_names_with_marks_of_yaml_and_markdown_stay_names(tmp_path):
    name = "a | b: #1\n---\n# x"
    config = {"run": {"name": name}, "model": {"init_from": "scratch"}, "data": {"train": [{"path": "/x/we|b"}]}}
    facts = Facts(tmp_path, MANIFEST, {**config, "fine_tuning": {"train": "all"}}, None)
    card = model_card(facts, "transformers", {"license": name}, "fp32")
    assert ModelCard(card).data.license == name
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert "| trained | everything: 200 of 300 parameters |" in table
    assert "| we\\|b | 77 | `f00d` |" in table and "| tokens | 9,830,400, in sequences of 1,024 |" in table
    assert "| base model | none, trained from scratch |" in table
