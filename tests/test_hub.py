"""`hf:NAME` is a folder, or what huggingface_hub's own cache holds; else train and submit refuse.

They say what to type, and download nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsgpt.errors import ConfigError
from dsgpt.hub import locate_hf
from dsgpt.tokenizer import Tokenizer
from dsgpt.train.start import plan_run
from tests.hub_server import Hub, Repository
from tests.run_fixtures import SEQ_LENGTH

NAME = "somebody/tiny"
TO_CACHE = "import sys, huggingface_hub as h; [h.hf_hub_download(sys.argv[1], name) for name in sys.argv[2:]]"


@pytest.fixture(scope="module")
def tiny(dataset, tmp_path_factory) -> Path:
    """A Llama in two shards with the tokenizer of the data, as transformers writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(dataset.parent / "tokenizer", folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=Tokenizer.load(folder).vocab_size, max_position_embeddings=SEQ_LENGTH, initializer_range=0.3, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture()
def cached(hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """cached(names) -> HF_HOME into which huggingface_hub itself downloaded these files of the model."""

    def fill(*names: str) -> Path:
        hub.repositories[f"models/{NAME}"] = Repository({path.name: path.read_bytes() for path in tiny.iterdir()})
        done = hub.run(tmp_path / "home", "-c", TO_CACHE, NAME, *names)
        assert done.returncode == 0, done.stderr
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home/hub"))
        return tmp_path / "home"

    return fill


def names_of(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_folder_comes_before_a_name_and_what_is_no_name_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert locate_hf(NAME) == Path(NAME)
    assert locate_hf(f"{tmp_path}/not there") == tmp_path / "not there"


def test_a_model_that_is_only_partly_in_the_cache_is_refused(cached, tiny):
    cached("config.json", "tokenizer.json")
    with pytest.raises(ConfigError, match=f"only parts of it(.|\n)*dsgpt fetch hf:{NAME} --output"):
        locate_hf(NAME)
    cached(*(name for name in names_of(tiny) if name != max(tiny.glob("*.safetensors")).name))
    with pytest.raises(ConfigError, match="only parts of it"):
        locate_hf(NAME)
    cached(*names_of(tiny))
    assert set(names_of(locate_hf(NAME))) == set(names_of(tiny))


def test_train_and_submit_refuse_what_is_not_on_the_disk_and_download_nothing(hub, tmp_path, write_run):
    hub.repositories[f"models/{NAME}"] = Repository({"config.json": b"{}"})
    words = (str(write_run()), f"model.init_from=hf:{NAME}")
    for verb in (("train",), ("submit", "--nodes", "1", "--gpus-per-node", "2", "--time", "10")):
        code = "import sys; from dsgpt.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
        done = hub.run(tmp_path / "home", "-c", code, *verb, *words)
        assert done.returncode == 78, done.stderr
        assert f"dsgpt fetch hf:{NAME} --output DIR" in done.stderr and "model.init_from=hf:DIR" in done.stderr
        assert done.stdout.strip() == "False" or verb == ("train",)
    assert not hub.tokens, "nobody asked the hub for anything"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_starts_from_a_model_in_the_cache_and_evaluate_reads_it(hub, cached, tiny, dataset, write_run):
    home = cached(*names_of(tiny))
    yaml = write_run(**{"training.max_steps": 1, "optimizer.learning_rate": 1e-12, "optimizer.warmup_steps": 0})
    assert plan_run([str(yaml), f"model.init_from=hf:{NAME}"]).run.model.intermediate_size == 64
    offline = {"HF_HUB_OFFLINE": "1"}
    done = hub.run(home, "-m", "dsgpt", "train", yaml, f"model.init_from=hf:{NAME}", **offline)
    assert done.returncode == 0, done.stderr
    text = ("--text", dataset.parent / "texts.jsonl", "--json")
    trained, read = (
        hub.run(home, "-m", "dsgpt", "evaluate", model, *text, **offline)
        for model in (str(yaml.with_suffix("")), f"hf:{NAME}")
    )
    loss = json.loads(read.stdout)["loss"]
    assert loss > 6, "a model of its own: one that begins at random is nearer to ln 300"
    assert json.loads(trained.stdout)["loss"] == pytest.approx(loss, rel=1e-5)
