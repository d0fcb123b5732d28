"""Models of transformers for tests that train: each kind is made once in a session."""

from __future__ import annotations

import json

import pytest

from tests.hf_models import make_hf_folder


@pytest.fixture(scope="session")
def hf_folder(dataset, tmp_path_factory):
    """hf_folder("llama", tie_word_embeddings=True) -> a folder with weights and the tokenizer of `dataset`."""
    tokenizer = dataset.parent / "tokenizer"
    vocab_size = len(json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    made = {}

    def make(kind, **changes):
        key = kind, *sorted(changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("hf") / kind
            settings = {"vocab_size": max(vocab_size, 300)} | changes
            made[key] = make_hf_folder(folder, kind, tokenizer, **settings)
        return made[key]

    return make
