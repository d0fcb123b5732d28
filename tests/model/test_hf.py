"""Models of transformers behind our forward: losses, documents apart, dropout, names in files, each against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsgpt.config import Dropout
from dsgpt.errors import ConfigError
from dsgpt.model.build import block_of, blocks_prefix
from dsgpt.model.functional import chunked_cross_entropy
from dsgpt.model.hf import (
    build_hf,
    check_forward,
    choose_attention,
    constants,
    hf_model_config,
    names_in_folder,
    transformers_config,
)
from tests.hf_models import BLOCKS, hf_config

KINDS = ("gpt2", "llama", "qwen3", "mistral", "gemma", "gpt_neox", "phi", "opt")
VOCAB = 97


def reference(kind, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = hf_config(kind, VOCAB)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def ours(model, **changes):
    config = hf_model_config(model.config.to_dict(), 1, "here").model_copy(update=changes)
    built = build_hf(config)
    built.load_state_dict(model.state_dict())
    return built.eval()


@pytest.mark.parametrize("kind", ["mistral", "gpt_neox", "opt"])
@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_every_way_to_attend_keeps_documents_apart_and_gives_the_same_loss(kind, way):
    theirs = reference(kind)
    model = ours(theirs)
    choose_attention(model, way)
    assert model.config._attn_implementation == way
    check_forward(model, VOCAB, torch.device("cpu"))
    ids, labels = (torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    expected = float(F.cross_entropy(theirs(ids).logits[0], labels[0], reduction="sum"))
    assert float(model(ids, labels=labels)) == pytest.approx(expected, rel=1e-5)


def test_a_way_to_attend_that_is_not_here_is_refused_and_nothing_is_downloaded():
    model = ours(reference("mistral"))
    with pytest.raises(ConfigError, match="flash_attn"):
        choose_attention(model, "flash_attention_2")
    with pytest.raises(ConfigError, match="cannot attend"):
        choose_attention(model, "nonsense")


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_row_have_the_losses_and_gradients_they_have_alone(kind):
    theirs = reference(kind)
    model = ours(theirs)
    check_forward(model, VOCAB, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(VOCAB, (2, 30), generator=generator) for _ in range(2))
    labels[0, 11], labels[1, 25:] = -100, -100
    cuts = [(0, 12), (12, 13), (13, 30)]
    positions = torch.cat([torch.arange(end - start) for start, end in cuts]).expand(2, -1)
    documents = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(cuts)]).int().expand(2, -1)
    loss = model(ids, labels=labels, position_ids=positions, document_ids=documents)
    loss.backward()
    expected = sum(
        F.cross_entropy(theirs(ids[:, a:b]).logits.flatten(0, 1), labels[:, a:b].flatten(), reduction="sum")
        for a, b in cuts
        if (labels[:, a:b] != -100).any()
    )
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=2e-4)


def test_an_architecture_that_leaks_is_given_the_mask_and_one_that_then_still_does_is_refused():
    model = ours(reference("opt"))
    check_forward(model, VOCAB, torch.device("cpu"))
    assert model.gives_mask
    assert not ours(reference("llama")).gives_mask
    model = ours(reference("opt"))
    inner = model.base_model.decoder.forward
    model.base_model.decoder.forward = lambda attention_mask=None, **inputs: inner(**inputs)  # heeds no mask
    with pytest.raises(ConfigError, match="see each other"):
        check_forward(model, VOCAB, torch.device("cpu"))


def test_a_model_that_sees_ahead_is_refused():
    theirs = reference("llama", is_causal=False)
    with pytest.raises(ConfigError, match="those that follow"):
        check_forward(ours(theirs), VOCAB, torch.device("cpu"))


def test_logits_that_are_changed_in_an_unknown_way_are_refused():
    model = ours(reference("llama"))
    original = model.transformers_forward

    def scaled(**inputs):
        result = original(**inputs)
        result.logits = result.logits * 1.1
        return result

    model.transformers_forward = scaled
    with pytest.raises(ConfigError, match="not known here"):
        check_forward(model, VOCAB, torch.device("cpu"))


def test_soft_caps_scales_and_biases_have_autograds_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, 8), (VOCAB, 8), (VOCAB,)))
    labels = torch.randint(VOCAB, (40,), generator=generator)
    labels[::7] = -100
    for scale, softcap in ((1.0, 0.0), (0.3, 0.0), (1.0, 2.0), (0.5, 3.0)):
        leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
        chunked_cross_entropy(leaves[0], leaves[1], labels, leaves[2], scale, softcap).mul(1.7).backward()
        plain = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
        logits = F.linear(plain[0], plain[1], plain[2]) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        F.cross_entropy(logits, labels, reduction="sum").mul(1.7).backward()
        for ours_, theirs in zip(leaves, plain, strict=True):
            torch.testing.assert_close(ours_.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    frozen = weight.clone()
    leaf = hidden.clone().requires_grad_()
    chunked_cross_entropy(leaf, frozen, labels, None).backward()
    assert frozen.grad is None and leaf.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_names_lead_from_files_to_the_model_and_blocks_are_found(kind, tmp_path):
    from safetensors import safe_open

    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = hf_model_config(theirs.config.to_dict(), 1, "here")
    found = names_in_folder(config, given)
    parameters = dict(theirs.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(torch.equal(given[name], parameters[ours_]) for ours_, name in found.items())
    prefix = blocks_prefix(parameters, BLOCKS)
    assert {block_of(name, prefix) for name in parameters} == {None, *range(BLOCKS)}
    with pytest.raises(ConfigError, match="no place for"):
        names_in_folder(config, {*given, "model.something.weight"})
    with pytest.raises(ConfigError, match="missing"):
        names_in_folder(config, list(given)[1:])


def test_dropout_is_the_runs_own_and_refused_where_an_architecture_has_none():
    config = hf_model_config(reference("opt").config.to_dict(), 1, "here")
    assert (transformers_config(config).dropout, transformers_config(config).layerdrop) == (0.0, 0.0)
    some = config.model_copy(update={"dropout": Dropout(residual=0.25, attention=0.5)})
    assert (transformers_config(some).dropout, transformers_config(some).attention_dropout) == (0.25, 0.5)
    llama = hf_model_config(reference("llama").config.to_dict(), 1, "here")
    with pytest.raises(ConfigError, match="no such dropout"):
        transformers_config(llama.model_copy(update={"dropout": Dropout(residual=0.1)}))


@pytest.mark.parametrize(
    "kind, place, theirs",
    [("mistral", "attention", "attention_dropout"), ("opt", "attention", "attention_dropout"), ("opt", "residual", "dropout"),
     ("gpt_neox", "residual", "hidden_dropout"), ("phi", "embedding", "embd_pdrop"), ("phi", "residual", "resid_pdrop")],
)  # fmt: skip
def test_dropout_zeroes_in_training_what_transformers_zeroes(kind, place, theirs):
    plain = reference(kind)
    dropping = reference(kind, **{theirs: 0.3}).train()
    dropping.load_state_dict(plain.state_dict())
    model = ours(plain, dropout=Dropout(**{place: 0.3}))
    ids, labels = (torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(n)) for n in (1, 2))

    def loss(model, seed):
        torch.manual_seed(seed)
        return float(F.cross_entropy(model(ids).logits[0], labels[0], reduction="sum"))

    def our_loss(seed):
        torch.manual_seed(seed)
        return float(model(ids, labels=labels).detach())

    assert model.train() and our_loss(5) != our_loss(6), "the usual way to attend too"
    choose_attention(model.eval(), "eager")
    assert our_loss(5) == our_loss(6) == pytest.approx(loss(plain, 5), rel=1e-5), "none in evaluation"
    model.train()
    assert our_loss(5) == pytest.approx(loss(dropping, 5), rel=1e-5)
    assert our_loss(6) == pytest.approx(loss(dropping, 6), rel=1e-5) != our_loss(5)


def test_constants_are_exact_where_the_model_is_built_in_16_bits():
    theirs = reference("mistral")
    config = hf_model_config(theirs.config.to_dict(), 1, "here")
    found = constants(config)
    assert torch.equal(found["model.rotary_emb.inv_freq"], theirs.model.rotary_emb.inv_freq)
    assert found["model.rotary_emb.inv_freq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "never_heard_of"}, "no causal language model"),
        ({"model_type": "mistral", "hidden_size": "wide"}, "incomplete or damaged"),
    ],
)
def test_what_transformers_cannot_train_is_refused(raw, what):
    with pytest.raises(ConfigError, match=what):
        hf_model_config(raw, 1, "here")
