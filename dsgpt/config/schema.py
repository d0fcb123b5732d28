"""Every key a run's config can have, with its type, default and help text (the field descriptions).

This page is the reference: `dsgpt config schema` prints it as JSON Schema. Relations between keys are checked in
`checks.py`, so that they can be reported together with mistyped keys instead of one after the other.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dsgpt.config.fields import Bool, Count, CountOrZero, Int, Real, Section
from dsgpt.config.fine_tuning import FineTuningSection
from dsgpt.config.model import ModelSection
from dsgpt.errors import ConfigError


class RunSection(Section):
    """What the run is called and where it lives."""

    name: str = Field(default="run", min_length=1, description="shown in logs and reports")
    output_dir: Path = Field(description="the run's folder; resuming means using the same one again")
    seed: Int = Field(default=1234, ge=0, lt=2**63, description="of the initial weights, dropout and sample order")
    hang_timeout_seconds: Real = Field(
        default=600.0,
        ge=0,
        description="a rank without a sign of life for so long ends the job with 76 (start and saving have 3 times that); "
        "0 = never",
    )
    stop_at_step: Count | None = Field(
        default=None,
        description="commit this step and end with 0, as the file STOP does; the schedule stays that of the whole run",
    )
    strict_versions: Bool = Field(
        default=False, description="refuse (78), instead of warn, to resume with other versions of torch or deepspeed"
    )


class TokenizerSection(Section):
    """Which tokenizer the run uses."""

    path: Path | None = Field(default=None, description="tokenizer folder; null = the one recorded in the dataset")


class DataSource(Section):
    """One source of training data."""

    path: Path = Field(
        description="folder of `dsgpt data prepare` or `prepare-chat`, or Megatron's files: a prefix or a folder of them"
    )
    weight: Real = Field(
        default=1.0, gt=0, description="share of the sequences in a mixture, relative to the other sources"
    )
    epochs: Real | None = Field(
        default=None,
        gt=0,
        description="passes over this source in one epoch of the mixture (training.num_epochs); then all sources have it, "
        "and no weight",
    )


class ValidationSource(Section):
    """One set of validation data."""

    path: Path = Field(description="as under data.train; its validation split, or all of it where it has none")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="what its losses are called; null = the last part of its path",
    )


class DataSection(Section):
    """What is read."""

    train: tuple[DataSource, ...] = Field(
        description="the sources of training data; several are mixed by their weights"
    )
    validation: tuple[ValidationSource, ...] = Field(
        default=(),
        description="the validation sets; empty = the validation split of each source of training data that has one",
    )
    append_sources: Bool = Field(
        default=False,
        description="let a run that continues take in sources added at the end of data.train, from its next step on",
    )
    root: Path | None = Field(default=None, description="folder that relative dataset paths count from")
    document_mask: Bool = Field(default=True, description="documents packed in one sequence do not see each other")


def default_min_learning_rate(learning_rate: float) -> float:
    """A tenth of the peak, without the digits that binary fractions add."""
    return float(f"{max(0.0, 0.1 * learning_rate):.12g}")


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)  # the true default depends on another key


class OptimizerSection(Section):
    """The optimizer and its learning rate as a function of the step."""

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="torch's own implementation, fused where it can be"
    )
    learning_rate: Real = Field(gt=0, description="peak learning rate")
    min_learning_rate: Real = Field(
        default=0.0,
        ge=0,
        description="where the schedule ends; unset = learning_rate / 10",
        json_schema_extra=_without_default,
    )
    betas: tuple[Real, Real] = Field(default=(0.9, 0.95), description="decay of AdamW's two averages, each in [0, 1)")
    eps: Real = Field(default=1e-8, gt=0, description="added to AdamW's denominator")
    momentum: Real = Field(default=0.0, ge=0, lt=1, description="of sgd")
    weight_decay: Real = Field(default=0.1, ge=0, description="of matrices; vectors (norms, biases) are not decayed")
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay", "polynomial"] = Field(
        default="cosine", description="shape of the learning rate after the warmup"
    )
    warmup_steps: CountOrZero = Field(default=0, description="steps of linear rise from 0 to learning_rate")
    decay_steps: Count | None = Field(
        default=None, description="length of warmup_stable_decay's final decay; null = 10 % of the run"
    )
    power: Real = Field(default=1.0, gt=0, description="exponent of the polynomial schedule")

    @model_validator(mode="before")
    @classmethod
    def _fill_min_learning_rate(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("min_learning_rate") is None:
            peak = data.get("learning_rate")
            usable = isinstance(peak, int | float) and not isinstance(peak, bool) and math.isfinite(peak)
            return {**data, "min_learning_rate": default_min_learning_rate(peak or 0.0) if usable else 0.0}
        return data


class LossSpikeSection(Section):
    """When a step's loss is out of line, and what follows."""

    window: CountOrZero = Field(default=100, description="steps whose losses it is compared with; 0 = never look")
    threshold: Real = Field(
        default=6.0, gt=0, description="a spike lies so many standard deviations above the window's mean"
    )
    action: Literal["warn", "rollback"] = Field(
        default="warn", description="rollback = go back to the last good checkpoint and leave the step's samples out"
    )
    skip_steps: Count = Field(
        default=1, description="how many steps' samples are left out, the last of them those of the spike"
    )


class TrainingSection(Section):
    """How much is trained, in which pieces and precision. A step is an optimizer step over all GPUs."""

    seq_length: Count = Field(description="tokens per sequence")
    global_batch_size: Count = Field(le=10**9, description="sequences per optimizer step over all GPUs")
    micro_batch_size_per_gpu: Count | Literal["auto"] = Field(
        default="auto", description="sequences per forward and backward on one GPU; auto = the most that fits"
    )
    max_steps: Count | None = Field(default=None, description="length of the run in optimizer steps")
    num_epochs: Real | None = Field(
        default=None,
        gt=0,
        description="length of the run in passes over the training data; of several sources each needs its own `epochs`",
    )
    max_tokens: Count | None = Field(default=None, description="length of the run in tokens")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="of weights and activations; auto = bf16 where the GPU has it, else fp16, fp32 on CPU",
    )
    max_grad_norm: Real = Field(
        default=1.0, ge=0, description="gradients are scaled down to this global norm; 0 = never"
    )
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = Field(
        default="none", description="recompute activations in the backward pass instead of keeping them"
    )
    loss_spike: LossSpikeSection = Field(default=LossSpikeSection())

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all GPUs."""
        return self.global_batch_size * self.seq_length

    def num_steps(self, samples_per_epoch: int | None = None) -> int:
        """Optimizer steps of the whole run, rounded up; `samples_per_epoch` (sequences) is needed for num_epochs.

        Raises ConfigError where the length is written in epochs and the size of the dataset is not given.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return -(-self.max_tokens // self.tokens_per_step)
        if self.num_epochs is None or samples_per_epoch is None:
            raise ConfigError(
                "the length of the run in steps is not known yet",
                seen=f"num_epochs={self.num_epochs}, samples_per_epoch={samples_per_epoch}",
                do="give the number of samples of the dataset, or set training.max_steps",
            )
        return max(1, math.ceil(self.num_epochs * samples_per_epoch / self.global_batch_size))

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step on `world_size` GPUs (or CPU ranks).

        Raises ConfigError, with the equation and the nearest values that work, where it does not divide.
        """
        total, micro = self.global_batch_size, self.micro_batch_size_per_gpu
        if micro == "auto":
            raise ConfigError(
                "training.micro_batch_size_per_gpu is still auto", do="resolve the config for the hardware first"
            )
        per_micro_step = micro * world_size
        if total % per_micro_step == 0:
            return total // per_micro_step
        below, above = total // per_micro_step * per_micro_step, (total // per_micro_step + 1) * per_micro_step
        remedy = f"set training.global_batch_size to {f'{below} or ' if below else ''}{above}"
        if total % world_size == 0:
            remedy += f", or training.micro_batch_size_per_gpu to {nearest_divisors(total // world_size, micro)}"
        raise ConfigError(
            "the batch does not divide: global_batch_size = micro_batch_size_per_gpu x GPUs x accumulation steps",
            seen=f"{total} = {micro} x {world_size} x {total / per_micro_step:.4g}",
            do=remedy,
        )


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next below and above `wanted`, as words: '4 or 6'."""
    start, reach = min(wanted - 1, number), 10**6  # further away is no help
    below = next((size for size in range(start, max(0, start - reach), -1) if number % size == 0), None)
    above = next((size for size in range(wanted + 1, min(number, wanted + reach) + 1) if number % size == 0), None)
    return " or ".join(str(size) for size in (below, above) if size is not None)


class ParallelSection(Section):
    """Reserved for sequence, tensor and pipeline parallelism; ZeRO data parallelism needs no key."""


class CheckpointSection(Section):
    """When a resumable checkpoint is written and how many stay."""

    save_interval: Count = Field(
        default=500, description="optimizer steps between checkpoints; the last step is always saved"
    )
    save_interval_minutes: Real | None = Field(
        default=None, gt=0, description="also save when so many minutes have passed since the last checkpoint"
    )
    keep_last: CountOrZero = Field(default=3, description="how many of the newest checkpoints stay; 0 = all")
    keep_every: Count | None = Field(default=None, description="checkpoints of steps divisible by this stay for good")
    keep_best: Bool = Field(
        default=False,
        description="the checkpoint with the lowest validation loss stays (of those that were evaluated; of several sets "
        "the mean over all their tokens)",
    )
    strict_space: Bool = Field(
        default=False,
        description="refuse to start (73), instead of warn, where the checkpoints will not fit on the disk",
    )
    verify: Literal["hash", "size"] = Field(
        default="hash",
        description="whether content is compared with its checksums while a resume reads it, or sizes only",
    )
    asynchronous: Bool = Field(
        default=False,
        description="training waits only for the copy to host memory; another process writes (the same bytes)",
    )


class LoggingSection(Section):
    """When numbers are written."""

    log_interval: Count = Field(default=10, description="optimizer steps between metrics")
    eval_interval: Count | None = Field(default=None, description="steps between evaluations; null = only at the end")
    eval_samples: Count | None = Field(
        default=None, description="sequences per evaluation of each validation set; null = all"
    )


class RunConfig(Section):
    """One training run. Build it with `load_config`, which also reports where every value came from."""

    run: RunSection
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto = the GPUs where there are any")
    resume: Literal["auto", "must", "fresh"] | CountOrZero = Field(
        default="auto",
        description="auto = continue where a checkpoint exists; must, fresh (an empty folder), or a step",
    )
    model: ModelSection = Field(default=ModelSection())
    fine_tuning: FineTuningSection = Field(default=FineTuningSection())
    tokenizer: TokenizerSection = Field(default=TokenizerSection())
    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    parallel: ParallelSection = Field(default=ParallelSection())
    deepspeed: str = Field(
        default="auto", min_length=1, description="a name under ds_configs/, a path to JSON, or auto"
    )
    checkpoint: CheckpointSection = Field(default=CheckpointSection())
    logging: LoggingSection = Field(default=LoggingSection())


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML, for editors."""
    return RunConfig.model_json_schema()
