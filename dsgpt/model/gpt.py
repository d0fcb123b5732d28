"""The native GPT: a decoder-only transformer in one file, single-device code.

It covers the shapes of GPT-2 (layer norm, learned positions, GELU, biases), Llama (RMS norm, rotary positions, SwiGLU,
grouped-query attention) and Qwen3 (Llama with normalised queries and keys), any mixture of their parts, and batch norm.
Parallelism, activation checkpointing and precision are applied from outside. With labels the model returns the *sum* of
the cross-entropy over target tokens; the caller divides by the number of targets of the whole step, so unevenly masked
batches stay exact.

Trade-off: query, key and value are separate matrices (a few per cent slower than one fused matrix on GPUs) because
names then agree with the Hugging Face formats, with LoRA targets and with freezing patterns.

Shapes: B sequences, T positions, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgpt.config import ModelConfig
from dsgpt.model.batch_norm import BatchNorm, MicroStep
from dsgpt.model.cache import KeyValueCache
from dsgpt.model.functional import chunked_cross_entropy, find_targets, rms_norm, rotate, swiglu

PADDING = -1  # the document id of positions that hold no token


def initial_std(config: ModelConfig) -> float:
    """Standard deviation of initial weights, sqrt(2 / (5 C)) (Nguyen and Salazar 2019, section 3.2, "SmallInit").

    At C = 768 that is 0.0228, GPT-2's 0.02; narrow models start larger and learn sooner, wide ones start smaller.
    """
    return math.sqrt(2 / (5 * config.hidden_size))


def residual_std(config: ModelConfig) -> float:
    """The same over sqrt(2 L) for the two projections of each block that add to the residual (GPT-2, section 2.3)."""
    return initial_std(config) / math.sqrt(2 * config.num_hidden_layers)


class Linear(nn.Linear):
    """`nn.Linear` initialised to N(0, std), biases to 0, inside its own constructor.

    Initialising here rather than in a later pass lets ZeRO-3 partition each layer as soon as it exists.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, std: float):
        self.std = std
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` initialised to N(0, std)."""

    def __init__(self, rows: int, size: int, std: float):
        self.std = std
        super().__init__(rows, size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, eq. 4), statistics in fp32. (..., C) -> (..., C)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    if config.norm == "batchnorm":
        return BatchNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def normalise(norm: nn.Module, x: Tensor, micro_step: MicroStep) -> Tensor:
    return norm(x, micro_step) if isinstance(norm, BatchNorm) else norm(x)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, D) of rotary positions (Su et al. 2021, section 3.2), computed in fp32.

    Computed from the position ids each time instead of from a buffer, because engines cast buffers to bf16.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Context(NamedTuple):
    """What all blocks of one forward pass share."""

    angles: tuple[Tensor, Tensor] | None  # rotary cosines and sines, None with learned positions
    mask: (
        Tensor | None
    )  # (B, 1, T, S) added to the scores: 0 where attention is allowed, else -inf; None is plain causal
    lengths: list[int] | None  # of the documents, through all rows, each of which attends to itself alone
    cache: KeyValueCache | None
    micro_step: MicroStep


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023). (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout.attention
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size, kv_size, std = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, initial_std(config)
        self.q_proj = Linear(config.hidden_size, size, config.bias, std)
        self.k_proj = Linear(config.hidden_size, kv_size, config.bias, std)
        self.v_proj = Linear(config.hidden_size, kv_size, config.bias, std)
        self.o_proj = Linear(size, config.hidden_size, config.bias, residual_std(config))
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if context.angles is not None:
            q, k = rotate(q, *context.angles), rotate(k, *context.angles)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1 and length == 1 and context.cache is not None:
            # One position: the query heads of a group are as many queries to its one key head, and nothing is copied.
            y = F.scaled_dot_product_attention(
                q.view(batch, self.num_kv_heads, groups, self.head_dim), k, v, context.mask
            )
            return self.o_proj(y.reshape(batch, 1, -1))
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        dropout = self.dropout if self.training else 0.0
        if context.lengths is not None:
            y = attend_by_document(q, k, v, context.lengths, dropout)
        else:
            causal = context.mask is None and length > 1
            y = F.scaled_dot_product_attention(q, k, v, context.mask, dropout, causal).transpose(1, 2)
        return self.o_proj(y.reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6) or GPT-2's tanh GELU feed-forward. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated, std = config.activation == "swiglu", initial_std(config)
        if self.gated:
            self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.bias, std)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.bias, std)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.bias, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout.residual)

    def forward(self, x: Tensor, context: Context, only: Tensor | None = None) -> Tensor:
        """(B, T, C); or, of the positions `only` (N,), counted through all rows, what the feed-forward gives: (1, N, C)."""
        x = x + self.dropout(self.attention(normalise(self.attention_norm, x, context.micro_step), context))
        if only is not None:
            x = x.flatten(0, 1).index_select(0, only)[None]
        return x + self.dropout(self.mlp(normalise(self.mlp_norm, x, context.micro_step)))


class LMHead(nn.Module):
    """Projection to the vocabulary: logits (B, T, V), or with labels (B, T) the summed loss (a scalar in fp32)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        nn.init.normal_(self.weight, std=initial_std(config))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten())


class GPT(nn.Module):
    """Decoder-only transformer. `config` is resolved: vocabulary, positions and head sizes are numbers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, initial_std(config))
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size, initial_std(config))
        self.dropout = nn.Dropout(config.dropout.embedding)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = LMHead(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), of the last position (B, 1, V) with `last_only`, or with `labels` the sum of the
        cross-entropy over labels other than -100.

        `input_ids`, `labels`, `position_ids` and `document_ids` are (B, T); labels are already shifted: labels[t] is the
        token after input_ids[t]. Positions of different documents do not attend to each other; document id -1 is padding,
        which batch norm leaves out.
        """
        if position_ids is None:
            position_ids = (cache or KeyValueCache()).positions(input_ids)
        x = self.embed_tokens(input_ids)
        angles = None
        if self.config.position_embedding == "learned":
            x = x + self.embed_positions(position_ids)
        else:
            angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        micro_step = MicroStep(None if document_ids is None else document_ids != PADDING)
        apart = document_ids is not None and x.device.type == "cpu" and cache is None
        lengths = document_lengths(document_ids) if apart else None
        mask = None if apart else attention_mask(input_ids, x.dtype, document_ids, cache)
        context = Context(angles, mask, lengths, cache, micro_step)
        x = self.dropout(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, context)
        targets = None if labels is None or self.config.norm == "batchnorm" else find_targets(labels)
        x = last(x, context) if targets is None else last(x, context, targets)
        if labels is not None and targets is not None:
            labels = labels.flatten()[targets][None]
        x = x[:, -1:] if last_only else x
        return self.lm_head(normalise(self.norm, x, micro_step), labels)


def attention_mask(
    input_ids: Tensor, dtype: torch.dtype, document_ids: Tensor | None, cache: KeyValueCache | None = None
) -> Tensor | None:
    """(B, 1, T, S) of `dtype` for `input_ids` (B, T), or None where plain causal attention (the fast kernel) says the same.

    S are the columns of the cache and the T after them. Made once for all layers: given booleans, the attention kernel would
    convert them, and keep the result, in each.
    """
    length, past, device = input_ids.shape[1], cache.length if cache else 0, input_ids.device
    starts = cache.first_columns(device) if cache else None
    if document_ids is None and starts is None and not (past and length > 1):
        return None
    allowed = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None, None]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if starts is not None:
        allowed = allowed & (torch.arange(past + length, device=device) >= starts[:, None, None, None])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -math.inf)


def document_lengths(document_ids: Tensor) -> list[int]:
    """Of the stretches of one document id in (B, T), through all rows; what is padding is a document too."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    edges = begins.flatten().nonzero()[:, 0]
    return torch.diff(edges, append=edges.new_tensor([document_ids.numel()])).tolist()


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float) -> Tensor:
    """Causal attention within stretches of all rows of (B, H, T, D) one after another; (1, B T, H, D).

    On a CPU: positions of other documents cost nothing, where a mask pays for the whole square. A GPU would spend more on
    starting so many small kernels.
    """
    stretches = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)]
    each = [F.scaled_dot_product_attention(*one, None, dropout, True) for one in zip(*stretches, strict=True)]
    return torch.cat([y.transpose(1, 2) for y in each], dim=1)
