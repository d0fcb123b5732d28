"""What comes out of every kind of run, read by transformers and peft, which are the judges."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner

from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.cli import cli
from dsgpt.errors import CheckpointError, ConfigError
from dsgpt.generate.decoder import Decoder
from dsgpt.generate.sampling import Sampling
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.hf_models import make_hf_folder
from tests.integration.test_fine_tuning import first_loss
from tests.integration.test_resume import train_here
from tests.pool import ranks
from tests.run_fixtures import write_config

WAYS = {
    "all": {},
    "last_blocks": {"train": "last_blocks", "num_last_blocks": 1},
    "patterns": {"train": "patterns", "patterns": ["*.1.*"]},
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


SLOW = pytest.mark.slow
QUICK_WAYS = {"llama": "lora", "qwen3": "dora", "gpt2": "unfreezing", "opt": "dora", "dsgpt": "lora"}


@pytest.mark.parametrize(
    "kind, way",
    [
        pytest.param(kind, way, marks=() if QUICK_WAYS.get(kind) == way else (SLOW,))
        for kind in ("llama", "qwen3", "gpt2", "mistral", "opt", "dsgpt")
        for way in WAYS
    ],
)
def test_every_kind_in_every_way_comes_out_whole(kind, way, dataset, tmp_path):
    if kind == "dsgpt":  # which no other format holds
        shape = {"model.norm": "batchnorm", "training.max_steps": 2, "optimizer.warmup_steps": 0}
        assert ranks(2).run(train_here, write_config(dataset, tmp_path, "base", **shape), [], 0, "a") == [2, 2]
        start = f"checkpoint:{tmp_path / 'base'}"
    else:
        start = f"hf:{base_folder(tmp_path / 'base', kind, dataset)}"
    run = fine_tune(tmp_path, "run", dataset, start, WAYS[way])
    told = read_json("checkpoint", "export", run, "--output", tmp_path / "out")
    assert told["checked_with"] == ("dsgpt" if kind == "dsgpt" else "transformers")
    ours = logits(load_model(find_model(str(run))))
    exported = load_model(find_model(str(tmp_path / "out"))) if kind == "dsgpt" else in_transformers(tmp_path / "out")
    assert (logits(exported) - ours).abs().max() < 1e-4
    before = load_model(find_model(str(tmp_path / "base")))
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


PAIRS = [(kind, way) for kind in ("llama", "qwen3", "mistral", "opt") for way in ("lora", "dora")]
QUICK = (("llama", "dora"), ("qwen3", "lora"), ("mistral", "dora"))


@pytest.mark.parametrize("kind, way", [pytest.param(*pair, marks=() if pair in QUICK else (SLOW,)) for pair in PAIRS])
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
    from peft import PeftConfig

    base = base_folder(tmp_path / "base", "gpt2", dataset)
    joined = fine_tune(tmp_path, "joined", dataset, f"hf:{base}", WAYS["lora"])
    refused = dsgpt("checkpoint", "export", joined, "--output", tmp_path / "out", "--adapter")
    assert isinstance(refused.exception, ConfigError)
    assert "k_proj" in str(refused.exception) and "leave out --adapter" in str(refused.exception)
    some = WAYS["lora"] | {"lora": {"rank": 4, "target_modules": ["up_proj", "down_proj"]}}
    (base / "fetched.json").write_text(json.dumps({"source": "hf:toy/gpt", "revision": "abc123"}))
    own = fine_tune(tmp_path, "own", dataset, f"hf:{base}", some)
    told = read_json("checkpoint", "export", own, "--output", tmp_path / "own-adapter", "--adapter")
    assert told["logit_difference"] < 1e-4, "layers that GPT-2 has too, though transposed"
    named = PeftConfig.from_pretrained(tmp_path / "own-adapter")
    assert (named.base_model_name_or_path, named.revision) == ("toy/gpt", "abc123"), "as anybody finds it"
    assert front_matter(tmp_path / "own-adapter")["base_model"] == "toy/gpt"
    none = fine_tune(tmp_path, "none", dataset, f"hf:{base}", WAYS["last_blocks"])
    refused = dsgpt("checkpoint", "export", none, "--output", tmp_path / "out", "--adapter")
    assert isinstance(refused.exception, CheckpointError) and "no adapters" in str(refused.exception)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


def losses_of_documents(model, dataset):
    """Mean loss of a validation split by transformers itself, each document alone."""
    from dsgpt.data.dataset import BlockDataset, read_samples

    split = BlockDataset(dataset, "validation", 64)
    arrays = read_samples(split, np.arange(split.num_samples))
    total, count = 0.0, 0
    for ids, labels, documents in zip(arrays["input_ids"], arrays["labels"], arrays["document_ids"], strict=True):
        for document in np.unique(documents[documents >= 0]):
            here = documents == document
            target = torch.from_numpy(labels[here].astype(np.int64))
            with torch.no_grad():
                found = model(torch.from_numpy(ids[here].astype(np.int64))[None]).logits[0]
            total += float(F.cross_entropy(found, target, reduction="sum"))
            count += int((target != -100).sum())
    return total / count


@pytest.mark.parametrize("kind, way", [("mistral", "lora"), ("opt", "all")])
def test_runs_and_exports_are_evaluated_and_generate_as_transformers_does(kind, way, dataset, tmp_path):
    base = base_folder(tmp_path / "base", kind, dataset)
    run = fine_tune(tmp_path, "run", dataset, f"hf:{base}", WAYS[way])
    export = tmp_path / "out"
    read_json("checkpoint", "export", run, "--output", export)
    model, tokenizer = in_transformers(export), Tokenizer.load(export)

    text = "def area(width: float, height: float) -> float:\n    return width * height\n" * 4
    (tmp_path / "text.py").write_text(text)
    ids = torch.tensor([tokenizer.encode_document(text)])
    assert ids.shape[1] > 2 * 64, "several windows of its context"
    total = 0.0
    for start in range(0, ids.shape[1] - 1, 64):
        piece = ids[:, start : start + 65]
        with torch.no_grad():
            total += float(F.cross_entropy(model(piece[:, :-1]).logits[0], piece[0, 1:], reduction="sum"))
    alone = losses_of_documents(model, dataset)

    begun = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text[:30])]])
    assert 16 < begun.shape[1] < 40, "longer than mistral's window here"
    new = model.generate(begun, do_sample=False, max_new_tokens=24, use_cache=True)[0, begun.shape[1] :].tolist()
    for place in (run, export):
        told = read_json("evaluate", place, "--text", tmp_path / "text.py")
        assert told["tokens"] == ids.shape[1] - 1
        assert told["loss"] == pytest.approx(total / told["tokens"], rel=1e-5)
        assert read_json("evaluate", place, "--data", dataset)["loss"] == pytest.approx(alone, rel=1e-5)
        ours = load_model(find_model(str(place)))
        decoder = Decoder(ours)
        row = decoder.add(begun[0].tolist(), Sampling(24, temperature=0), [tokenizer.eos_id])
        while row.finish is None:
            decoder.step()
        assert row.new == [one for one in new if one != tokenizer.eos_id] and len(new) > 4


def test_pretrained_then_adapted_then_trained_in_part_is_one_chain_of_weights(dataset, tmp_path):
    """Each stage's first loss is that of transformers on the export of the stage before."""
    steps = {"training.max_steps": 8, "optimizer.warmup_steps": 0}
    pretrained = write_config(dataset, tmp_path, "pretrained", **steps)
    assert ranks(2).run(train_here, pretrained, [], 0, "a") == [8, 8]
    exports = [tmp_path / "export-0"]
    read_json("checkpoint", "export", tmp_path / "pretrained", "--output", exports[0])
    stages = (
        ("adapted", f"hf:{exports[0]}", WAYS["lora"], "zero3"),
        ("again", f"checkpoint:{tmp_path / 'adapted'}", WAYS["dora"], "zero2"),
        ("part", f"checkpoint:{tmp_path / 'again'}", WAYS["last_blocks"], "zero3"),
    )
    for number, (name, start, way, stage) in enumerate(stages, start=1):
        run = fine_tune(tmp_path, name, dataset, start, way, deepspeed=stage)
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert line["loss"] == pytest.approx(first_loss(exports[-1], tmp_path / f"{name}.yaml"), abs=2e-5), name
        exports.append(tmp_path / f"export-{number}")
        read_json("checkpoint", "export", run, "--output", exports[-1], "--license", "mit")
        in_transformers(exports[-1])
        assert (logits(in_transformers(exports[-1])) - logits(in_transformers(exports[-2]))).abs().max() > 1e-2
    card = (exports[-1] / "README.md").read_text()
    assert "hf:export-0, then checkpoint:adapted, then checkpoint:again" in card
    assert front_matter(exports[-1])["license"] == "mit" and front_matter(exports[0])["license"] == "unknown"
    told = read_json("checkpoint", "export", tmp_path / "again", "--output", tmp_path / "adapter", "--adapter")
    assert told["logit_difference"] is None and "dsgpt checkpoint export" in told["unchecked"]
