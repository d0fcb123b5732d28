"""A folder that is not there, or is of another kind, is told with the word that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgpt.checkpoint.deepspeed_files import find_deepspeed
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.config import load_config
from dsgpt.errors import CheckpointError, ConfigError
from dsgpt.train.start import plan_run


@pytest.fixture()
def saved(tmp_path) -> Path:
    """What a save of DeepSpeed looks like from outside."""
    tag = tmp_path / "saved/global_step4"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").touch()
    (tag.parent / "latest").write_text("global_step4")
    return tag.parent


@pytest.fixture()
def run_folder(tmp_path) -> Path:
    step = tmp_path / "another/checkpoints/step-00000005"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    return tmp_path / "another"


def test_a_save_that_is_not_there_is_answered_with_those_beside_it(saved):
    with pytest.raises(CheckpointError, match=r"no such folder(.|\n)*deepspeed:\S*/saved/global_step4"):
        find_deepspeed(saved / "global_step7")
    with pytest.raises(CheckpointError, match=r"this is a file(.|\n)*deepspeed:\S*/saved/global_step4$"):
        find_deepspeed(saved / "global_step4/mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="no such folder"):
        find_deepspeed(saved / "nowhere/nowhere")


def test_a_folder_of_another_kind_is_told_with_the_word_that_reads_it(saved, run_folder, write_run):
    with pytest.raises(CheckpointError, match=f"model.init_from=deepspeed:{saved} "):
        locate_checkpoint(str(saved))
    with pytest.raises(CheckpointError, match=f"checkpoint:{run_folder} for its weights"):
        find_deepspeed(run_folder)
    (saved / "config.json").write_text("{}")
    for kind, place in (("deepspeed", saved), ("checkpoint", run_folder)):
        with pytest.raises(ConfigError, match=f"model.init_from={kind}:{place}"):
            plan_run([str(write_run()), f"model.init_from=hf:{place}"])


def test_the_shape_is_not_asked_for_where_deepspeed_saved_nothing(run_folder, write_run):
    shape = [f"model.{key}=null" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    load_config([write_run()], [f"model.init_from=deepspeed:{run_folder}", *shape])
