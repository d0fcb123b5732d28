"""What one does with a trained run: list, verify, evaluate, generate, export; each against an outside oracle."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.weights import find_model, load_model
from dsgpt.cli import cli
from dsgpt.errors import CheckpointError, DataError
from dsgpt.evaluate.loss import evaluate_dataset, evaluate_texts
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.integration.test_resume import train_here
from tests.pool import ranks

TEXT = 'def area(width: float, height: float) -> float:\n    """In square metres."""\n    return width * height\n' * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """A small trained run, made once for this file."""
    from tests.run_fixtures import write_config

    folder = tmp_path_factory.mktemp("trained")
    yaml = write_config(dataset, folder, "run", **{"training.max_steps": 20, "checkpoint.save_interval": 10})
    assert ranks(2).run(train_here, yaml, [], 0, "a") == [20, 20]
    return folder / "run"


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)
    return result


def transformers_loss(folder, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_export_opens_in_transformers_with_tokenizer_and_the_evaluated_loss(trained, tmp_path):
    from transformers import AutoTokenizer

    output = tmp_path / "exported"
    done = run("checkpoint", "export", trained, "--output", output, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["logit_difference"] < 1e-4 and report["architecture"] == "llama"
    location = find_model(str(trained))
    tokenizer = Tokenizer.load(location.tokenizer)
    ids = torch.tensor([tokenizer.encode_document(TEXT)[:32]])
    theirs = AutoTokenizer.from_pretrained(output)
    assert theirs.encode(TEXT, add_special_tokens=False) == list(tokenizer.encode(TEXT))

    expected = transformers_loss(output, ids)
    short = tokenizer.decode(ids[0, 1:].tolist())
    assert list(tokenizer.encode_document(short))[:-1] == ids[0].tolist(), "the text of these ids, without its EOS"
    for model in (load_model(location), load_model(find_model(str(output)))):
        with torch.no_grad():
            ours = float(model(ids[:, :-1], labels=ids[:, 1:].contiguous())) / (ids.shape[1] - 1)
        assert ours == pytest.approx(expected, rel=1e-5)

    again = run("checkpoint", "export", trained, "--output", output)
    assert isinstance(again.exception, CheckpointError) and "the output exists" in str(again.exception)


def test_a_sharded_export_is_the_whole_one_to_transformers_and_to_the_safetensors_library(
    trained, tmp_path, monkeypatch
):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert run("checkpoint", "export", trained, "--output", whole, "--no-check").exit_code == 0
    monkeypatch.setattr("dsgpt.checkpoint.export.SHARD_BYTES", 40_000)
    assert run("checkpoint", "export", trained, "--output", sharded).exit_code == 0
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 3 and not (sharded / "model.safetensors").exists()
    parts = [load_file(file) for file in files]
    assert all(sum(value.nbytes for value in part.values()) <= 40_000 or len(part) == 1 for part in parts)
    expected = load_file(whole / "model.safetensors")
    assert sum(len(part) for part in parts) == len(expected)
    assert all(torch.equal(value, expected[name]) for part in parts for name, value in part.items())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    ours, theirs = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (whole, sharded))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluated_text_counts_every_token_and_byte_once(trained):
    location = find_model(str(trained))
    model, tokenizer = load_model(location), Tokenizer.load(location.tokenizer)
    ids = torch.tensor([tokenizer.encode_document(TEXT)])
    context = model.config.max_position_embeddings
    assert ids.shape[1] > 2 * context + 1, "several windows"
    result = evaluate_texts(model, tokenizer, [TEXT])
    total = 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, context):
            piece = ids[:, start : start + context + 1]
            logits = model(piece[:, :-1]).log_softmax(-1)
            total -= float(logits.gather(2, piece[:, 1:, None]).sum())
    assert result.tokens == ids.shape[1] - 1
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / result.tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-5)
    shown = json.loads(run("evaluate", trained, "--text", __file__, "--json").stdout)
    assert shown["loss"] > 0 and shown["tokens"] > 1000


def test_the_validation_loss_in_training_is_that_of_evaluate(trained, dataset):
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    during = next(e for e in reversed(events) if e["event"] == "evaluation")
    location = find_model(str(trained))
    model, tokenizer = load_model(location), Tokenizer.load(location.tokenizer)
    after = evaluate_dataset(model, tokenizer, dataset, "validation", limit=8)
    assert after.tokens == during["tokens"]
    assert after.loss == pytest.approx(during["loss"], rel=1e-5)
    assert after.bits_per_byte == pytest.approx(during["bits_per_byte"], rel=1e-5)


def test_a_dataset_of_another_tokenizer_is_refused(trained, dataset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "dataset.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(manifest))
    location = find_model(str(trained))
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_dataset(load_model(location), Tokenizer.load(location.tokenizer), other, "validation")


def test_generation_is_repeatable_and_prints_one_json_object(trained):
    first = json.loads(
        run("generate", trained, "--prompt", "def ", "--max-new-tokens", 12, "--seed", 3, "--json").stdout
    )
    again = json.loads(
        run("generate", f"{trained}@20", "--prompt", "def ", "--max-new-tokens", 12, "--seed", 3, "--json").stdout
    )
    assert first["text"] == again["text"] and 0 < first["tokens"] <= 12
    older = json.loads(
        run("generate", f"{trained}@10", "--prompt", "def ", "--max-new-tokens", 12, "--seed", 3, "--json").stdout
    )
    assert "step-00000010" in older["model"]
    missing = run("generate", f"{trained}@11", "--prompt", "x")
    assert isinstance(missing.exception, CheckpointError)


def test_listing_and_verifying_need_no_torch_and_find_a_flipped_bit(trained, tmp_path):
    listed = json.loads(run("checkpoint", "ls", trained, "--json").stdout)["checkpoints"]
    assert [row["step"] for row in listed] == [10, 20] and listed[0]["world_size"] == 2
    model = load_model(find_model(str(trained)))
    parameters = sum(p.numel() for p in model.parameters())
    assert 12 * parameters < listed[1]["bytes"] < 12 * parameters + 20_000, "12 bytes a parameter and some header"
    assert run("checkpoint", "verify", trained).exit_code == 0
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    victim = copy / "checkpoints/step-00000010/rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    assert commit.verify(victim.parent, "size") == []
    bad = run("checkpoint", "verify", copy)
    assert bad.exit_code == 65 and "step-00000010: BAD" in bad.output and "step-00000020: good" in bad.output
    refused = run("evaluate", f"{copy}@10", "--text", __file__)
    assert isinstance(refused.exception, CheckpointError)


def test_a_damaged_or_unfinished_checkpoint_is_not_exported(trained, tmp_path):
    """T953."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "checkpoints/step-00000010/rank-00001.safetensors").write_bytes(b"")
    (copy / "checkpoints/step-00000020").rename(copy / "checkpoints/.tmp-step-00000020-a")
    for name in (f"{copy}@10", f"{copy}@20", str(copy / "checkpoints/.tmp-step-00000030-a")):
        refused = run("checkpoint", "export", name, "--output", tmp_path / "export")
        assert isinstance(refused.exception, CheckpointError), name
        assert not (tmp_path / "export").exists()
