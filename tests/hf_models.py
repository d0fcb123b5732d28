"""Small random models of transformers in folders, as somebody else would save them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

BLOCKS, HIDDEN, POSITIONS = 3, 32, 64


def hf_config(kind: str, vocab_size: int):
    """A config of transformers: 3 blocks, hidden size 32."""
    import transformers

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    others = {
        "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
        "gemma": {"num_key_value_heads": 2, "head_dim": 8},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    }
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=HIDDEN, n_layer=BLOCKS, n_head=4, n_positions=POSITIONS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    if kind == "opt":
        return transformers.OPTConfig(
            vocab_size=vocab_size, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=4, ffn_dim=48,
            max_position_embeddings=POSITIONS, word_embed_proj_dim=HIDDEN, dropout=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    names = {
        "llama": "LlamaConfig", "qwen3": "Qwen3Config", "mistral": "MistralConfig", "gemma": "GemmaConfig",
        "gpt_neox": "GPTNeoXConfig", "phi": "PhiConfig",
    }  # fmt: skip
    return getattr(transformers, names[kind])(**sizes, **others.get(kind, {}))


def make_hf_folder(folder: Path, kind: str, tokenizer: Path, vocab_size: int, **changes) -> Path:
    """Weights larger than transformers' own at random, so that what attention does shows in the loss."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    config = hf_config(kind, vocab_size)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder
