"""A small model of transformers with a chat template, for the tests of what one does with a trained model."""

from __future__ import annotations

import pytest

from dsgpt.data.chat_template import DEFAULT
from tests.hf_models import make_hf_folder

CONTEXT = 256


@pytest.fixture(scope="session")
def model_folder(dataset, tmp_path_factory):
    tokenizer = dataset.parent / "tokenizer"
    folder = tmp_path_factory.mktemp("used") / "small"
    make_hf_folder(folder, "llama", tokenizer, 300, max_position_embeddings=CONTEXT)
    (folder / "chat_template.jinja").write_text(DEFAULT)
    return folder
