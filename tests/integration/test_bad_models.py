"""Folders and names that cannot be fine-tuned: each is refused before anything starts, and what to do is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsgpt.config import load_config
from dsgpt.errors import ConfigError
from dsgpt.train.resolve import resolve_run
from tests.integration.test_resume import train_here
from tests.pool import ranks


@pytest.fixture()
def refused(write_run):
    """refused(folder) -> what a start from it says."""

    def start(folder, **model):
        yaml = write_run("run", **{"model": {"init_from": f"hf:{folder}", **model}})
        with pytest.raises(ConfigError) as caught:
            resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
        return str(caught.value)

    return start


@pytest.fixture()
def copy(hf_folder, tmp_path):
    """copy(kind, key=value) -> a folder whose config.json was changed so."""

    def make(kind, **changes):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(hf_folder(kind), folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


KINDS = ("llama", "mistral")  # one that the native GPT holds, one that it does not


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_its_weights_or_config(kind, copy, refused):
    folder = copy(kind)
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    told = refused(folder)
    assert "no weights" in told and "tf_model.h5" in told and "dsgpt fetch" in told
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    assert "--trust-checkpoint" in refused(folder)
    (folder / "config.json").unlink()
    assert "no readable Hugging Face model here" in refused(folder)
    shutil.rmtree(folder)
    assert "model" in refused(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_code_and_quantised_weights(kind, implementation, copy, refused):
    folder = copy(kind, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')")
    told = refused(folder, implementation=implementation)
    assert "auto_map asks for code to be run" in told and "modeling_own" in told
    folder = copy(kind, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    told = refused(folder, implementation=implementation)
    assert "quantised" in told and "bitsandbytes" in told


def test_kinds_that_are_no_language_model_of_transformers(copy, refused, tmp_path):
    told = refused(copy("mistral", model_type="never_heard_of"))
    assert "no causal language model of this kind" in told and "never_heard_of" in told
    told = refused(copy("mistral", architectures=["MistralForSequenceClassification"]))
    assert "another task" in told and "a folder that holds a MistralForCausalLM" in told


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def test_encoders_and_models_of_several_parts(refused, tmp_path):
    import transformers as hf

    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    bert = hf.BertForMaskedLM(hf.BertConfig(hidden_size=32, **sizes))
    assert "another task" in refused(save(bert, tmp_path / "bert"))
    parts = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=300, d_model=32, **parts))
    assert "several parts" in refused(save(bart, tmp_path / "bart"))
    text = {**sizes, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16}
    seen = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    gemma = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=seen))
    told = refused(save(gemma, tmp_path / "gemma"))
    assert "several parts" in told and "text model" in told


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_missing_or_one_too_many_are_all_named_by_a_start(kind, copy, write_run):
    folder = copy(kind)
    values = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        del values[name]
    save_file({**values, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(3)}, folder / "model.safetensors")
    yaml = write_run("run", **{"model": {"init_from": f"hf:{folder}"}})
    told = ranks(2).run(train_here, yaml, [], 0, "a")[0]
    for name in ("0.mlp.up_proj.weight", "norm.weight", "up_proj.weight_scale"):
        assert name in told, told
    assert "ConfigError" in told


@pytest.mark.parametrize(
    "kind, names", [("llama", "blocks.*.mlp.up_proj.weight"), ("mistral", "model.layers.*.mlp.up_proj")]
)
def test_patterns_and_adapters_that_fit_nothing_list_the_names_there_are(kind, names, hf_folder, write_run):
    settings = {"model": {"init_from": f"hf:{hf_folder(kind)}"}}
    patterns = {"train": "patterns", "patterns": ["*.mlp.*", "transformer.h.*"], "learning_rate_scales": {"wte*": 0.1}}
    told = ranks(2).run(train_here, write_run("a", **settings, fine_tuning=patterns), [], 0, "a")[0]
    assert "fine_tuning.patterns: transformer.h.*" in told and "learning_rate_scales: wte*" in told
    assert "patterns: *.mlp.*" not in told and names in told
    lora = {"train": "lora", "lora": {"target_modules": ["q_proj", "c_attn"]}}
    told = ranks(2).run(train_here, write_run("b", **settings, fine_tuning=lora), [], 0, "a")[0]
    assert "fits no linear layer" in told and "seen: c_attn\n" in told and names.removesuffix(".weight") in told


def test_conversations_longer_than_the_context_say_how_to_prepare_them_again(hf_folder, dataset, write_run, tmp_path):
    from dsgpt.data.chat import prepare_chat
    from dsgpt.errors import DataError

    rows = [{"prompt": "say it", "completion": "again and " * count} for count in (1, 2, 3, 60)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_chat([tmp_path / "long.jsonl"], dataset / "tokenizer", tmp_path / "long")
    settings = {"model": {"init_from": f"hf:{hf_folder('llama')}"}, "data.train": [{"path": str(tmp_path / "long")}]}
    yaml = write_run("run", **settings, **{"training.seq_length": 128})
    with pytest.raises(DataError) as caught:
        resolve_run(load_config([yaml]).config, world_size=2, device="cpu")
    (problem,) = caught.value.problems
    assert "do not fit into rows of 129 tokens" in problem.what and "1 of 4 samples" in problem.seen
    assert "dsgpt data prepare-chat" in problem.do and "--seq-length 128" in problem.do and "--too-long" in problem.do
    assert str(tmp_path / "long") in str(caught.value)
