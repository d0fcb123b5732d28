"""What can be chosen for a preparation, and what it says while it runs and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsgpt.data.filters import Filters
from dsgpt.data.parts import Part, Settings
from dsgpt.data.sources import DOCUMENTS, Documents
from dsgpt.data.workers import Counts
from dsgpt.errors import ConfigError


@dataclass(frozen=True)
class Progress:
    """How far a preparation is. `done` includes what an earlier start finished, `resumed_bytes` of it."""

    phase: Literal["compare", "tokenize"]
    total_bytes: int
    done: Counts
    resumed_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """The parts a task does: those with number % count == index, or just the ones that are named."""

    index: int = 0
    count: int = 1
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError("not a shard", seen=f"{self.index}/{self.count}", do="i/n with i from 0 to n - 1")

    @property
    def is_all(self) -> bool:
        return self.count == 1 and not self.parts

    def takes(self, part: Part) -> bool:
        return part.number in self.parts if self.parts else part.number % self.count == self.index


@dataclass(frozen=True)
class Unfinished:
    """A task has done its parts and others are missing: `missing` of them, or, with `hashed`, they are not hashed yet."""

    missing: tuple[int, ...]
    command: str
    hashed: bool = False


@dataclass(frozen=True)
class Choices:
    """How to prepare. What decides the output comes first; none of the rest does.

    validation        share of the documents, in [0, 1), set aside as the split "validation" by the hash of their text
    text_field        the field that holds a record's text, or a template such as "{title}\\n\\n{body}"
    documents         what is a document in plain text: the file, what blank lines separate, or each line
    filters           documents to leave out
    deduplicate       leave out documents that equal an earlier one
    max_bad_fraction  highest share of records that may be unreadable
    workers           processes that read and tokenise; 1 works in this process
    engine            "reference" encodes with the slow library of the tokenizer alone
    share             of all parts those that this call does
    command           words that repeat this call, for messages
    """

    validation: float = 0.0
    text_field: str = "text"
    documents: Documents = "file"
    filters: Filters = field(default_factory=Filters)
    deduplicate: bool = False
    max_bad_fraction: float = 0.001
    workers: int = 1
    engine: Literal["auto", "reference"] = "auto"
    share: Share = field(default_factory=Share)
    command: tuple[str, ...] = ("dsgpt", "data", "prepare")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError("workers must be at least 1", seen=str(self.workers), do="give the number of processes")
        if not 0 <= self.validation < 1:
            seen, do = str(self.validation), "e.g. 0.005 for half a percent"
            raise ConfigError("validation is a share in [0, 1)", seen=seen, do=do)
        if self.documents not in DOCUMENTS:
            seen, do = repr(self.documents), f"one of {', '.join(DOCUMENTS)}"
            raise ConfigError("documents is not known", seen=seen, do=do)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError("max_bad_fraction is a share in [0, 1]", seen=str(self.max_bad_fraction), do="e.g. 0.001")

    @property
    def settings(self) -> Settings:
        return Settings(self.text_field, self.documents, self.validation, self.filters, self.deduplicate)
