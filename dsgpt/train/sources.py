"""Which data a run trains on and is evaluated on: found, compared and counted, before anything is opened for reading.

What is wrong with any source is said here, on every rank alike. Torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsgpt.config import RunConfig
from dsgpt.config.schema import ValidationSource
from dsgpt.data.dataset import Samples
from dsgpt.data.foreign import UNKNOWN, find_manifest, is_foreign
from dsgpt.data.manifest import DatasetManifest, TokenizerRecord
from dsgpt.data.mixture import SLOTS, open_samples, share_slots
from dsgpt.errors import DataError
from dsgpt.units import format_count

__all__ = ["UNKNOWN", "RunData", "Source", "find_data", "tokenizer_record"]


@dataclass(frozen=True)
class Source:
    """One split that is read. `fingerprint` identifies what its order is keyed with, `num_samples` are its sequences."""

    name: str
    path: Path
    split: str
    manifest: DatasetManifest
    num_samples: int
    fingerprint: str
    opened: Samples | None = None

    def open(self, config: RunConfig, vocab_size: int) -> Samples:
        """The samples; `vocab_size` is the model's."""
        if self.opened is not None:
            return self.opened
        length, mask = config.training.seq_length, config.data.document_mask
        return open_samples(self.path, self.manifest, self.split, length, mask, vocab_size)


@dataclass(frozen=True)
class RunData:
    """Everything a run reads. `slots` are the weights of the sources (dsgpt.data.mixture).

    `samples_per_epoch` is one pass over each source, or as many as it is given `epochs`. `tokenizer` is the one that all
    sources were made with and `tokenizer_folder` its files; None where nothing says which that was.
    """

    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    slots: tuple[int, ...]
    samples_per_epoch: int
    tokenizer: TokenizerRecord | None
    tokenizer_folder: Path | None

    @property
    def foreign(self) -> list[str]:
        """The sources that do not say which tokenizer made them."""
        return [str(one.path) for one in (*self.train, *self.validation) if is_foreign(one.manifest)]

    def describe(self, run_samples: int) -> list[str]:
        """A line for each source: its share, and how often a run of so many samples passes it."""
        return [
            f"data       {100 * slots / SLOTS:.4g} % {source.path}: {run_samples * slots / SLOTS / source.num_samples:.2f} "
            f"passes over {format_count(source.num_samples)} sequences"
            for source, slots in zip(self.train, self.slots, strict=True)
        ]


def find_data(config: RunConfig) -> RunData:
    """Find every source. Raises DataError where one is missing, too short, named twice, or of another tokenizer."""
    entries = config.data.train
    train = tuple(_source(config, entry.path, "train") for entry in entries)
    _refuse_twins(train)
    validation = _validation(config, train)
    known = [one for one in (*train, *validation) if not is_foreign(one.manifest)]
    _require_one_tokenizer(known)
    if known:
        # That of chats holds their template too.
        made = next((one for one in known if one.manifest.kind == "chat"), known[0])
        tokenizer: TokenizerRecord | None = made.manifest.tokenizer
        folder: Path | None = made.path / made.manifest.tokenizer.path
    else:
        folder = config.tokenizer.path
        tokenizer = tokenizer_record(folder) if folder else None
    passes = [(entry.epochs or 1.0) * one.num_samples for entry, one in zip(entries, train, strict=True)]
    weights = passes if entries[0].epochs else [entry.weight for entry in entries]
    return RunData(train, validation, share_slots(weights), math.ceil(sum(passes)), tokenizer, folder)


def tokenizer_record(folder: Path) -> TokenizerRecord:
    """What a dataset.json would say of a tokenizer folder."""
    from dsgpt.tokenizer.tokenizer import Tokenizer

    found = Tokenizer.load(folder)
    return TokenizerRecord(
        path="", sha256=found.sha256, vocab_size=found.vocab_size, bos_id=found.bos_id, eos_id=found.eos_id
    )


def _source(config: RunConfig, written: Path, split: str, name: str | None = None) -> Source:
    path = _dataset_path(config, written)
    manifest = find_manifest(path)
    if split == "":  # a dataset for validation serves whole where none of it was set aside
        split = "validation" if "validation" in manifest.splits else "train"
    found, length = manifest.splits.get(split), config.training.seq_length
    name = name or path.name
    if manifest.kind == "chat":
        opened = open_samples(path, manifest, split, length)
        return Source(name, path, split, manifest, opened.num_samples, opened.fingerprint, opened)
    num_samples = (found.tokens - 1) // length if found else 0
    if num_samples < 1:
        raise DataError(
            f"the split {split!r} is too short for one sequence of {length} tokens",
            seen=f"{path}: {found.tokens if found else 0} tokens",
            do="prepare more text, or lower training.seq_length",
        )
    return Source(name, path, split, manifest, num_samples, manifest.fingerprint)


def _dataset_path(config: RunConfig, path: Path) -> Path:
    """Below data.root where that is set: also a path from another machine, of which the longest end that exists is taken.

    What is found is the right data or none: it is known by its fingerprint. A prefix of Megatron's files exists where its
    index does.
    """
    root = config.data.root
    if root is None or (path.is_absolute() and _exists(path)):
        return path
    if not path.is_absolute():
        return root / path
    ends = (root.joinpath(*path.parts[start:]) for start in range(1, len(path.parts)))
    return next((end for end in ends if _exists(end)), path)


def _exists(path: Path) -> bool:
    return path.exists() or Path(f"{path}.idx").exists()


def _validation(config: RunConfig, train: tuple[Source, ...]) -> tuple[Source, ...]:
    """The sets that are evaluated: those of data.validation, or the validation splits of the training sources."""
    if not config.data.validation:
        there = [one for one in train if "validation" in one.manifest.splits]
        # A split too short for one sequence is no reason not to train, as long as nobody asked for it.
        long = [one for one in there if _long_enough(config, one)]
        names = _distinct_names([one.path for one in long])
        return tuple(_source(config, one.path, "validation", name) for one, name in zip(long, names, strict=True))
    found = tuple(_named(config, entry) for entry in config.data.validation)
    trained = {one.fingerprint for one in train}
    same = [str(one.path) for one in found if one.split == "train" and one.fingerprint in trained]
    if same:
        raise DataError(
            "data.validation names training data, of which nothing was set aside",
            seen=", ".join(same),
            do="prepare it again with --validation, e.g. --validation 0.5%, or name other data",
        )
    return found


def _named(config: RunConfig, entry: ValidationSource) -> Source:
    return _source(config, entry.path, "", entry.name)


def _long_enough(config: RunConfig, source: Source) -> bool:
    return source.manifest.kind == "chat" or source.manifest.splits["validation"].tokens > config.training.seq_length


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = [str(Path(*path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _refuse_twins(train: Sequence[Source]) -> None:
    seen: dict[str, Path] = {}
    for one in train:
        if one.fingerprint in seen:
            raise DataError(
                "data.train names the same data twice",
                seen=f"{seen[one.fingerprint]} and {one.path} hold the same tokens",
                do="name it once; a larger weight reads it more often",
            )
        seen[one.fingerprint] = one.path


def _require_one_tokenizer(known: Sequence[Source]) -> None:
    others = [one for one in known if one.manifest.tokenizer.sha256 != known[0].manifest.tokenizer.sha256]
    if others:
        shown = ", ".join(f"{one.path}: {one.manifest.tokenizer.sha256[:12]}" for one in (known[0], *others))
        role = "validation data was" if others[0].split == "validation" else "sources were"
        raise DataError(
            f"the {role} tokenised with another tokenizer than the training data",
            seen=shown,
            do="prepare it again with the training data's tokenizer",
        )
