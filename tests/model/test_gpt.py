"""The native GPT against plain PyTorch: loss, gradients, document masks, cached generation, recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsgpt.config import Dropout, ModelConfig
from dsgpt.model import functional
from dsgpt.model.cache import KeyValueCache
from dsgpt.model.gpt import GPT, document_lengths
from dsgpt.model.recompute import apply_activation_checkpointing

BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 24, "dropout": Dropout(),
}  # fmt: skip
LLAMA = ModelConfig(**{**BASE, "num_key_value_heads": 2})
QWEN = ModelConfig(**BASE, qk_norm=True, tie_word_embeddings=False)
GPT2 = ModelConfig(**BASE, norm="layernorm", position_embedding="learned", activation="gelu", bias=True)
KINDS = {"llama": LLAMA, "qwen3": QWEN, "gpt2": GPT2}


def make(config, seed=0, scale=10.0):
    """A model with weights large enough that logits spread: near-zero logits would hide mistakes."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.02 * scale if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return model


def ids_and_labels(config, batch=3, length=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100
    return ids[:, :-1], labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [64, 10**9])
def test_chunked_loss_and_gradients_equal_plain_cross_entropy(kind, elements, monkeypatch):
    monkeypatch.setitem(functional._LOGIT_CHUNK_ELEMENTS, "cpu", elements)
    config = KINDS[kind]
    ids, labels = ids_and_labels(config, batch=8)
    chunked, plain = make(config), make(config)
    loss = chunked(ids, labels=labels)
    (2.5 * loss).backward()
    logits = plain(ids)
    assert logits.std() > 1
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), theirs in zip(chunked.named_parameters(), plain.parameters(), strict=True):
        if name.endswith("k_proj.bias"):
            continue  # it shifts all scores of a query alike: its true gradient is 0, what is left is rounding
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-6, (name, error)  # rounding of the layers below comes on top of the loss's own


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_compute_what_they_compute_alone(kind):
    config = KINDS[kind]
    model = make(config).eval()
    ids, _ = ids_and_labels(config, batch=1)
    cut = 7
    positions = torch.cat((torch.arange(cut), torch.arange(20 - cut)))[None]
    documents = (torch.arange(20) >= cut).int()[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, document_ids=documents)
        torch.testing.assert_close(packed[:, :cut], model(ids[:, :cut]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed[:, cut:], model(ids[:, cut:]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(packed[:, cut:], model(ids)[:, cut:], atol=1e-2)


def test_a_document_ends_with_its_row_and_padding_is_one():
    documents = torch.tensor([[0, 0, 1, 1], [1, 2, 2, -1], [0, 0, 0, 0]])
    assert document_lengths(documents) == [2, 2, 1, 2, 1, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_give_the_logits_of_one_pass(kind):
    model = make(KINDS[kind]).eval()
    ids, _ = ids_and_labels(KINDS[kind])
    with torch.no_grad():
        whole, cache = model(ids), KeyValueCache()
        pieces = [model(part, cache=cache) for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:12], ids[:, 12:])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_gradients_with_dropout_on(kind, mode):
    config = KINDS[kind].model_copy(update={"dropout": Dropout(embedding=0.1, attention=0.1, residual=0.1)})
    ids, labels = ids_and_labels(config)
    gradients = []
    for recompute in (False, True):
        model = make(config)
        apply_activation_checkpointing(model.blocks, mode if recompute else "none")
        torch.manual_seed(3)
        model(ids, labels=labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
def test_each_dropout_drops_its_share_in_training_and_nothing_in_evaluation(place):
    """One token per sequence: its attention weight is 1, so a dropped one leaves a head's output 0."""
    config = LLAMA.model_copy(update={"dropout": Dropout(**{place: 0.3})})
    model = make(config)
    ids = torch.randint(config.vocab_size, (500, 1), generator=torch.Generator().manual_seed(0))
    zeros = {}

    def count(name):
        return lambda module, arguments, *rest: zeros.update({name: float((rest or arguments)[0].eq(0).float().mean())})

    model.dropout.register_forward_hook(count("embedding"))
    model.blocks[1].attention.o_proj.register_forward_pre_hook(count("attention"))
    model.blocks[1].dropout.register_forward_hook(count("residual"))
    torch.manual_seed(1)
    first = model(ids)
    for name, share in zeros.items():
        assert share == pytest.approx(0.3 if name == place else 0.0, abs=0.03), name
    assert not torch.equal(model(ids), first)
    model.eval()
    assert torch.equal(model(ids), model(ids)) and not any(zeros.values())
