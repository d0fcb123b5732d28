"""The `model` section as written, and the complete architecture it stands for.

Two types because two readers: `ModelSection` is what a person writes, where a missing size means "the usual one";
`ModelConfig` is what the model is built from and what a checkpoint records, where nothing is missing. The price is
one method, `ModelSection.resolved`, that turns the first into the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dsgpt.config.fields import Bool, Count, Real, Section
from dsgpt.errors import ConfigError

ExportFormat = Literal["llama", "qwen3", "gpt2", "dsgpt", "transformers"]


def described_folder(place: Path) -> Path | None:
    """Whose config.json says the shape of a DeepSpeed checkpoint: its folder's, or the one's that it lies in."""
    return next((folder for folder in (place, place.parent) if (folder / "config.json").exists()), None)


class Dropout(Section):
    """Probability of zeroing, in [0, 1); 0 switches that dropout off."""

    embedding: Real = Field(default=0.0, ge=0, lt=1, description="dropout after the embeddings")
    attention: Real = Field(default=0.0, ge=0, lt=1, description="dropout of attention weights")
    residual: Real = Field(default=0.0, ge=0, lt=1, description="dropout of each block's output before it is added")


class _Architecture(Section):
    """Choices that have the same meaning, and a default, in both types."""

    rope_theta: Real = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    position_embedding: Literal["rotary", "learned"] = Field(
        default="rotary", description="how positions enter the model"
    )
    norm: Literal["rmsnorm", "layernorm", "batchnorm"] = Field(
        default="rmsnorm", description="normalisation layer; batchnorm for research, see the README before using it"
    )
    norm_eps: Real = Field(default=1e-5, gt=0, description="added to the variance before its root")
    activation: Literal["swiglu", "gelu"] = Field(default="swiglu", description="of the MLP; swiglu has a third matrix")
    bias: Bool = Field(default=False, description="bias vectors in the linear layers and in layernorm")
    qk_norm: Bool = Field(default=False, description="RMSNorm of each head's queries and keys")
    tie_word_embeddings: Bool = Field(default=True, description="the output head shares the input embedding's matrix")
    dropout: Dropout = Field(default=Dropout(), description="dropout probabilities")


class ModelConfig(_Architecture):
    """A complete architecture: what the model is built from."""

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    intermediate_size: Count
    vocab_size: Count
    max_position_embeddings: Count

    @property
    def export_format(self) -> ExportFormat:
        """The Hugging Face format that holds this model exactly, else dsgpt's own."""
        modern = self.norm == "rmsnorm" and self.position_embedding == "rotary" and self.activation == "swiglu"
        if modern and not self.qk_norm:
            return "llama"
        if modern and not self.bias:
            return "qwen3"
        classic = self.norm == "layernorm" and self.position_embedding == "learned" and self.activation == "gelu"
        plain_heads = (
            self.num_key_value_heads == self.num_attention_heads
            and self.head_dim * self.num_attention_heads == self.hidden_size
        )
        if classic and plain_heads and self.bias and self.tie_word_embeddings and not self.qk_norm:
            return "gpt2"
        return "dsgpt"


class HFModelConfig(ModelConfig):
    """An architecture that transformers implements and the native GPT does not.

    `hf` is its config.json, from which the model is built; the other fields say its sizes as far as they have one, for
    estimates and reports.
    """

    hf: dict[str, Any]
    num_parameters: Count

    @property
    def export_format(self) -> ExportFormat:
        return "transformers"


def parse_model(fields: dict[str, Any]) -> ModelConfig:
    """The architecture that a manifest records. Raises pydantic's ValidationError."""
    return (HFModelConfig if "hf" in fields else ModelConfig).model_validate(fields)


class ModelSection(_Architecture):
    """Where the weights come from, and the shape when they start from scratch."""

    init_from: str = Field(
        default="scratch",
        description="scratch, hf:<folder or hub name>, checkpoint:<path> (weights), deepspeed:<folder> (what a DeepSpeed or "
        "Trainer checkpoint holds) or fork:<run>@<step> (all state)",
    )
    implementation: Literal["auto", "native", "transformers"] = Field(
        default="auto",
        description="of hf:<…>: the native GPT (auto: where it holds the architecture exactly), or that of transformers",
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        default="auto",
        description="of a model of transformers: how it attends (auto: torch's scaled_dot_product_attention); packed "
        "documents stay apart with each, or the run does not begin",
    )
    trust_checkpoint: Bool = Field(
        default=False,
        description="read what init_from names also from pytorch_model.bin, or DeepSpeed's pickles, that may execute code",
    )
    hidden_size: Count | None = Field(default=None, description="width of the residual stream")
    num_hidden_layers: Count | None = Field(default=None, description="number of transformer blocks")
    num_attention_heads: Count | None = Field(default=None, description="query heads per block")
    num_key_value_heads: Count | None = Field(default=None, description="key/value heads; null = num_attention_heads")
    head_dim: Count | None = Field(
        default=None, description="width of a head; null = hidden_size / num_attention_heads"
    )
    intermediate_size: Count | None = Field(
        default=None,
        description="width of the MLP; null = 4 x hidden (gelu) or 8/3 x hidden up to a multiple of 64 (swiglu)",
    )
    vocab_size: Count | None = Field(default=None, description="rows of the embedding; null = the tokenizer's")
    max_position_embeddings: Count | None = Field(
        default=None, description="longest context; null = training.seq_length"
    )

    def resolved(self, vocab_size: int, seq_length: int) -> ModelConfig:
        """The complete architecture; `vocab_size` and `seq_length` (tokens) fill the two sizes that are not ours.

        Raises ConfigError where the shape is not written here (init_from other than scratch).
        """
        hidden, layers, heads = self.hidden_size, self.num_hidden_layers, self.num_attention_heads
        if hidden is None or layers is None or heads is None:
            raise ConfigError(
                "the model's shape is incomplete: hidden_size, num_hidden_layers and num_attention_heads are needed",
                seen=f"hidden_size={hidden}, num_hidden_layers={layers}, num_attention_heads={heads}, "
                f"init_from={self.init_from}",
                do="set all three, or read the shape from what init_from names",
            )
        usual = 4 * hidden if self.activation == "gelu" else -(-8 * hidden // (3 * 64)) * 64
        common = {name: getattr(self, name) for name in _Architecture.model_fields}
        return ModelConfig(
            **common,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.num_key_value_heads or heads,
            head_dim=self.head_dim or hidden // heads,
            intermediate_size=self.intermediate_size or usual,
            vocab_size=self.vocab_size or vocab_size,
            max_position_embeddings=self.max_position_embeddings or seq_length,
        )
