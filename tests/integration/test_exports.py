"""What comes out of every kind of run, read by transformers and peft, which are the judges."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner

from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.cli import cli
from dsgpt.errors import CheckpointError, ConfigError
from tests.hf_models import make_hf_folder
from tests.integration.test_resume import train_here
from tests.pool import ranks
from tests.run_fixtures import write_config

WAYS = {
    "all": {},
    "last_blocks": {"train": "last_blocks", "num_last_blocks": 1},
    "patterns": {"train": "patterns", "patterns": ["*mlp*"]},
    "lora": {"train": "lora", "lora": {"rank": 4, "alpha": 8.0}},
    "dora": {"train": "lora", "lora": {"rank": 4, "use_dora": True}},
    "unfreezing": {"train": "last_blocks", "num_last_blocks": 1, "unfreeze_at": {2: "all"}},
}
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
CARD = "---\nlicense: other\nlicense_name: toy\nlicense_link: LICENSE\nbase_model: toy/grandparent\n---\n# A toy\n"


def dsgpt(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def read_json(*arguments):
    done = dsgpt(*arguments, "--json")
    assert done.exit_code == 0, done.exception or done.output
    return json.loads(done.stdout)


def base_folder(folder, kind, dataset, **changes):
    """As the hub has one: a licence, a generation config of its own, a chat template."""
    made = make_hf_folder(folder, kind, dataset.parent / "tokenizer", 300, **changes)
    generation = json.loads((made / "generation_config.json").read_text())
    (made / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.6, "do_sample": True}))
    (made / "README.md").write_text(CARD)
    (made / "LICENSE").write_text("The toy licence.\n")
    return made


def fine_tune(folder, name, dataset, init_from, way, **settings):
    """Two steps with a learning rate that shows, and an evaluation at the end."""
    short = {
        "model": {"init_from": init_from},
        "training.max_steps": 2,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "fine_tuning": way,
        "deepspeed": "zero2",
    }
    config = write_config(dataset, folder, name, **(short | settings))
    assert ranks(2).run(train_here, config, [], 0, "a") == [2, 2]
    return folder / name


def in_transformers(folder, **options):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def logits(model):
    ids = torch.arange(2 * 24).view(2, 24) % 300
    found = model(ids)
    return getattr(found, "logits", found)


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, dataset):
    """A LoRA run of a Mistral, whose base folder lies beside it."""
    folder = tmp_path_factory.mktemp("lora")
    base = base_folder(folder / "base", "mistral", dataset)
    return fine_tune(folder, "run", dataset, f"hf:{base}", WAYS["lora"]), base


def test_an_export_holds_what_the_base_model_said_though_its_folder_is_gone(dataset, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    base = base_folder(tmp_path / "base", "mistral", dataset)
    for file in ("README.md", "generation_config.json", "config.json"):
        shutil.copy(base / file, tmp_path / f"before-{file}")
    chat = tmp_path / "data"
    shutil.copytree(dataset, chat)
    (chat / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    run = fine_tune(tmp_path, "run", chat, f"hf:{base}", WAYS["last_blocks"])
    shutil.rmtree(base)
    told = read_json("checkpoint", "export", run, "--output", tmp_path / "out")
    assert told["checked_with"] == "transformers" and told["license"] == "other"
    in_transformers(tmp_path / "out")

    config, before = (
        json.loads(one.read_text()) for one in (tmp_path / "out/config.json", tmp_path / "before-config.json")
    )
    assert config == before | {"dtype": "float32"}
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.temperature, generation.do_sample, generation.bos_token_id) == (0.6, True, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer.eos_token and chat == f"[user] hi{tokenizer.eos_token}"

    head = front_matter(tmp_path / "out")
    assert head["license"] == "other" and head["license_name"] == "toy" and head["base_model"] == "toy/grandparent"
    assert (tmp_path / "out/LICENSE").read_text() == "The toy licence.\n"
    card = (tmp_path / "out/README.md").read_text()
    fingerprint = json.loads((dataset / "dataset.json").read_text())["fingerprint"]
    validation = json.loads((run / "checkpoints/step-00000002/evaluation.json").read_text())["loss"]
    for fact in (fingerprint, f"{validation:.4f}", "last 1 blocks", "| steps | 2 |", "1,024", "hf:base"):
        assert fact in card, fact
    assert str(tmp_path) not in card, "no path of this machine"


@pytest.mark.parametrize(
    "kind, way", [("llama", "lora"), ("qwen3", "dora"), ("gpt2", "unfreezing"), ("opt", "dora"), ("dsgpt", "lora")]
)
def test_a_native_model_and_one_of_transformers_come_out_whole(kind, way, dataset, tmp_path):
    whole_matrix(kind, way, dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "opt", "dsgpt"])
def test_every_kind_in_every_way_comes_out_whole(kind, way, dataset, tmp_path):
    whole_matrix(kind, way, dataset, tmp_path)


def whole_matrix(kind, way, dataset, folder):
    if kind == "dsgpt":  # which no other format holds
        shape = {"model.norm": "batchnorm", "training.max_steps": 2, "optimizer.warmup_steps": 0}
        assert ranks(2).run(train_here, write_config(dataset, folder, "base", **shape), [], 0, "a") == [2, 2]
        start = f"checkpoint:{folder / 'base'}"
    else:
        start = f"hf:{base_folder(folder / 'base', kind, dataset)}"
    run = fine_tune(folder, "run", dataset, start, WAYS[way])
    told = read_json("checkpoint", "export", run, "--output", folder / "out")
    assert told["checked_with"] == ("dsgpt" if kind == "dsgpt" else "transformers")
    ours = logits(load_model(find_model(str(run))))
    exported = load_model(find_model(str(folder / "out"))) if kind == "dsgpt" else in_transformers(folder / "out")
    assert (logits(exported) - ours).abs().max() < 1e-4
    before = load_model(find_model(str(folder / "base")))
    assert (logits(before) - ours).abs().max() > 1e-2, "two steps changed it"


def test_sixteen_bits_are_what_torch_rounds_to_and_config_says_so(lora_run, tmp_path):
    run, _ = lora_run
    read_json("checkpoint", "export", run, "--output", tmp_path / "fp32")
    whole = in_transformers(tmp_path / "fp32", dtype="auto").state_dict()
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        told = read_json("checkpoint", "export", run, "--output", tmp_path / dtype, "--dtype", dtype)
        assert told["logit_difference"] < 1e-4, "compared with the checkpoint's weights in that precision"
        model = in_transformers(tmp_path / dtype, dtype="auto")
        assert model.dtype == torch_dtype
        rounded = model.state_dict()
        assert all(torch.equal(rounded[name], value.to(torch_dtype)) for name, value in whole.items())


def test_a_weight_too_large_for_fp16_is_named():
    from dsgpt.checkpoint.export import in_precision

    with pytest.raises(CheckpointError, match=r"lm_head.*7e"):
        in_precision("lm_head.weight", torch.tensor([1.0, 7e4]), torch.float16)
    assert in_precision("lm_head.weight", torch.tensor([7e4]), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("way", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "opt"])
def test_adapters_alone_compute_in_peft_what_the_merged_model_computes(kind, way, dataset, tmp_path):
    from peft import PeftConfig, PeftModel

    base = base_folder(tmp_path / "base", kind, dataset)
    run = fine_tune(tmp_path, "run", dataset, f"hf:{base}", WAYS[way])
    merged = read_json("checkpoint", "export", run, "--output", tmp_path / "merged")
    told = read_json("checkpoint", "export", run, "--output", tmp_path / "adapter", "--adapter")
    assert told["logit_difference"] < 1e-4 and told["num_parameters"] < merged["num_parameters"] / 2
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(base)
    adapted = PeftModel.from_pretrained(in_transformers(base), tmp_path / "adapter").eval()
    expected = logits(in_transformers(tmp_path / "merged"))
    assert (logits(adapted) - expected).abs().max() < 1e-4
    assert (logits(in_transformers(base)) - expected).abs().max() > 1e-2
    assert front_matter(tmp_path / "adapter")["library_name"] == "peft"


def test_adapters_alone_are_refused_where_there_are_none_or_peft_has_no_place_for_them(dataset, tmp_path):
    base = base_folder(tmp_path / "base", "gpt2", dataset)
    joined = fine_tune(tmp_path, "joined", dataset, f"hf:{base}", WAYS["lora"])
    refused = dsgpt("checkpoint", "export", joined, "--output", tmp_path / "out", "--adapter")
    assert isinstance(refused.exception, ConfigError)
    assert "k_proj" in str(refused.exception) and "leave out --adapter" in str(refused.exception)
    some = WAYS["lora"] | {"lora": {"rank": 4, "target_modules": ["up_proj", "down_proj"]}}
    own = fine_tune(tmp_path, "own", dataset, f"hf:{base}", some)
    told = read_json("checkpoint", "export", own, "--output", tmp_path / "own-adapter", "--adapter")
    assert told["logit_difference"] < 1e-4, "layers that GPT-2 has too, though transposed"
    none = fine_tune(tmp_path, "none", dataset, f"hf:{base}", WAYS["last_blocks"])
    refused = dsgpt("checkpoint", "export", none, "--output", tmp_path / "out", "--adapter")
    assert isinstance(refused.exception, CheckpointError) and "no adapters" in str(refused.exception)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))
