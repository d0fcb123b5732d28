"""From a config and the hardware to what will really run: every `auto` filled, every size known, contradictions named.

Used by `dsgpt train` before it starts anything, by `--dry-run`, and again by every worker, which must come to the same
result. Torch is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.config import ModelConfig, RunConfig, fill_deepspeed
from dsgpt.data.manifest import DatasetManifest, load_manifest
from dsgpt.errors import ConfigError, DataError, Problem
from dsgpt.planning import activation_bytes, parameter_count, resolve_auto, state_bytes
from dsgpt.units import format_bytes, format_count

EXPORTS = {
    "llama": "Hugging Face llama",
    "qwen3": "Hugging Face qwen3",
    "gpt2": "Hugging Face gpt2",
    "dsgpt": "dsgpt's own format (no Hugging Face architecture has this combination of model settings)",
}


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

    def memory_text(self) -> str:
        """What one rank was planned to need: the estimates of planning.py, for reports of running out of memory."""
        t = self.config.training
        if t.micro_batch_size_per_gpu == "auto" or t.activation_checkpointing == "auto" or t.dtype == "auto":
            raise ValueError("only a resolved run has a plan")
        state = state_bytes(self.model, self.config.deepspeed, self.world_size, t.dtype)
        policy, micro = t.activation_checkpointing, t.micro_batch_size_per_gpu
        activations = activation_bytes(self.model, t.seq_length, micro, policy, t.dtype)
        return (
            f"planned {format_bytes(state)} for the state and {format_bytes(activations)} for a micro-batch, per rank"
        )

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
    """Below data.root where that is set: also a path from another machine, of which the longest end that exists is taken.

    What is found is the right data or none: it is known by its fingerprint.
    """
    root = config.data.root
    if root is None or (path.is_absolute() and path.exists()):
        return path
    if not path.is_absolute():
        return root / path
    ends = (root.joinpath(*path.parts[start:]) for start in range(1, len(path.parts)))
    return next((end for end in ends if end.exists()), path)


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
    origin, location = _origin(config)
    if origin in ("checkpoint", "fork"):
        manifest = commit.read_manifest(locate_checkpoint(location))
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


def _origin(config: RunConfig) -> tuple[str, str]:
    """What init_from names, as (kind, place); the run's own checkpoints where it has some already.

    What a run started from may be gone by the time it continues.
    """
    origin, _, location = config.model.init_from.partition(":")
    continues = config.resume != "fresh" and commit.list_committed(config.run.output_dir / "checkpoints")
    return ("checkpoint", str(config.run.output_dir)) if origin != "scratch" and continues else (origin, location)


def _model_config(config: RunConfig, dataset: DatasetManifest) -> ModelConfig:
    """The architecture: written in the config, or read from what init_from names."""
    origin, location = _origin(config)
    if origin in ("checkpoint", "fork"):
        saved = ModelConfig.model_validate(commit.read_manifest(locate_checkpoint(location))["model"])
        return saved.model_copy(update={"dropout": config.model.dropout})
    if origin == "hf":
        from dsgpt.model.hf_import import read_hf_config

        return read_hf_config(location).model_copy(update={"dropout": config.model.dropout})
    return config.model.resolved(dataset.tokenizer.vocab_size, config.training.seq_length)


def _with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    section = config.model.model_copy(update={name: getattr(model, name) for name in ModelConfig.model_fields})
    return config.model_copy(update={"model": section})
