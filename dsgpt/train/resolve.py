"""From a config and the hardware to what will really run: every `auto` filled, every size known, contradictions named.

Used by `dsgpt train` before it starts anything, by `--dry-run`, and again by every worker, which must come to the same
result. Torch is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.deepspeed_files import find_deepspeed, is_deepspeed
from dsgpt.checkpoint.locate import locate_checkpoint
from dsgpt.config import ModelConfig, RunConfig, fill_deepspeed, parse_model
from dsgpt.config.model import described_folder
from dsgpt.config.schema import nearest_divisors
from dsgpt.data.manifest import TokenizerRecord
from dsgpt.errors import ConfigError, DataError, Problem
from dsgpt.planning import activation_bytes, parameter_count, resolve_auto, state_bytes, trained_part
from dsgpt.train.sources import RunData, find_data
from dsgpt.train.vocabulary import Origin, find_origin, fit_vocabulary
from dsgpt.units import format_bytes, format_count

EXPORTS = {
    "llama": "Hugging Face llama",
    "qwen3": "Hugging Face qwen3",
    "gpt2": "Hugging Face gpt2",
    "transformers": "Hugging Face's format, the architecture it was read from",
    "dsgpt": "dsgpt's own format (no Hugging Face architecture has this combination of model settings)",
}


@dataclass(frozen=True)
class ResolvedRun:
    """A run with nothing left to decide. `data` is where its samples come from.

    `grown_from` is the size of the vocabulary that the initial weights have, where the model's is larger.
    """

    config: RunConfig
    model: ModelConfig
    deepspeed: dict[str, Any]
    data: RunData
    world_size: int
    device: str
    max_steps: int
    notes: list[str] = field(default_factory=list)
    grown_from: int | None = None

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.config.training.gradient_accumulation_steps(self.world_size)

    @property
    def output_dir(self) -> Path:
        return self.config.run.output_dir

    @property
    def last_step(self) -> int:
        """Where this start ends: the run's last step, or the one at which it is to stop before."""
        return min(self.max_steps, self.config.run.stop_at_step or self.max_steps)

    def memory_text(self) -> str:
        """What one rank was planned to need: the estimates of planning.py, for reports of running out of memory."""
        t = self.config.training
        if t.micro_batch_size_per_gpu == "auto" or t.activation_checkpointing == "auto" or t.dtype == "auto":
            raise ValueError("only a resolved run has a plan")
        part = trained_part(self.model, self.config.fine_tuning)
        state = state_bytes(self.model, self.config.deepspeed, self.world_size, t.dtype, part)
        policy, micro = t.activation_checkpointing, t.micro_batch_size_per_gpu
        activations = activation_bytes(self.model, t.seq_length, micro, policy, t.dtype, part)
        return (
            f"planned {format_bytes(state)} for the state and {format_bytes(activations)} for a micro-batch, per rank"
        )

    def describe(self) -> str:
        """The arithmetic of the run, for people."""
        t = self.config.training
        per_step = t.tokens_per_step
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return "\n".join(
            (
                f"model      {format_count(parameter_count(self.model))} parameters, {self.model.num_hidden_layers} layers, "
                f"hidden {self.model.hidden_size}, vocabulary {self.model.vocab_size}",
                f"batch      {t.global_batch_size} sequences = {t.micro_batch_size_per_gpu} per rank x {ranks} "
                f"x {self.gradient_accumulation_steps} accumulation; x {t.seq_length} tokens = "
                f"{format_count(per_step)} tokens per step",
                f"length     {self.max_steps} steps = {format_count(self.max_steps * per_step)} tokens",
                *self.data.describe(self.max_steps * t.global_batch_size),
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
    data = find_data(config)
    t = config.training
    if data.samples_per_epoch < t.global_batch_size:
        raise DataError(
            "the training data is smaller than one global batch",
            seen=f"{data.samples_per_epoch} sequences of {t.seq_length} tokens",
            do=f"prepare more text, or lower training.global_batch_size (now {t.global_batch_size}) or seq_length",
        )
    origin = find_origin(config)
    there = _model_config(config, origin, data.tokenizer)
    _check_blocks(config, there)
    model, told = fit_vocabulary(config, origin, there, data)
    config = _with_model(config, model)
    _check_ranks(config, world_size)
    config, notes = resolve_auto(
        config, world_size=world_size, device=device, gpu_memory_bytes=gpu_memory_bytes, bf16=bf16
    )
    config.training.gradient_accumulation_steps(world_size)
    deepspeed = fill_deepspeed(config, world_size, trained_part(model, config.fine_tuning).parameters)
    max_steps = config.training.num_steps(data.samples_per_epoch)
    grown_from = None if model.vocab_size == there.vocab_size else there.vocab_size
    return ResolvedRun(
        config, model, deepspeed, data, world_size, device, max_steps, [*told, *notes], grown_from=grown_from
    )


def nothing_left(run: ResolvedRun) -> str:
    """Why a start of this run would have nothing to train, or "" where it has."""
    committed = commit.list_committed(run.output_dir / "checkpoints")
    done = bool(committed) and committed[-1][0] >= run.last_step and not commit.verify(committed[-1][1], "size")
    if run.config.resume not in ("auto", "must") or not done:
        return ""
    stop = "" if run.last_step == run.max_steps else f", run.stop_at_step is {run.last_step}"
    return f"step {committed[-1][0]} of {run.max_steps} is committed already{stop}: nothing to train"


def _check_ranks(config: RunConfig, world_size: int) -> None:
    """A run that continues keeps its global batch, so the number of ranks must divide it."""
    if config.resume == "fresh" or not commit.list_committed(config.run.output_dir / "checkpoints"):
        return
    check_ranks(config, world_size, "the run cannot continue", "dsgpt train RUN.yaml --num-processes")


def check_ranks(config: RunConfig, world_size: int, cannot: str, command: str) -> None:
    """Raise ConfigError, with `command` and the numbers that work, where ranks do not divide a batch that must stay."""
    total, micro = config.training.global_batch_size, config.training.micro_batch_size_per_gpu
    micro = 1 if micro == "auto" else micro
    verb, _, option = command.rpartition(" ")
    if total % (micro * world_size) == 0:
        return
    words = []
    if total % micro == 0:
        words.append(f"{option} {nearest_divisors(total // micro, world_size)}")
    if total % world_size == 0:
        words.append(f"training.micro_batch_size_per_gpu={nearest_divisors(total // world_size, micro)}")
    raise ConfigError(
        f"{cannot} on {world_size} ranks: they do not divide its global batch, which stays what it is",
        seen=f"{total} = {micro} x {world_size} x {total / (micro * world_size):.4g}",
        do=" or ".join(f"{verb} {word}" for word in words) or "the config the run was started with",
    )


def _model_config(config: RunConfig, where: Origin, tokenizer: TokenizerRecord | None) -> ModelConfig:
    """The architecture: written in the config, or read from what init_from names."""
    origin, location = where.kind, where.place
    if origin in ("checkpoint", "fork"):
        saved = parse_model(commit.read_manifest(locate_checkpoint(location))["model"])
        return saved.model_copy(update={"dropout": config.model.dropout})
    if origin == "hf" and is_deepspeed(Path(location)) and not any(Path(location).glob("*.safetensors")):
        raise ConfigError(
            "no Hugging Face weights here, but what DeepSpeed saved", location, f"model.init_from=deepspeed:{location}"
        )
    if origin == "hf" and commit.list_committed(Path(location) / "checkpoints"):
        raise ConfigError("a run of dsgpt, no Hugging Face folder", location, f"model.init_from=checkpoint:{location}")
    weights_folder = Path(location) if origin == "hf" else None
    if origin == "deepspeed":
        find_deepspeed(location)  # what is not read is refused here already
        described = described_folder(Path(location))
        origin, location = ("hf", str(described)) if described else (origin, location)
    if origin == "hf":
        from dsgpt.model.hf_import import read_architecture, require_weights

        model = read_architecture(location, config.model.implementation)
        if weights_folder:
            require_weights(weights_folder, config.model.trust_checkpoint)
        return model.model_copy(update={"dropout": config.model.dropout})
    if tokenizer is None and config.model.vocab_size is None:
        raise ConfigError(
            "the size of the vocabulary is not known",
            seen="the training data does not say which tokenizer made it",
            do="set tokenizer.path to that tokenizer, or model.vocab_size",
        )
    return config.model.resolved(tokenizer.vocab_size if tokenizer else 0, config.training.seq_length)


def _check_blocks(config: RunConfig, model: ModelConfig) -> None:
    settings = config.fine_tuning
    asked = {f"fine_tuning.unfreeze_at.{step}": blocks for step, blocks in settings.unfreeze_at.items()}
    if settings.train == "last_blocks":
        asked["fine_tuning.num_last_blocks"] = settings.num_last_blocks
    there = model.num_hidden_layers
    problems = [
        Problem("the model has fewer blocks", seen=f"{key}={blocks}, the model has {there}", do=f"at most {there}")
        for key, blocks in asked.items()
        if isinstance(blocks, int) and blocks > there
    ]
    if problems:
        raise ConfigError(problems=problems)


def _with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    section = config.model.model_copy(update={name: getattr(model, name) for name in ModelConfig.model_fields})
    return config.model_copy(update={"model": section})
