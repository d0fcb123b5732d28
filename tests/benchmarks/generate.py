"""Tokens a second of our generation against transformers' own, on the same export, alone and in a batch.

Greedy, fp32 on a CPU, keys and values cached on both sides, one thread. Both models are in this process; calls alternate
A/B/A/B, and each pair has its ratio. In the batch the prompts differ in length: transformers is given them padded on the
left, as it asks for. A row counts what both sides produce: the same number of tokens for every prompt, since no end token
is set. "small" is a width at which the work of Python between two kernels dominates, "large" one at which kernels do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.frame import Outcome, Row

NEW = 96
SHAPES = {
    "small Llama": {"kind": "llama", "hidden_size": 64, "num_hidden_layers": 5, "intermediate_size": 172},
    "large Llama": {"kind": "llama", "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "large Mistral": {"kind": "mistral", "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
}
LENGTHS = {"one prompt": (64,), "8 prompts": (64, 17, 120, 33, 80, 5, 100, 48)}


def run(trials: int | None, seed: int) -> Outcome:
    """7 pairs of each unless `trials` says otherwise."""
    import torch

    pairs, rows = trials or 7, []
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(prefix="dsgpt-generate-") as folder:
            ours, theirs = _models(Path(folder), seed, **shape)
            rows += [_row(f"{name}, {label}", ours, theirs, lengths, pairs, seed) for label, lengths in LENGTHS.items()]
    return Outcome(rows, pairs)


def _models(folder: Path, seed: int, kind: str, **sizes: int) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from dsgpt.checkpoint.weights import ModelLocation, load_model
    from tests.hf_models import hf_config

    torch.manual_seed(seed)
    config = hf_config(kind, 4096)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": sizes["hidden_size"] // 8}
    for key, value in {**sizes, **heads, "max_position_embeddings": 512, "sliding_window": None}.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    return load_model(ModelLocation(folder, False, folder)), theirs


def _row(label: str, ours: Any, theirs: Any, lengths: tuple[int, ...], pairs: int, seed: int) -> Row:
    import torch

    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(4096, (length,), generator=generator).tolist() for length in lengths]
    ratios, processor, speeds, same = [], [], [], 0.0
    for number in range(pairs + 1):
        start = time.perf_counter(), time.process_time()
        mine = _ours(ours, prompts)
        middle = time.perf_counter(), time.process_time()
        other = _theirs(theirs, prompts)
        end = time.perf_counter(), time.process_time()
        if number:  # the first pair warms both up
            ratios.append((end[0] - middle[0]) / (middle[0] - start[0]))
            processor.append((end[1] - middle[1]) / (middle[1] - start[1]))
            speeds.append(NEW * len(prompts) / (middle[0] - start[0]))
        same = statistics.mean(one == two for one, two in zip(mine, other, strict=True))
    note = f"{min(ratios):.2f} to {max(ratios):.2f}; ours {statistics.median(speeds):.0f} tokens/s; in processor time "
    note += f"{statistics.median(processor):.2f} x; {same:.0%} of the texts are equal"
    return Row(label, statistics.median(ratios), "x", at_least=1.0, note=note)


def _ours(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    from dsgpt.generate.decoder import Decoder
    from dsgpt.generate.sampling import Sampling

    decoder = Decoder(model)
    rows = [decoder.add(prompt, Sampling(NEW, temperature=0)) for prompt in prompts]
    while decoder.step():
        pass
    return [row.new for row in rows]


def _theirs(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, use_cache=True)
    return out[:, width:].tolist()
