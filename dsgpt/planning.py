"""What a run needs before it starts: parameters, FLOPs, memory; and what `auto` means on the hardware found.

    config, notes = resolve_auto(config, world_size=8, device="cuda", gpu_memory_bytes=80 << 30)

Memory is estimated from formulas, not measured, because a login node has no GPU; the estimate leans to the safe side
(it adds a reserve and never counts on fusion), so a hand-tuned micro batch may beat `auto`. It never changes the
global batch, hence never what is learned. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dsgpt.config import HFModelConfig, ModelConfig, RunConfig, zero_kind
from dsgpt.config.fine_tuning import FineTuningSection, LoraSection
from dsgpt.errors import ConfigError
from dsgpt.units import format_bytes

_GIB = 1 << 30
_RESERVE = 2 * _GIB  # CUDA context, NCCL buffers, workspaces of matrix products
_USABLE = 0.92  # the rest is lost to fragmentation
_LOSS_CHUNK = 1024  # tokens whose logits exist at one time
_BUCKETS = 4 * 50_000_000 * 4  # bytes: two reduce and two gather buckets of the shipped DeepSpeed configs, in fp32
_CPU_MICRO_BATCH = 8  # more does not make a CPU faster, and its memory belongs to others too
_UNKNOWN_VOCABULARY = 131072  # larger than most, so that the estimate stays safe

Policy = Literal["none", "selective", "full"]


def parameter_count(model: ModelConfig) -> int:
    """Parameters, exactly; a tied head counts once."""
    if isinstance(model, HFModelConfig):
        return model.num_parameters
    return _embedding_parameters(model) + model.num_hidden_layers * _layer_parameters(model) + _norm_parameters(model)


def _embedding_parameters(model: ModelConfig) -> int:
    positions = model.max_position_embeddings if model.position_embedding == "learned" else 0
    matrices = 1 if model.tie_word_embeddings else 2
    return (matrices * model.vocab_size + positions) * model.hidden_size


def _norm_parameters(model: ModelConfig) -> int:
    has_bias = model.norm == "batchnorm" or (model.bias and model.norm == "layernorm")
    return model.hidden_size * (2 if has_bias else 1)


def _layer_matrix_parameters(model: ModelConfig) -> int:
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * keys)
    mlp = (3 if model.activation == "swiglu" else 2) * model.hidden_size * model.intermediate_size
    return attention + mlp


def _layer_parameters(model: ModelConfig) -> int:
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    mlp_inputs = 2 if model.activation == "swiglu" else 1
    biases = queries + 2 * keys + model.hidden_size + mlp_inputs * model.intermediate_size + model.hidden_size
    head_norms = 2 * model.head_dim if model.qk_norm else 0
    return _layer_matrix_parameters(model) + (biases if model.bias else 0) + head_norms + 2 * _norm_parameters(model)


def block_parameters(model: ModelConfig) -> int:
    """Of one block: exact for the native GPT, else what is not in the embeddings and the head, over the number of blocks."""
    if not isinstance(model, HFModelConfig):
        return _layer_parameters(model)
    return max(1, (model.num_parameters - _embedding_parameters(model)) // model.num_hidden_layers)


@dataclass(frozen=True)
class TrainedPart:
    """`parameters` that are trained; how many of them adapters have `added`; `blocks` that gradients pass through."""

    parameters: int
    added: int
    blocks: int


def trained_part(model: ModelConfig, settings: FineTuningSection) -> TrainedPart:
    """What a run trains at its most, after the last unfreezing.

    Everything, to stay safe, where names or a measurement decide (patterns, num_last_blocks=auto).
    """
    layers, whole = model.num_hidden_layers, parameter_count(model)
    if settings.train == "lora":
        added = layers * _adapter_parameters(model, settings.lora)
        return TrainedPart(added, added, layers)
    wanted = [settings.num_last_blocks, *settings.unfreeze_at.values()]
    numbers = [one for one in wanted if isinstance(one, int)]
    if settings.train != "last_blocks" or len(numbers) < len(wanted):
        return TrainedPart(whole, 0, layers)
    blocks = min(layers, max(numbers))
    if settings.train_embeddings:
        return TrainedPart(whole - (layers - blocks) * block_parameters(model), 0, layers)
    head = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return TrainedPart(blocks * block_parameters(model) + _norm_parameters(model) + head, 0, blocks)


def _adapter_parameters(model: ModelConfig, settings: LoraSection) -> int:
    """Of one block; all its linear layers where a target has another name than the native GPT's."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layers = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    layers |= {"gate_proj": (hidden, inner)} if model.activation == "swiglu" else {}
    layers |= {"up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    targets = [one.rpartition(".")[2] for one in settings.target_modules]
    known = all(any(fnmatchcase(name, target) for name in layers) for target in targets)
    return sum(
        settings.rank * (columns + rows) + (rows if settings.use_dora else 0)
        for name, (columns, rows) in layers.items()
        if not (targets and known) or any(fnmatchcase(name, target) for target in targets)
    )


def flops_per_token(model: ModelConfig, seq_length: int, convention: Literal["palm", "causal"] = "palm") -> float:
    """Model FLOPs of one token's forward and backward, without recomputation; a tied head counts as a matrix product.

    `palm` counts attention over the whole sequence (6 N + 12 L h T), as most published MFU figures do; `causal` counts
    the half that a causal mask leaves (6 N + 6 L h T). For packed documents pass sum(length^2) / sum(length).
    """
    matrices = model.num_hidden_layers * _layer_matrix_parameters(model) + model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim * seq_length
    return 6.0 * matrices + (12.0 if convention == "palm" else 6.0) * attention


def state_bytes(
    model: ModelConfig, deepspeed: str, world_size: int, dtype: str = "bf16", part: TrainedPart | None = None
) -> int:
    """Bytes on one GPU for weights, gradients and AdamW, communication buckets included.

    `deepspeed` is a shipped name or a path; `part` what is trained, where that is not all. Counts as DeepSpeed's own
    estimators do, plus the full fp32 gradient sum that stage 1 keeps. Raises ConfigError where the DeepSpeed config cannot
    be read.
    """
    kind, low = zero_kind(deepspeed), 4 if dtype == "fp32" else 2
    trained = part.parameters if part else parameter_count(model)
    count = parameter_count(model) + (part.added if part else 0)
    if kind.stage == 0:
        return low * count + trained * (low + 12 if low == 2 else 12)
    if kind.stage == 3:
        largest = 4 * max(_layer_parameters(model), model.vocab_size * model.hidden_size)
        weights = 0 if kind.offload_param else low * count // world_size
        second_copy = low * count // kind.hpz_partition_size if kind.hpz_partition_size > 1 else 0
        others = 0 if kind.offload_optimizer else 16 * trained // world_size
        return weights + second_copy + others + largest + _BUCKETS
    if kind.offload_optimizer:
        return low * count + 4 * trained // world_size + _BUCKETS
    if kind.stage == 2:
        return low * (count + trained) + 16 * trained // world_size + _BUCKETS
    return low * count + (low + 4) * trained + 12 * trained // world_size + _BUCKETS


def activation_bytes(
    model: ModelConfig,
    seq_length: int,
    micro_batch_size: int,
    policy: Policy,
    dtype: str,
    part: TrainedPart | None = None,
) -> int:
    """Bytes that one micro-batch keeps between forward and backward on one GPU, loss and attention mask included.

    Blocks below the first one that is trained keep nothing.
    """
    size = 4 if dtype == "fp32" else 2
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    queries = model.num_attention_heads * model.head_dim
    # Per token and layer: inputs and outputs of two norms (their fp32 copies too), q/k/v before and after rotation,
    # the attention's output, and the MLP's inner values.
    attention_core = 2 * heads + queries
    block = 4 * hidden + 4 * hidden + attention_core + (4 if model.activation == "swiglu" else 3) * inner
    dropped = sum((model.dropout.residual > 0, model.dropout.embedding > 0)) * hidden  # one byte per element
    whole = block * size + dropped
    # Selective recomputation keeps the block's input and the results of its matrix products and of attention.
    products = 3 * hidden + heads + queries + (2 if model.activation == "swiglu" else 1) * inner
    kept = {"none": whole, "selective": products * size, "full": hidden * size}[policy]
    working = 0 if policy == "none" else whole  # of the one block that is being recomputed
    blocks = part.blocks if part else model.num_hidden_layers
    per_token = max(1, blocks) * kept + working + 4 * hidden * size  # one works also where none is kept
    tokens = seq_length * micro_batch_size
    mask = micro_batch_size * seq_length * seq_length * size
    loss = min(tokens, _LOSS_CHUNK) * model.vocab_size * (size + 8)
    return tokens * per_token + mask + loss


@dataclass(frozen=True)
class _Choice:
    deepspeed: str
    policy: Policy


def resolve_auto(
    config: RunConfig,
    *,
    world_size: int,
    device: str,
    gpu_memory_bytes: int | None = None,
    bf16: bool = True,
    model: ModelConfig | None = None,
) -> tuple[RunConfig, list[str]]:
    """Replace every `auto` by a value for `world_size` ranks on `device` ("cpu" or "cuda"), with one note for each.

    `gpu_memory_bytes` is one GPU's memory (None: unknown, the safest values are taken); `model` the complete
    architecture where the config does not spell it out. Raises ConfigError where the global batch does not divide.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError("resolve_auto needs a definite device", device, "pass cpu or cuda")
    training = config.training
    notes: list[str] = []
    dtype = training.dtype
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16" if bf16 else "fp16"
        why = "the device is a CPU" if device == "cpu" else "the GPU has it" if bf16 else "the GPU has no bf16"
        notes.append(f"training.dtype = {dtype}: {why}")
    elif dtype == "fp16" and device == "cpu":
        raise ConfigError("fp16 training needs a GPU", "training.dtype=fp16 on cpu", "set training.dtype to auto")
    if model is None and config.model.hidden_size is not None:
        model = config.model.resolved(_UNKNOWN_VOCABULARY, training.seq_length)
    share = _share(config, world_size)
    fits = _Fits(model, config, dtype, world_size, gpu_memory_bytes if device == "cuda" else None)
    choice = _choose(config, fits, device, notes)
    micro = training.micro_batch_size_per_gpu
    if micro == "auto":
        micro, why = _micro_batch(share, choice, fits, device)
        notes.append(f"training.micro_batch_size_per_gpu = {micro}: {why}")
    update = {"dtype": dtype, "micro_batch_size_per_gpu": micro, "activation_checkpointing": choice.policy}
    resolved = config.model_copy(update={"training": training.model_copy(update=update), "deepspeed": choice.deepspeed})
    resolved.training.gradient_accumulation_steps(world_size)
    return resolved, notes


def _share(config: RunConfig, world_size: int) -> int:
    """Sequences per rank and step; raises ConfigError with the nearest batches where the ranks do not divide them."""
    training = config.training
    if training.micro_batch_size_per_gpu == "auto":
        training = training.model_copy(update={"micro_batch_size_per_gpu": 1})
        training.gradient_accumulation_steps(world_size)
    return training.global_batch_size // world_size


@dataclass(frozen=True)
class _Fits:
    """Whether a combination fits one GPU; without a known shape or memory nothing can be said."""

    model: ModelConfig | None
    config: RunConfig
    dtype: str
    world_size: int
    memory: int | None

    @property
    def known(self) -> bool:
        return self.model is not None and self.memory is not None

    def needed(self, choice: _Choice, micro: int) -> int:
        assert self.model is not None
        part = trained_part(self.model, self.config.fine_tuning)
        state = state_bytes(self.model, choice.deepspeed, self.world_size, self.dtype, part)
        sequence = self.config.training.seq_length
        return state + activation_bytes(self.model, sequence, micro, choice.policy, self.dtype, part)

    def __call__(self, choice: _Choice, micro: int) -> bool:
        assert self.memory is not None
        return self.needed(choice, micro) <= _USABLE * self.memory - _RESERVE


def _choose(config: RunConfig, fits: _Fits, device: str, notes: list[str]) -> _Choice:
    training = config.training
    fixed_policy = training.activation_checkpointing
    policies: tuple[Policy, ...] = ("none", "selective", "full") if fixed_policy == "auto" else (fixed_policy,)
    # Partitioning costs less time than recomputing, recomputing less than offloading: the order of the search.
    stages = ("zero1", "zero2", "zero3") if config.deepspeed == "auto" else (config.deepspeed,)
    candidates = [_Choice(stage, policy) for policy in policies for stage in stages]
    if config.deepspeed == "auto":
        candidates += [_Choice("zero3_offload", policy) for policy in policies]
    micro = 1 if training.micro_batch_size_per_gpu == "auto" else training.micro_batch_size_per_gpu
    if device == "cpu":
        choice, why = candidates[0], "the device is a CPU"
    elif not fits.known:
        choice = _Choice("zero3" if config.deepspeed == "auto" else config.deepspeed, policies[-1])
        why = "the GPU's memory or the model's shape is not known here, so the safe choice"
    else:
        found = next((candidate for candidate in candidates if fits(candidate, micro)), None)
        choice = found or candidates[-1]
        estimate = f"about {format_bytes(fits.needed(choice, micro))} of {format_bytes(fits.memory or 0)} per GPU"
        why = f"{estimate} at micro batch {micro}" if found else f"nothing fits by the estimate ({estimate})"
    if config.deepspeed == "auto":
        notes.append(f"deepspeed = {choice.deepspeed}: {why}")
    if fixed_policy == "auto":
        notes.append(f"training.activation_checkpointing = {choice.policy}: {why}")
    return choice


def _micro_batch(share: int, choice: _Choice, fits: _Fits, device: str) -> tuple[int, str]:
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    divisors = sorted({*small, *(share // size for size in small)}, reverse=True)
    if device == "cpu":
        micro = next(size for size in divisors if size <= _CPU_MICRO_BATCH)
        return micro, f"the largest divisor of {share} sequences per rank up to {_CPU_MICRO_BATCH}"
    if not fits.known:
        return 1, "the GPU's memory or the model's shape is not known here"
    fitting = next((size for size in divisors if fits(choice, size)), None)
    if fitting is None:
        return 1, "not even 1 fits by the estimate"
    return fitting, f"the largest divisor of {share} sequences per GPU that fits {format_bytes(fits.memory or 0)}"
