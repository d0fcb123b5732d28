"""Conversations as training data: records of any chat format -> ids and a loss mask on disk -> packed blocks.

    dsgpt data prepare-chat dialogues.jsonl --tokenizer DIR --output data/chat --seq-length 1024 --validation 2%
    samples = open_chat("data/chat", "train", seq_length=1024)

    output/    as of dsgpt.data.prepare, and for each shard a .mask: one byte for each token, 1 where it is learned from

The same plan, parts and records as for text, so it goes on after a kill, is shared by tasks, and gives the same bytes for
any number of them. A conversation is a document: it is never cut to fill a row (dsgpt.data.packing). What is left out is
counted by reason in dataset.json, and named in bad_lines.jsonl where it could not be read. Trade-off: everything is encoded
by the reference library, about a megabyte a second and process, because the mask needs to know where each token stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from dsgpt.data import manifest as manifests
from dsgpt.data.chat_formats import BadRecord, Conversation, Format, detect, read_conversations
from dsgpt.data.chat_template import ChatTemplate, Encoded, LossOn, Unusable
from dsgpt.data.choices import Progress, Share, Unfinished
from dsgpt.data.finish import missing_parts, write_dataset
from dsgpt.data.indexed import IndexedReader, mask_path
from dsgpt.data.manifest import (
    DatasetManifest,
    EngineRecord,
    Shard,
    load_manifest,
    write_bytes_durably,
    write_durably,
)
from dsgpt.data.packing import PackedSamples, pack
from dsgpt.data.parts import STATE, TOKENIZER, TRAIN, VALIDATION, Part, PartRecord, bad_lines_path, record_path
from dsgpt.data.plan import Plan, adopt_plan
from dsgpt.data.prepare import already_there, kept, locked, plan_sources, run_parts
from dsgpt.data.sources import BadLine, Piece, find_sources, read_records
from dsgpt.data.tokenize_part import BadLineFile, Outputs, Tally, check_times, share_of, source_hashes
from dsgpt.data.workers import Pool
from dsgpt.errors import ConfigError, DataError
from dsgpt.tokenizer.tokenizer import Tokenizer

TooLong = Literal["drop", "truncate", "refuse"]
_DETECTED_FROM = 1000
_WHY_REFERENCE = "chats need to know where each token stands"


@dataclass(frozen=True)
class ChatChoices:
    """How to prepare conversations.

    format            a name of dsgpt.data.chat_formats.NAMES, or "auto": told from the first thousand records
    fields            of pairs and completions: the names of text and answer
    instruction       put before the text of a pair
    loss_on           "assistant": what assistants say, and what records say of messages; "all": everything
    chat_template     text of a Jinja template, instead of the tokenizer's
    seq_length        the T of training, in tokens; a conversation may have T + 1. None: nothing is too long
    too_long          "drop" and count, "truncate" at the end and count, or "refuse" the job
    validation, max_bad_fraction, workers, share, command    as in dsgpt.data.choices.Choices
    """

    format: str = "auto"
    fields: tuple[str, str] | None = None
    instruction: str = ""
    loss_on: LossOn = "assistant"
    chat_template: str | None = None
    seq_length: int | None = None
    too_long: TooLong = "drop"
    validation: float = 0.0
    max_bad_fraction: float = 0.001
    workers: int = 1
    share: Share = field(default_factory=Share)
    command: tuple[str, ...] = ("dsgpt", "data", "prepare-chat")

    def recorded(self, form: Format) -> dict[str, Any]:
        """What shaped the data, for dataset.json."""
        template = None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()
        names = ("loss_on", "seq_length", "too_long", "validation")
        chosen = {name: getattr(self, name) for name in names}
        fields = None if form.fields is None else list(form.fields)
        chosen |= {"format": form.name, "fields": fields, "instruction": form.instruction, "chat_template": template}
        return chosen


@dataclass(frozen=True)
class ChatJob:
    """What all parts have in common."""

    folder: Path
    dtype: str
    engine: str
    form: Format
    loss_on: LossOn
    chat_template: str | None
    limit: int | None
    too_long: TooLong
    validation: float


def prepare_chat(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    choices: ChatChoices | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
) -> DatasetManifest | Unfinished:
    """Make the chat dataset `output`, or this call's share of it. `announce` is told format and template, in words.

    Raises as dsgpt.data.prepare.prepare, and DataError where the format cannot be told or a template is none.
    """
    choices = choices or ChatChoices()
    if choices.seq_length is not None and choices.seq_length < 2:
        raise ConfigError("seq_length is too small", seen=str(choices.seq_length), do="give the one of training")
    folder = Path(output)
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    with locked(folder, alone=choices.share.is_all), Pool(choices.workers) as pool:
        paths = find_sources(inputs, exclude=output, spool=folder / STATE if choices.share.is_all else None)
        sources = plan_sources(paths)
        form = (
            Format(choices.format, choices.fields, choices.instruction)
            if choices.format != "auto"
            else _detect(sources)
        )
        if choices.format == "auto" and (choices.fields or choices.instruction):
            form = Format(form.name, choices.fields or form.fields, choices.instruction, form.verdict)
        announce(f"format: {form.verdict or form.name}")
        announce(f"chat template: {ChatTemplate(loaded, choices.chat_template).source}; loss on: {choices.loss_on}")
        plan = Plan(
            format_version=manifests.FORMAT_VERSION,
            sources=sources,
            tokenizer=(loaded.sha256, loaded.bos_id, loaded.eos_id),
            vocab_size=loaded.vocab_size,
            settings=choices.recorded(form),
            engine=EngineRecord(name=f"tokenizers {tokenizers.__version__}", fallback=_WHY_REFERENCE),
            max_bad_fraction=choices.max_bad_fraction,
            command=list(choices.command),
            kind="chat",
        )
        if (folder / manifests.FILE_NAME).exists():
            return already_there(folder, plan, report)
        plan = adopt_plan(folder, plan, loaded)
        limit = None if choices.seq_length is None else choices.seq_length + 1
        job = ChatJob(
            folder, plan.dtype, plan.engine.name, form, choices.loss_on, choices.chat_template, limit, choices.too_long,
            choices.validation,
        )  # fmt: skip
        mine = [part for part in plan.parts if choices.share.takes(part)]
        run_parts(encode_part, job, folder, plan, mine, plan.engine, pool, report)
        if missing := missing_parts(folder, plan):
            return Unfinished(tuple(missing), plan.command_for(missing))
        with kept(folder, len(plan.parts)):
            return write_dataset(folder, plan)


def _detect(sources: Sequence[Any]) -> Format:
    """From the first records of all sources, as many of each."""
    share = max(1, _DETECTED_FROM // len(sources))
    records: list[Any] = []
    for source in sources[:_DETECTED_FROM]:
        found = (item for item in read_records(Piece(source.path, 0, source.stop)) if not isinstance(item, BadLine))
        records += [record for _, record in islice(found, share)]
    return detect(records)


@dataclass(frozen=True)
class _Chat:
    """An encoded conversation, the size of its text in bytes, and its place among all for the validation split."""

    encoded: Encoded
    size: int
    share: float


def encode_part(part: Part, job: ChatJob, times: dict[str, int]) -> PartRecord:
    """Encode one part into shards and masks; its record is on disk when this returns. As tokenize_part."""
    template = _template(str(job.folder / TOKENIZER), job.chat_template)
    left_out: Counter[str] = Counter()
    records = num_bad = special = 0
    tally, content = Tally(part.num_bytes), hashlib.sha256()
    masks: dict[str, list[np.ndarray]] = {TRAIN: [], VALIDATION: []}
    with (
        BadLineFile(bad_lines_path(job.folder, part.number)) as bad_lines,
        Outputs(job.folder, part.number, job.dtype) as outputs,
    ):
        for piece, line, found in _chats(part, template, job):
            records += 1
            if isinstance(found, BadLine):
                num_bad += 1
                bad_lines.add(piece, found)
                continue
            ids, learned = found.encoded.ids[: job.limit], found.encoded.learned[: job.limit]
            if reason := _reason(found.encoded, learned, job):
                left_out[reason] += 1
                bad_lines.add(piece, BadLine(line, reason, ""))
                if not reason.startswith("truncated"):
                    continue
            split = VALIDATION if found.share < job.validation else TRAIN
            outputs.add(split, ids, np.array([len(ids)]), found.size)
            masks[split].append(learned)
            special += found.encoded.special_in_text
            content.update(ids.tobytes())
            tally.add(num_bytes=found.size, documents=1, tokens=len(ids))
        tally.close(num_bad)
    shards = {split: _with_mask(job.folder, shard, masks[split]) for split, shard in outputs.shards.items()}
    record = PartRecord(
        number=part.number,
        engine=job.engine,
        shards=shards,
        records=records,
        bad_lines=num_bad,
        empty_documents=0,
        left_out=dict(sorted(left_out.items())),
        duplicates=0,
        special_in_text=special,
        hashes=source_hashes(part, content.hexdigest()),
    )
    check_times(times)
    write_durably(record_path(job.folder, part.number), record.model_dump_json())
    return record


@lru_cache(maxsize=1)
def _template(folder: str, template: str | None) -> ChatTemplate:
    return ChatTemplate(Tokenizer.load(folder), template)


def _chats(part: Part, template: ChatTemplate, job: ChatJob) -> Iterator[tuple[Piece, int, _Chat | BadLine]]:
    """Every record of a part with its line, encoded, or why it cannot be."""
    for piece in part.pieces:
        for item in read_records(piece):
            if isinstance(item, BadLine):
                yield piece, item.line, item
                continue
            line, record = item
            found = next(read_conversations([record], job.form))
            if isinstance(found, BadRecord):
                yield piece, line, BadLine(line, found.reason, found.excerpt)
                continue
            try:
                yield piece, line, _encoded(found, template, job)
            except Unusable as error:
                excerpt = json.dumps(record, ensure_ascii=False, default=str)[:200]
                yield piece, line, BadLine(line, str(error), excerpt)


def _encoded(chat: Conversation, template: ChatTemplate, job: ChatJob) -> _Chat:
    encoded = template.encode(chat.messages, chat.tools, job.loss_on)
    utf8 = json.dumps([chat.messages, chat.tools], ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    size = sum(len(str(message.get("content") or "").encode("utf-8", "surrogatepass")) for message in chat.messages)
    return _Chat(encoded, size, share_of(utf8))


def _reason(encoded: Encoded, learned: np.ndarray, job: ChatJob) -> str:
    """Why a conversation is left out, or that it is truncated; "" where it stays whole. The first token is no target."""
    if not encoded.learned[1:].any():
        return "nothing to learn from: no message of it has loss"
    if len(encoded.ids) <= len(learned):
        return ""
    if job.too_long == "refuse":
        raise DataError(
            f"a conversation is longer than {len(learned) - 1} tokens",
            seen=f"{len(encoded.ids)} tokens",
            do="raise --seq-length, or choose --too-long drop or truncate",
        )
    if job.too_long == "drop":
        return "too long"
    return "truncated" if learned[1:].any() else "nothing to learn from once it is truncated"


def _with_mask(folder: Path, shard: Shard, masks: list[np.ndarray]) -> Shard:
    """Write a shard's mask durably; the shard with its hash."""
    raw = np.concatenate(masks).astype(np.uint8).tobytes()
    made = folder / STATE / f"{shard.path}.mask.{socket.gethostname()}.{os.getpid()}.tmp"
    write_bytes_durably(made, raw)
    os.replace(made, mask_path(folder / shard.path))
    return shard.model_copy(update={"sha256_mask": hashlib.sha256(raw).hexdigest(), "trained_tokens": sum(raw)})


class _Joined:
    """Arrays one after another, of which slices are taken that lie in one of them; a map is not copied."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._edges = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, cut: slice) -> np.ndarray:
        number = int(np.searchsorted(self._edges, cut.start, side="right")) - 1
        first = int(self._edges[number])
        return self._arrays[number][cut.start - first : cut.stop - first]


def open_chat(folder: str | Path, split: str, seq_length: int) -> PackedSamples:
    """The packed rows of a split, as blocks of seq_length positions.

    Memory is 12 bytes for each conversation; ids and masks are mapped. Packing takes about a second for a million of them,
    and is the same on every rank. Raises DataError where the split is missing or damaged, and for a conversation longer
    than seq_length + 1.
    """
    manifest = load_manifest(folder)
    root = Path(folder)
    if split not in manifest.splits:
        raise DataError(f"the dataset has no split {split!r}", seen=f"it has: {', '.join(manifest.splits)}")
    readers, masks = [], []
    for shard in manifest.splits[split].shards:
        reader = IndexedReader(root / shard.path)
        try:
            mask = np.memmap(mask_path(root / shard.path), np.uint8, mode="r")
        except (OSError, ValueError) as error:
            do = f"run: dsgpt data verify {folder}"
            raise DataError(
                "a loss mask cannot be read", seen=f"{mask_path(root / shard.path)}: {error}", do=do
            ) from error
        if (reader.num_documents, len(reader.tokens), len(mask)) != (shard.documents, shard.tokens, shard.tokens):
            do = f"run: dsgpt data verify {folder}"
            raise DataError("a shard does not hold what dataset.json says", seen=str(root / shard.path), do=do)
        readers.append(reader)
        masks.append(mask)
    lengths = np.concatenate([np.asarray(reader.lengths, np.int64) for reader in readers])
    edges = np.concatenate(([0], np.cumsum(lengths)))
    packing = pack(lengths, seq_length + 1)
    ids = _Joined([reader.tokens for reader in readers])
    return PackedSamples(ids, edges, _Joined(masks), packing, f"{manifest.fingerprint} {split}")
