"""Host memory of loading a Hugging Face folder of 1 B parameters into ZeRO-3 partitions, and of exporting a checkpoint.

Two CPU ranks in bf16 load random weights from 8 safetensors files, as a run does: build the model, start DeepSpeed, the
trial step, load. Memory is a rank's whole anonymous memory (RssAnon, sampled every 20 ms), libraries and DeepSpeed's buffers
included. The must is on all but the trial step: that gathers weights as every step does (up to DeepSpeed's
stage3_max_live_parameters, more than this model has), which is told beside it. A rank's partition are its halves of the
bf16 weights and of the trained block's fp32 masters and moments. The checkpoint that the ranks then save is exported in a
process without DeepSpeed. Needs 9 GB of disk and 7 GB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks._anonymous import AnonymousPeak
from tests.benchmarks._ranks import NUM_RANKS, run_ranks
from tests.frame import Outcome, Row

NUM_FILES = 8
MODEL = {
    "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
ALLOWED = 500_000_000


def run(trials: int | None, seed: int) -> Outcome:
    """Once: there is nothing random in it but the weights."""
    with tempfile.TemporaryDirectory(prefix="dsgpt-host-memory-") as name:
        folder = Path(name)
        (folder / "told").mkdir()
        model, checkpoints = folder / "model", folder / "run/checkpoints"
        sizes = write_model(model, seed)
        (folder / "text.txt").write_text(Path(__file__).read_text("utf-8") * 3)  # an export has a tokenizer, whichever
        _dsgpt("tokenizer", "train", folder / "text.txt", "--vocab-size", "400", "--output", folder / "run/tokenizer")
        worker = ["-m", "tests.benchmarks._host_memory_rank", str(model), str(checkpoints), str(folder / "told")]
        run_ranks(worker, folder / "log")
        told = [json.loads((folder / f"told/{rank}.json").read_text()) for rank in range(NUM_RANKS)]
        rows = [*loading(told, sizes), *exporting(checkpoints / "step-00000001", folder / "export")]
    return Outcome(rows, 1)


def loading(told: list[dict], sizes: list[int]) -> list[Row]:
    rows = []
    for rank, one in enumerate(told):
        partition = 2 * (one["trained"] + one["frozen"]) + 12 * one["trained"]
        most = (partition + max(sizes) + ALLOWED) / 1e6
        peaks = {phase: value / 1e6 for phase, value in one["peaks"].items()}
        note = f"partition {partition / 1e6:.0f}, a file {max(sizes) / 1e6:.0f}; "
        note += ", ".join(f"{phase} {value:.0f}" for phase, value in peaks.items())
        peak = max(peaks[phase] for phase in ("imports", "model", "engine", "load"))
        rows.append(Row(f"rank {rank}: peak, building and loading", peak, "MB", at_most=most, note=note))
        own = peaks["load"] - one["before"] / 1e6
        rows.append(Row(f"rank {rank}: of that the loading's own", own, "MB", note="over what was there before it"))
        rows.append(Row(f"rank {rank}: peak of the trial step", peaks["rehearsal"], "MB"))
    read = sum(one["bytes_read"] for one in told) / sum(sizes)
    note = f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files"
    rows.append(Row("bytes read by all ranks over the folder", read, at_most=1.1, note=note))
    different = sum(one["different"] for one in told)
    rows.append(Row("elements that the safetensors library reads otherwise", different, at_most=0))
    return rows


def exporting(checkpoint: Path, output: Path) -> list[Row]:
    command = [sys.executable, "-m", "dsgpt", "checkpoint", "export", checkpoint, "--output", output, "--no-check"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    sampled = AnonymousPeak(process.pid)
    if process.wait():
        raise RuntimeError(f"the export ended with {process.returncode}")
    peak = sampled.stop()
    shards = [file.stat().st_size for file in output.glob("*.safetensors")]
    tensor = 4 * MODEL["vocab_size"] * MODEL["hidden_size"]
    most = (max(shards) + tensor + ALLOWED) / 1e6
    note = f"{sum(shards) / 1e9:.2f} GB in {len(shards)} files, largest tensor {tensor / 1e6:.0f} MB"
    return [
        Row("export: peak", peak / 1e6, "MB", at_most=most, note=note),
        Row(
            "export: peak without a shard",
            peak / 1e6,
            "MB",
            at_most=(2 * tensor + ALLOWED) / 1e6,
            note="as it is built",
        ),
    ]


def write_model(folder: Path, seed: int) -> list[int]:
    """A Llama of random bf16 weights in files of about the same size, one tensor in memory at a time; bytes of each file."""
    import torch

    from dsgpt.config import Dropout, ModelConfig
    from dsgpt.model.build import model_shapes
    from dsgpt.model.hf_format import hf_config, to_hf
    from dsgpt.model.safetensors_folder import INDEX, bytes_of
    from dsgpt.model.safetensors_header import lay_out, num_bytes

    config = ModelConfig(**MODEL, dropout=Dropout())
    shapes, generator = model_shapes(config)[0], torch.Generator().manual_seed(seed)
    names = to_hf(config, lambda name: torch.empty(shapes[name], device="meta"))
    tensors = [(name, "BF16", tuple(tensor.shape)) for name, tensor in names]
    total = sum(num_bytes(dtype, shape) for _, dtype, shape in tensors)
    files, so_far = [[] for _ in range(NUM_FILES)], 0
    for name, dtype, shape in tensors:
        files[so_far * NUM_FILES // total].append((name, dtype, shape))
        so_far += num_bytes(dtype, shape)
    folder.mkdir()
    weight_map, sizes = {}, []
    for number, content in enumerate(files, start=1):
        file = folder / f"model-{number:05d}-of-{NUM_FILES:05d}.safetensors"
        with file.open("wb") as out:
            out.write(lay_out(content, {"format": "pt"})[0])
            for name, _, shape in content:
                values = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
                out.write(bytes_of(values))
                weight_map[name] = file.name
        sizes.append(file.stat().st_size)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config(config, 1, 2) | {"torch_dtype": "bfloat16"}))
    return sizes


def _dsgpt(*arguments: object) -> None:
    command = [sys.executable, "-m", "dsgpt", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
