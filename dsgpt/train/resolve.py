"""From a config and the hardware to what will really run: every `auto` filled, every size known, contradictions named.

Used by `dsgpt train` before it starts anything, by `--dry-run`, and again by every worker, which must come to the same
result. Torch is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsgpt.checkpoint import commit
from dsgpt.config import ModelConfig, RunConfig, fill_deepspeed, flatten, to_yaml
from dsgpt.data.manifest import DatasetManifest, load_manifest
from dsgpt.errors import ConfigError, DataError, Problem
from dsgpt.planning import parameter_count, resolve_auto
from dsgpt.units import format_count

EXPORTS = {
    "llama": "Hugging Face llama",
    "qwen3": "Hugging Face qwen3",
    "gpt2": "Hugging Face gpt2",
    "dsgpt": "dsgpt's own format (no Hugging Face architecture has this combination of model settings)",
}
# What makes two starts the same run. Everything else may change when a run is resumed.
IDENTITY_KEYS = ("model", "run.seed", "training.seq_length", "training.global_batch_size", "data.document_mask")


@dataclass(frozen=True)
class ResolvedRun:
    """A run with nothing left to decide. `num_samples` are sequences per epoch of the training split."""

    config: RunConfig
    model: ModelConfig
    deepspeed: dict[str, Any]
    dataset: DatasetManifest
    dataset_path: Path
    validation: tuple[Path, str] | None
    world_size: int
    device: str
    max_steps: int
    num_samples: int
    notes: list[str] = field(default_factory=list)

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.config.training.gradient_accumulation_steps(self.world_size)

    @property
    def output_dir(self) -> Path:
        return self.config.run.output_dir

    def describe(self) -> str:
        """The arithmetic of the run, for people."""
        t = self.config.training
        per_step = t.tokens_per_step
        epochs = self.max_steps * t.global_batch_size / self.num_samples
        return "\n".join(
            (
                f"model      {format_count(parameter_count(self.model))} parameters, {self.model.num_hidden_layers} layers, "
                f"hidden {self.model.hidden_size}, vocabulary {self.model.vocab_size}",
                f"batch      {t.global_batch_size} sequences = {t.micro_batch_size_per_gpu} per rank x {self.world_size} "
                f"ranks x {self.gradient_accumulation_steps} accumulation; x {t.seq_length} tokens = "
                f"{format_count(per_step)} tokens per step",
                f"length     {self.max_steps} steps = {format_count(self.max_steps * per_step)} tokens = {epochs:.2f} epochs "
                f"of {format_count(self.num_samples)} sequences",
                f"exports to {EXPORTS[self.model.export_format]}",
                f"device     {self.device}, {t.dtype}, deepspeed {self.config.deepspeed} (ZeRO "
                f"{self.deepspeed.get('zero_optimization', {}).get('stage', 0)})",
                *self.notes,
            )
        )


def resolve_run(
    config: RunConfig, *, world_size: int, device: str, gpu_memory_bytes: int | None = None, bf16: bool = True
) -> ResolvedRun:
    """Fill everything in. Raises ConfigError or DataError, with all problems of a kind at once."""
    dataset_path = _dataset_path(config, config.data.train[0].path)
    dataset = load_manifest(dataset_path)
    t = config.training
    train = dataset.splits.get("train")
    num_samples = (train.tokens - 1) // t.seq_length if train else 0
    if num_samples < t.global_batch_size:
        raise DataError(
            "the training split is smaller than one global batch",
            seen=f"{dataset_path}: {train.tokens if train else 0} tokens = {num_samples} sequences of {t.seq_length}",
            do=f"prepare more text, or lower training.global_batch_size (now {t.global_batch_size}) or seq_length",
        )
    model = _model_config(config, dataset)
    if model.vocab_size < dataset.tokenizer.vocab_size:
        scratch = config.model.init_from == "scratch"
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's",
            seen=f"model.vocab_size={model.vocab_size}, tokenizer {dataset.tokenizer.vocab_size}",
            do=f"model.vocab_size={dataset.tokenizer.vocab_size}, or leave it out"
            if scratch
            else f"prepare the data with the tokenizer of {config.model.init_from}",
        )
    _check_tokenizer(config, dataset, dataset_path)
    validation = _validation_split(config, dataset_path, dataset)
    config = _with_model(config, model)
    config, notes = resolve_auto(
        config, world_size=world_size, device=device, gpu_memory_bytes=gpu_memory_bytes, bf16=bf16
    )
    config.training.gradient_accumulation_steps(world_size)
    max_steps = config.training.num_steps(num_samples)
    return ResolvedRun(
        config,
        model,
        fill_deepspeed(config, world_size, parameter_count(model)),
        dataset,
        dataset_path,
        validation,
        world_size,
        device,
        max_steps,
        num_samples,
        notes,
    )


def _dataset_path(config: RunConfig, path: Path) -> Path:
    return config.data.root / path if config.data.root and not path.is_absolute() else path


def _validation_split(config: RunConfig, train_path: Path, train: DatasetManifest) -> tuple[Path, str] | None:
    """Which split of which dataset is evaluated, None where there is none. Its tokenizer must be the training data's.

    A dataset named under data.validation serves whole: its validation split, or all of it where it has none.
    """
    if not config.data.validation:
        return (train_path, "validation") if "validation" in train.splits else None
    path = _dataset_path(config, config.data.validation[0].path)
    manifest = load_manifest(path)
    if manifest.tokenizer.sha256 != train.tokenizer.sha256:
        raise DataError(
            "the validation data was tokenised with another tokenizer than the training data",
            seen=f"{path}: {manifest.tokenizer.sha256[:12]}, {train_path}: {train.tokenizer.sha256[:12]}",
            do="prepare it again with the training data's tokenizer",
        )
    return path, "validation" if "validation" in manifest.splits else "train"


def _check_tokenizer(config: RunConfig, dataset: DatasetManifest, dataset_path: Path) -> None:
    """The data's tokenizer must be the one asked for and the one the initial weights were trained with.

    Ids of another tokenizer train without an error, and mean nothing. A Hugging Face folder without tokenizer files
    cannot be compared.
    """
    wanted: list[tuple[str, str]] = []
    if config.tokenizer.path is not None:
        wanted.append((f"tokenizer.path={config.tokenizer.path}", _tokenizer_hash(config.tokenizer.path)))
    origin, _, location = config.model.init_from.partition(":")
    if origin == "checkpoint":
        manifest = commit.read_manifest(_checkpoint_folder(location))
        wanted.append((config.model.init_from, manifest["data"]["tokenizer_sha256"]))
    if origin == "hf" and (Path(location) / "tokenizer.json").exists():
        wanted.append((config.model.init_from, _tokenizer_hash(Path(location))))
    problems = [
        Problem(
            f"the data was made with another tokenizer than {name} has",
            seen=f"{dataset_path}: {dataset.tokenizer.sha256[:12]}, there {found[:12]}",
            do="prepare the data with that tokenizer",
        )
        for name, found in wanted
        if found != dataset.tokenizer.sha256
    ]
    if problems:
        raise ConfigError(problems=problems)


def _tokenizer_hash(folder: Path) -> str:
    from dsgpt.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(folder).sha256


def _checkpoint_folder(location: str) -> Path:
    """A checkpoint, or the newest of a run folder."""
    path = Path(location)
    if (path / commit.MANIFEST).exists():
        return path
    committed = commit.list_committed(path / "checkpoints")
    if not committed:
        raise ConfigError(
            "model.init_from names no checkpoint",
            seen=location,
            do="checkpoint:<run folder> or checkpoint:<its folder>",
        )
    return committed[-1][1]


def _model_config(config: RunConfig, dataset: DatasetManifest) -> ModelConfig:
    """The architecture: written in the config, or read from what init_from names."""
    origin, _, location = config.model.init_from.partition(":")
    if origin == "checkpoint":
        return ModelConfig.model_validate(commit.read_manifest(_checkpoint_folder(location))["model"])
    if origin == "hf":
        from dsgpt.model.hf_import import read_hf_config

        return read_hf_config(location).model_copy(update={"dropout": config.model.dropout})
    return config.model.resolved(dataset.tokenizer.vocab_size, config.training.seq_length)


def _with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    section = config.model.model_copy(update={name: getattr(model, name) for name in ModelConfig.model_fields})
    return config.model_copy(update={"model": section})


def check_same_run(run: ResolvedRun) -> list[str]:
    """Compare with the config.yaml already in the output folder; list harmless differences, refuse identity changes.

    Raises ConfigError when the folder holds another run: other model, seed, data, sequence length or global batch.
    """
    path = run.output_dir / "config.yaml"
    if not path.exists():
        return []
    try:
        before = flatten(yaml.safe_load(path.read_text("utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read",
            seen=str(error),
            do="remove that file: it is written anew from the config you give",
        ) from error
    now = flatten(yaml.safe_load(to_yaml(run.config)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    identity = [key for key in changed if any(key == i or key.startswith(f"{i}.") for i in IDENTITY_KEYS)]
    if identity:
        raise ConfigError(
            problems=[
                Problem(
                    f"{run.output_dir} holds another run: {key} differs",
                    seen=f"there {before.get(key)!r}, now {now.get(key)!r}",
                    do="use another run.output_dir, or the value the run was started with",
                )
                for key in identity
            ]
        )
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]
