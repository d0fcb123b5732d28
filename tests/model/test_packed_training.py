"""Training on packed conversations is training on each of them alone: losses, gradients, and the weights that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsgpt.data.dataset import IGNORED, collate
from dsgpt.data.packing import PackedSamples, pack
from tests.model.test_gpt import KINDS, make
from tests.model.test_hf_format import transformers_model, write_export

CAPACITY = 25  # rows of 24 positions, which is all that the models here have


def samples(vocab_size: int, count: int = 24) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(ids, learned) of conversations of 2 to 25 tokens; the first token of one is no target."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, vocab_size, rng.integers(2, CAPACITY + 1)) for _ in range(count)]
    learned = [rng.random(len(one)) < 0.6 for one in ids]
    for one in learned:
        one[-1] = True
    return ids, learned


def packed(vocab_size: int) -> tuple[PackedSamples, list[np.ndarray], list[np.ndarray]]:
    ids, learned = samples(vocab_size)
    edges = np.cumsum([0, *map(len, ids)])
    packing = pack([len(one) for one in ids], CAPACITY)
    assert len(packing) < len(ids), "nothing would be packed"
    return PackedSamples(np.concatenate(ids), edges, np.concatenate(learned), packing), ids, learned


def batch_of(rows: PackedSamples) -> dict[str, torch.Tensor]:
    batch = collate([rows[i] for i in range(len(rows))])
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def losses_of_rows(logits: torch.Tensor, batch: dict[str, torch.Tensor], rows: PackedSamples) -> dict[int, float]:
    """Sample -> mean loss over its targets."""
    each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
    found = {}
    for row in range(len(rows)):
        for number, sample in enumerate(rows.packing.row(row).tolist()):
            here = (batch["document_ids"][row] == number) & (batch["labels"][row] != IGNORED)
            found[sample] = float(each[row][here].mean())
    return found


def loss_alone(logits: torch.Tensor, ids: torch.Tensor, learned: np.ndarray, reduction: str = "mean") -> torch.Tensor:
    targets = ids[0, 1:].clone()
    targets[torch.from_numpy(~learned[1:])] = IGNORED
    return F.cross_entropy(logits[0], targets, ignore_index=IGNORED, reduction=reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_loss_it_has_alone_here_and_in_transformers(kind, tmp_path):
    model = make(KINDS[kind]).eval()
    write_export(model, tmp_path)
    theirs = transformers_model(tmp_path)
    rows, ids, learned = packed(model.config.vocab_size)
    batch = batch_of(rows)
    with torch.no_grad():
        logits = model(batch["input_ids"], None, batch["position_ids"], batch["document_ids"])
        ours = losses_of_rows(logits, batch, rows)
        # transformers, packed: its documents are kept apart by a mask over (query, key) and by positions.
        same = batch["document_ids"][:, :, None] == batch["document_ids"][:, None, :]
        causal = torch.ones(CAPACITY - 1, CAPACITY - 1, dtype=torch.bool).tril()
        mask = torch.where(same & causal, 0.0, torch.finfo(torch.float32).min)[:, None]
        logits = theirs(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
        theirs_packed = losses_of_rows(logits, batch, rows)
        assert sorted(ours) == list(range(len(ids)))
        for sample, (one, on) in enumerate(zip(ids, learned, strict=True)):
            alone = torch.from_numpy(one)[None]
            expected = float(loss_alone(theirs(alone[:, :-1]).logits, alone, on))
            assert ours[sample] == pytest.approx(expected, rel=1e-5)
            assert theirs_packed[sample] == pytest.approx(expected, rel=1e-5)
            assert float(loss_alone(model(alone[:, :-1]), alone, on)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_rows_gives_the_weights_of_training_on_samples(kind):
    in_rows, alone = make(KINDS[kind], scale=3.0), make(KINDS[kind], scale=3.0)
    rows, ids, learned = packed(in_rows.config.vocab_size)
    batch = batch_of(rows)
    targets = int((batch["labels"] != IGNORED).sum())
    assert targets == sum(int(on[1:].sum()) for on in learned), "packing lost a target"
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (in_rows, alone)]
    for _ in range(3):
        loss = in_rows(batch["input_ids"], batch["labels"], batch["position_ids"], batch["document_ids"]) / targets
        loss.backward()
        total = torch.zeros(())
        for one, on in zip(ids, learned, strict=True):
            tokens = torch.from_numpy(one)[None]
            part = loss_alone(alone(tokens[:, :-1]), tokens, on, "sum") / targets
            part.backward()
            total += part.detach()
        assert float(loss.detach()) == pytest.approx(float(total), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(in_rows.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
