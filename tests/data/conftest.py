"""A byte-level tokenizer that needs no training, and documents of many kinds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.tokenizer.texts import DIFFICULT, fuzz


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids 0 and 1 are BOS and EOS, the others bytes and a few merges."""
    from dsgpt.tokenizer.training import train_on_texts

    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    train_on_texts(["the cat sat on the mat, the end. " * 20], 270, folder, "hf-bpe", {})
    return folder


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """About 2.5 MB in some thousand texts, no two equal."""
    rng = random.Random(5)
    words = [word for text in fuzz(200, seed=3) for word in text.split()]
    texts = [f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(1, 700))) for i in range(1300)]
    return [text for text in DIFFICULT if text] + texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The documents in two .jsonl files of unequal size."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in (("a.jsonl", documents[:1000]), ("sub/b.jsonl", documents[1000:])):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return folder
