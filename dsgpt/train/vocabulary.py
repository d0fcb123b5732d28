"""The data's tokenizer against the model's: the same one, or one with tokens added, for which the model grows.

Ids of another tokenizer train without an error, and mean nothing; so anything else is refused. Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.locate import locate_checkpoint, run_of
from dsgpt.config import HFModelConfig, ModelConfig, RunConfig
from dsgpt.config.model import described_folder
from dsgpt.errors import ConfigError, Problem
from dsgpt.hub import locate_hf
from dsgpt.train.sources import UNKNOWN, RunData, tokenizer_record

_SHOWN = 8


class Origin(NamedTuple):
    """What init_from names, as kind and place; of a run that `continues` its own checkpoints."""

    kind: str
    place: str
    continues: bool

    @property
    def may_grow(self) -> bool:
        """Weights alone are taken from there: a run's whole state belongs to its vocabulary."""
        return self.kind in ("hf", "checkpoint") and not self.continues


def find_origin(config: RunConfig) -> Origin:
    """What a run started from may be gone by the time it continues, so that is not looked at then."""
    kind, _, place = config.model.init_from.partition(":")
    continues = config.resume != "fresh" and bool(commit.list_committed(config.run.output_dir / "checkpoints"))
    if kind != "scratch" and continues:
        return Origin("checkpoint", str(config.run.output_dir), True)
    return Origin(kind, str(locate_hf(place)) if kind == "hf" else place, continues)


def fit_vocabulary(
    config: RunConfig, origin: Origin, model: ModelConfig, data: RunData
) -> tuple[ModelConfig, list[str]]:
    """The model with room for every id of the data, and what there is to say of it. Raises ConfigError.

    A Hugging Face folder without tokenizer files cannot be compared, nor data of which nobody said what made it.
    """
    if data.tokenizer is None:
        return model, []
    ours, problems, added = data.tokenizer, [], list[str]()
    if config.tokenizer.path is not None and tokenizer_record(config.tokenizer.path).sha256 != ours.sha256:
        asked = tokenizer_record(config.tokenizer.path).sha256
        problems.append(_other(data, f"tokenizer.path={config.tokenizer.path}", asked, []))
    sha256, folder = _of_origin(origin)
    if sha256 not in (None, UNKNOWN, ours.sha256):
        added, differences = _compare(folder, data) if origin.may_grow and folder else ([], [])
        if differences or not added:
            problems.append(_other(data, config.model.init_from, str(sha256), differences))
    if problems:
        raise ConfigError(problems=problems)
    shown = ", ".join(map(repr, added[:_SHOWN])) + (", ..." if len(added) > _SHOWN else "")
    tokens = f"the data's tokenizer has {len(added)} tokens more than the model's ({shown})"
    if ours.vocab_size <= model.vocab_size:
        room = f"{tokens}: they take rows that the model's {model.vocab_size} have room for, untrained so far"
        return model, [f"vocabulary {room}"] if added else []
    if not origin.may_grow or sha256 in (None, UNKNOWN):
        scratch = origin.kind == "scratch"
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's",
            seen=f"model.vocab_size={model.vocab_size}, tokenizer {ours.vocab_size}",
            do=f"model.vocab_size={ours.vocab_size}, or leave it out"
            if scratch
            else f"prepare the data with the tokenizer of {config.model.init_from}",
        )
    why = tokens if added else "the tokenizer there has more tokens than the model"
    note = f"vocabulary grows from {model.vocab_size} to {ours.vocab_size}: {why}; new rows begin as the mean of all"
    return _grown(model, ours.vocab_size), [note]


def _of_origin(origin: Origin) -> tuple[str | None, Path | None]:
    """(hash, folder) of the tokenizer that the initial weights were trained with, None where not known."""
    if origin.kind in ("checkpoint", "fork"):
        checkpoint = locate_checkpoint(origin.place)
        folder = run_of(checkpoint) / "tokenizer"
        return commit.read_manifest(checkpoint)["data"]["tokenizer_sha256"], folder if folder.is_dir() else None
    place = Path(origin.place)
    folder = (described_folder(place) if origin.kind == "deepspeed" else None) or place
    if origin.kind in ("hf", "deepspeed") and (folder / "tokenizer.json").exists():
        return tokenizer_record(folder).sha256, folder
    return None, None


def _compare(folder: Path, data: RunData) -> tuple[list[str], list[str]]:
    from dsgpt.tokenizer.extension import extension
    from dsgpt.tokenizer.tokenizer import Tokenizer

    assert data.tokenizer_folder is not None
    return extension(Tokenizer.load(folder), Tokenizer.load(data.tokenizer_folder))


def _other(data: RunData, name: str, found: str, differences: list[str]) -> Problem:
    assert data.tokenizer is not None
    why = f" ({'; '.join(differences)})" if differences else ""
    return Problem(
        f"the data was made with another tokenizer than {name} has",
        seen=f"{data.train[0].path}: {data.tokenizer.sha256[:12]}, there {found[:12]}{why}",
        do="prepare the data with that tokenizer",
    )


def _grown(model: ModelConfig, vocab_size: int) -> ModelConfig:
    changes = {"vocab_size": vocab_size}
    if isinstance(model, HFModelConfig):
        matrices = 1 if model.tie_word_embeddings else 2
        more = matrices * (vocab_size - model.vocab_size) * model.hidden_size
        changes["num_parameters"] = model.num_parameters + more
    return model.model_copy(update=changes)
