"""A small real dataset, made once per session by dsgpt itself from its own sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dsgpt

SEQ_LENGTH = 32


def make_dataset(folder: Path) -> Path:
    """Tokenizer, text and dataset in a new folder: about 120 sequences of SEQ_LENGTH from dsgpt's own sources."""
    from dsgpt.data.prepare import prepare
    from dsgpt.tokenizer.training import train_on_texts

    names = ("errors.py", "optimizer.py", "units.py")
    texts = [(Path(dsgpt.__file__).parent / name).read_text("utf-8") for name in names]
    lines = "".join(json.dumps({"text": text}) + "\n" for whole in texts for text in whole.split("\n\n"))
    folder.mkdir(parents=True)
    (folder / "texts.jsonl").write_text(lines, "utf-8")
    train_on_texts(texts, 300, folder / "tokenizer", "hf-bpe", {})
    prepare([folder / "texts.jsonl"], folder / "tokenizer", folder / "data", workers=1, validation=0.1)
    return folder / "data"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "made")


@pytest.fixture()
def write_run(dataset, tmp_path):
    """write_run(**{"training.max_steps": 5}) -> path of a YAML for a tiny model on the dataset, two ranks, ZeRO 1."""
    return lambda name="run", **overrides: write_config(dataset, tmp_path, name, **overrides)


def write_config(dataset: Path, folder: Path, name: str = "run", **overrides) -> Path:
    import yaml

    config = {
        "run": {"name": name, "output_dir": str(folder / name), "seed": 5},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
        },
        "data": {"train": [{"path": str(dataset)}]},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "training": {
            "seq_length": SEQ_LENGTH,
            "global_batch_size": 16,
            "micro_batch_size_per_gpu": 4,
            "max_steps": 12,
        },
        "deepspeed": "zero1",
        "device": "cpu",
        "checkpoint": {"save_interval": 100},
        "logging": {"log_interval": 1, "eval_samples": 8},
    }
    for key, value in overrides.items():
        section = config
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
