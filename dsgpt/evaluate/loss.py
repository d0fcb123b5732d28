"""Evaluation: mean loss in nats per token, perplexity and bits per byte, over a prepared split or over text files.

    dsgpt evaluate runs/my-run --text notes.txt

Bits per byte do not depend on the tokenizer, so they compare models; they are the loss of all of a text's tokens in bits,
divided by its UTF-8 bytes. A document starts with BOS where the tokenizer has one, so every byte is predicted.
Trade-off: text is cut into windows of the model's context without overlap, which is fast and slightly pessimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dsgpt.config import ModelConfig
from dsgpt.data.dataset import BlockDataset, Samples, read_samples
from dsgpt.data.foreign import find_manifest, is_foreign
from dsgpt.data.mixture import open_samples
from dsgpt.distributed import World
from dsgpt.errors import DataError
from dsgpt.model.functional import IGNORE_INDEX
from dsgpt.model.gpt import GPT, PADDING
from dsgpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsgpt.engine import DividedModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token, over `tokens` target tokens; `bits_per_byte` over the UTF-8 text they encode, not a number
    where its size is not known."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has null for what is no number."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def summarise(loss_sum: float, tokens: int, text_bytes: float) -> Evaluation:
    """`text_bytes` is the text behind the `tokens` targets. Raises DataError where there is nothing to evaluate."""
    if not tokens or text_bytes == 0:
        raise DataError("nothing to evaluate", seen=f"{tokens} tokens, {text_bytes:.0f} bytes", do="give more text")
    loss = loss_sum / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, loss_sum / math.log(2) / text_bytes, tokens)


def pool(parts: Sequence[Evaluation]) -> Evaluation:
    """Of several sets as if they were one: the mean over all their tokens."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    sums = [part.loss * part.tokens for part in parts]
    # What bits per byte divided by; a set of loss 0 has no bits to tell it from.
    sizes = [
        total / math.log(2) / part.bits_per_byte if total else math.nan for total, part in zip(sums, parts, strict=True)
    ]
    return summarise(sum(sums), tokens, sum(sizes))


def to_tensors(arrays: dict[str, np.ndarray], device: torch.device) -> Batch:
    """A collated batch on the device. Document ids are left out where every row is one document without padding: the
    attention kernel without a mask is faster and computes the same."""
    documents = arrays["document_ids"]
    if (documents == documents[:, :1]).all() and (documents != PADDING).all():
        arrays = {name: value for name, value in arrays.items() if name != "document_ids"}
    return {name: torch.from_numpy(np.ascontiguousarray(v)).to(device, non_blocking=True) for name, v in arrays.items()}


def evaluate_split(
    loss_of: Callable[[Batch], Tensor], dataset: Samples, world: World, micro_batch: int, limit: int | None
) -> Evaluation:
    """Evaluate the first `limit` samples of a split on all ranks; a collective with the same result everywhere.

    `loss_of` gives the summed loss of a batch.
    """
    if dataset.num_samples == 0:
        raise DataError(
            "the split is shorter than one sequence", do="set more text aside, or lower training.seq_length"
        )
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for arrays in _rank_batches(dataset, world, micro_batch, limit):
        tokens += int((arrays["labels"] != IGNORE_INDEX).sum())
        loss += float(loss_of(to_tensors(arrays, world.device)))
    total_loss, total_tokens = world.sum(float(loss), tokens)
    return summarise(total_loss, int(total_tokens), _text_bytes(dataset, total_tokens))


def _text_bytes(dataset: Samples, targets: float) -> float:
    """The bytes behind so many targets, taken as their share of the split's, because blocks end in the middle of documents.

    Not a number of chats, of which only a part is a target, and of files that do not say how much text they hold.
    """
    if not isinstance(dataset, BlockDataset):
        return math.nan
    split = dataset.manifest.splits[dataset.split]
    return split.text_bytes * targets / max(1, split.tokens - split.documents) or math.nan


def _rank_batches(
    dataset: Samples, world: World, micro_batch: int, limit: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """This rank's share, in batches; every rank gets equally many (ZeRO-3 needs that), surplus rows fully masked."""
    total = dataset.num_samples if limit is None else min(limit, dataset.num_samples)
    for start in range(0, total, world.size * micro_batch):
        first = start + world.rank * micro_batch
        ids = np.arange(first, first + micro_batch)
        arrays = read_samples(dataset, np.minimum(ids, total - 1))
        surplus = ids >= total
        arrays["labels"] = np.where(surplus[:, None], IGNORE_INDEX, arrays["labels"])
        yield arrays


def open_split(folder: Path, split: str, config: ModelConfig, tokenizer: Tokenizer) -> Samples:
    """One split of a prepared dataset, in samples of the model's context.

    Raises DataError when the dataset's tokenizer is not the model's or the split is not there. What does not say which
    tokenizer made it is taken to be the model's.
    """
    manifest = find_manifest(folder)
    dataset = open_samples(folder, manifest, split, config.max_position_embeddings, vocab_size=config.vocab_size)
    theirs = manifest.tokenizer.sha256
    if not is_foreign(manifest) and theirs != tokenizer.sha256:
        raise DataError(
            "the dataset was made with another tokenizer than the model's",
            seen=f"dataset {theirs[:12]}, model {tokenizer.sha256[:12]}",
            do="prepare the text again with the model's tokenizer",
        )
    return dataset


def evaluate_dataset(
    model: Any, tokenizer: Tokenizer, folder: Path, split: str, limit: int | None = None, micro_batch: int = 8
) -> Evaluation:
    """One split of a prepared dataset, on one device.

    Raises DataError as `open_split`, and ConfigError where the model cannot keep documents in one row apart.
    """
    dataset = open_split(folder, split, model.config, tokenizer)
    model.eval()
    world = World(device=next(model.parameters()).device)
    if not isinstance(model, GPT):
        from dsgpt.model.hf import check_forward

        check_forward(model, model.config.vocab_size, world.device)  # keeps documents apart
    with torch.no_grad():
        return evaluate_split(lambda batch: model(**batch), dataset, world, micro_batch, limit)


def evaluate_divided(
    model: DividedModel, tokenizer: Tokenizer, folder: Path, split: str, limit: int | None, micro_batch: int
) -> Evaluation:
    """The same of a model that is divided over ranks; a collective with the same result everywhere."""
    dataset = open_split(folder, split, model.config, tokenizer)
    if not isinstance(model.module, GPT):
        from dsgpt.model.hf import check_forward

        check_forward(model.module, model.config.vocab_size, model.world.device)
    return evaluate_split(model.evaluate, dataset, model.world, micro_batch, limit)


@torch.no_grad()
def evaluate_texts(model: Any, tokenizer: Tokenizer, texts: Iterable[str], micro_batch: int = 8) -> Evaluation:
    """Every token of every text, each text one document, in windows of the model's context."""
    context = model.config.max_position_embeddings
    model.eval()
    device = next(model.parameters()).device
    loss, tokens, text_bytes = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode_document(text)
        text_bytes += len(text.encode("utf-8", errors="replace"))
        for windows in _batches(ids, context, micro_batch):
            batch = torch.tensor(windows, device=device)
            loss += float(model(batch[:, :-1], labels=batch[:, 1:].contiguous()))
            tokens += batch[:, 1:].numel()
    return summarise(loss, tokens, text_bytes)


def _batches(ids: Sequence[int], context: int, micro_batch: int) -> Iterator[list[list[int]]]:
    """Windows of context + 1 ids that overlap by one, so that each id but the first is a target once; the shorter last
    window in a batch of its own."""
    windows = [list(ids[start : start + context + 1]) for start in range(0, max(0, len(ids) - 1), context)]
    whole = [window for window in windows if len(window) == context + 1]
    for start in range(0, len(whole), micro_batch):
        yield whole[start : start + micro_batch]
    if len(windows) > len(whole):
        yield [windows[-1]]
