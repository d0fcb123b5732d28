"""Conversations as training data: records of any chat format -> ids and a loss mask on disk -> packed blocks.

    dsgpt data prepare-chat dialogues.jsonl --tokenizer DIR --output data/chat --seq-length 1024 --validation 2%
    samples = open_chat("data/chat", "train", seq_length=1024)

    output/    as of dsgpt.data.prepare, and for each shard a .mask: one byte for each token, 1 where it is learned from

The same plan, parts and records as for text, so it goes on after a kill, is shared by tasks, and gives the same bytes for
any number of them. A conversation is a document: it is never cut to fill a row (dsgpt.data.packing). What is left out or
truncated is counted by reason in dataset.json and named in bad_lines.jsonl, as is what cannot be read.

Trade-off: everything is encoded by the reference library, about a megabyte a second and process, because the mask needs to
know where each token stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import tokenizers

from dsgpt.data import manifest as manifests
from dsgpt.data.chat_formats import BadRecord, Conversation, Format, detect, read_conversations
from dsgpt.data.chat_template import ChatTemplate, Encoded, LossOn, Unusable
from dsgpt.data.choices import Choices, Progress, Share, Unfinished
from dsgpt.data.finish import missing_parts, write_dataset
from dsgpt.data.indexed import mask_path
from dsgpt.data.manifest import (
    STATE,
    TOKENIZER,
    DatasetManifest,
    EngineRecord,
    Shard,
    load_manifest,
    write_durably,
)
from dsgpt.data.packing import open_chat
from dsgpt.data.parts import TRAIN, VALIDATION, Part, PartRecord, bad_lines_path, record_path
from dsgpt.data.plan import Plan, adopt_plan
from dsgpt.data.prepare import already_there, kept, locked, plan_sources, run_parts
from dsgpt.data.sources import BadLine, Piece, find_sources, read_records
from dsgpt.data.tokenize_part import BadLineFile, Outputs, Tally, check_times, share_of, source_hashes
from dsgpt.data.workers import Pool
from dsgpt.errors import ConfigError, DataError
from dsgpt.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatChoices", "ChatJob", "encode_part", "open_chat", "prepare_chat"]

TooLong = Literal["drop", "truncate", "refuse"]
_DETECTED_FROM = 1000
_WHY_REFERENCE = "chats need to know where each token stands"


@dataclass(frozen=True)
class ChatChoices:
    """How to prepare conversations.

    format            a name of dsgpt.data.chat_formats.NAMES, or "auto": told from the first thousand records
    fields            of pairs and completions: the names of text and answer; with "auto" they mean pairs
    instruction       put before the text of a pair
    loss_on           "assistant": what assistants say, and what records say of messages; "all": everything
    chat_template     text of a Jinja template, instead of the tokenizer's
    add_tokens        special tokens to add to the tokenizer, where it lacks them: those of the template, say
    seq_length        the T of training, in tokens; a conversation may have T + 1. None: nothing is too long
    too_long          "drop" and count, "truncate" at the end and count, or "refuse" the job
    validation, max_bad_fraction, workers, share, command    as in dsgpt.data.choices.Choices
    """

    format: str = "auto"
    fields: tuple[str, str] | None = None
    instruction: str = ""
    loss_on: LossOn = "assistant"
    chat_template: str | None = None
    add_tokens: tuple[str, ...] = ()
    seq_length: int | None = None
    too_long: TooLong = "drop"
    validation: float = 0.0
    max_bad_fraction: float = 0.001
    workers: int = 1
    share: Share = field(default_factory=Share)
    command: tuple[str, ...] = ("dsgpt", "data", "prepare-chat")

    def __post_init__(self) -> None:
        Choices(validation=self.validation, max_bad_fraction=self.max_bad_fraction, workers=self.workers)
        if self.seq_length is not None and self.seq_length < 2:
            raise ConfigError("seq_length is too small", seen=str(self.seq_length), do="give the one of training")
        for name, kind in (("loss_on", LossOn), ("too_long", TooLong)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ConfigError(f"{name} is not known", seen=repr(value), do=f"one of {', '.join(get_args(kind))}")

    @property
    def named_format(self) -> Format | None:
        """The format where it need not be told from the records."""
        if self.format == "auto" and self.fields:
            return Format(
                "pairs", self.fields, self.instruction, f"pairs ({self.fields[0]} -> {self.fields[1]}), as named"
            )
        return None if self.format == "auto" else Format(self.format, self.fields, self.instruction)

    def recorded(self, form: Format, template: str) -> dict[str, Any]:
        """What shaped the data, for dataset.json."""
        names = ("loss_on", "seq_length", "too_long", "validation")
        chosen = {name: getattr(self, name) for name in names}
        fields = None if form.fields is None else list(form.fields)
        chosen |= {"format": form.name, "fields": fields, "instruction": form.instruction}
        return chosen | {"chat_template": hashlib.sha256(template.encode()).hexdigest()}


@dataclass(frozen=True)
class ChatJob:
    """What all parts have in common. `tokenizer` is its hash, `chat_template` the text."""

    folder: Path
    dtype: str
    engine: str
    form: Format
    loss_on: LossOn
    tokenizer: str
    chat_template: str
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
    form = choices.named_format
    engine = f"tokenizers {tokenizers.__version__}"
    folder = Path(output)
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    loaded = loaded.with_special_tokens(choices.add_tokens)
    template = ChatTemplate(loaded, choices.chat_template)
    with locked(folder, alone=choices.share.is_all), Pool(choices.workers) as pool:
        paths = find_sources(inputs, exclude=output, spool=folder / STATE if choices.share.is_all else None)
        sources = plan_sources(paths)
        form = form or replace(_detect(sources), instruction=choices.instruction)
        announce(f"format: {form.verdict or form.name}")
        announce(f"chat template: {template.source}; loss on: {choices.loss_on}")
        if pieces := template.pieces:
            announce(
                f"{' and '.join(pieces)} are several tokens each; --add-tokens makes them one each, new to the model"
            )
        plan = Plan(
            format_version=manifests.FORMAT_VERSION,
            sources=sources,
            tokenizer=(loaded.sha256, loaded.bos_id, loaded.eos_id),
            vocab_size=loaded.vocab_size,
            settings=choices.recorded(form, template.text),
            engine=EngineRecord(name=engine, fallback=_WHY_REFERENCE),
            max_bad_fraction=choices.max_bad_fraction,
            command=list(choices.command),
            kind="chat",
        )
        if (folder / manifests.FILE_NAME).exists():
            return already_there(folder, plan, report)
        plan = adopt_plan(folder, plan, loaded)
        if plan.engine.name != engine:
            raise DataError(
                "the conversations would be encoded by another library than the rest of this dataset",
                seen=f"here {engine}, the rest by {plan.engine.name}",
                do="install the same version of tokenizers, or delete the output folder to begin anew",
            )
        limit = None if choices.seq_length is None else choices.seq_length + 1
        job = ChatJob(
            folder, plan.dtype, plan.engine.name, form, choices.loss_on, loaded.sha256, template.text, limit,
            choices.too_long, choices.validation,
        )  # fmt: skip
        try:
            _keep_template(folder, template)
            return _work(job, plan, choices.share, pool, report)
        except FileNotFoundError as error:
            # Another task, which had been given the same parts, has finished the dataset meanwhile.
            with suppress(DataError):
                return load_manifest(folder)
            do = "put it back, and run the same command again"
            raise DataError("a file went away while it was needed", seen=str(error), do=do) from error


def _keep_template(folder: Path, template: ChatTemplate) -> None:
    """A model that is trained on this is talked to by the same template, so it goes with the tokenizer."""
    made = folder / STATE / f"chat_template.{socket.gethostname()}.{os.getpid()}.tmp"
    write_durably(made, template.text)
    os.replace(made, folder / TOKENIZER / "chat_template.jinja")


def _work(
    job: ChatJob, plan: Plan, share: Share, pool: Pool, report: Callable[[Progress], None]
) -> DatasetManifest | Unfinished:
    mine = [part for part in plan.parts if share.takes(part)]
    run_parts(encode_part, job, job.folder, plan, mine, plan.engine, pool, report)
    if missing := missing_parts(job.folder, plan):
        return Unfinished(tuple(missing), plan.command_for(missing))
    with kept(job.folder, len(plan.parts)):
        return write_dataset(job.folder, plan)


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
    template = _template(str(job.folder / TOKENIZER), job.tokenizer, job.chat_template)
    left_out: Counter[str] = Counter()
    records = num_bad = special = 0
    tally, content = Tally(part.num_bytes), hashlib.sha256()
    with (
        BadLineFile(bad_lines_path(job.folder, part.number)) as bad_lines,
        Outputs(job.folder, part.number, job.dtype) as outputs,
        Masks(job.folder, part.number) as masks,
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
            masks.add(split, learned)
            special += found.encoded.special_in_text
            content.update(ids.tobytes())
            tally.add(num_bytes=found.size, documents=1, tokens=len(ids))
        tally.close(num_bad)
    shards = {split: masks.on(split, shard) for split, shard in outputs.shards.items()}
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
def _template(folder: str, sha256: str, template: str) -> ChatTemplate:
    """`sha256` is that of the tokenizer: another one may have been put into the same folder."""
    return ChatTemplate(Tokenizer.load(folder), template)


def _chats(part: Part, template: ChatTemplate, job: ChatJob) -> Iterator[tuple[Piece, int, _Chat | BadLine]]:
    """Every record of a part with its line, encoded, or why it cannot be."""
    for piece in part.pieces:
        for item in read_records(piece):
            if isinstance(item, BadLine):
                yield piece, item.line, item
                continue
            line, record = item
            try:
                found = next(read_conversations([record], job.form))
                if isinstance(found, BadRecord):
                    yield piece, line, BadLine(line, found.reason, found.excerpt)
                else:
                    yield piece, line, _encoded(found, template, job)
            except Unusable as error:
                excerpt = json.dumps(record, ensure_ascii=False, default=str)[:200]
                yield piece, line, BadLine(line, str(error), excerpt)
            except RecursionError:
                yield piece, line, BadLine(line, "it is nested too deeply", "")


def _encoded(chat: Conversation, template: ChatTemplate, job: ChatJob) -> _Chat:
    encoded = template.encode(chat.messages, chat.tools, job.loss_on)
    text = json.dumps([chat.messages, chat.tools], ensure_ascii=False, sort_keys=True, default=str)
    size = sum(len(str(message.get("content") or "").encode("utf-8", "surrogatepass")) for message in chat.messages)
    return _Chat(encoded, size, share_of(text.encode("utf-8", "surrogatepass")))


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


class Masks:
    """Writes the masks of a part as they come; they have their names when the block is left without an error."""

    def __init__(self, folder: Path, number: int):
        self._folder, self._number = folder, number
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {split: hashlib.sha256() for split in (TRAIN, VALIDATION)}
        self._trained = dict.fromkeys((TRAIN, VALIDATION), 0)

    def add(self, split: str, learned: np.ndarray) -> None:
        if split not in self._files:
            self._files[split] = open(self._temporary(split), "wb", buffering=1 << 20)  # noqa: SIM115 (until __exit__)
        raw = learned.astype(np.uint8).tobytes()
        self._files[split].write(raw)
        self._hashes[split].update(raw)
        self._trained[split] += int(np.count_nonzero(learned))

    def on(self, split: str, shard: Shard) -> Shard:
        """The shard, with what is known of its mask."""
        mask = {"sha256_mask": self._hashes[split].hexdigest(), "trained_tokens": self._trained[split]}
        return shard.model_copy(update=mask)

    def _temporary(self, split: str) -> Path:
        return self._folder / STATE / f"{split}-{self._number:05d}.mask.{socket.gethostname()}.{os.getpid()}.tmp"

    def __enter__(self) -> Masks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for split, file in self._files.items():
            with file:
                if kind is None:
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                os.replace(self._temporary(split), mask_path(self._folder / f"{split}-{self._number:05d}"))
            else:
                self._temporary(split).unlink()
