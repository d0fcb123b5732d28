"""One rank of the benchmark host_memory: loads a Hugging Face folder under ZeRO-3 as a run does, then saves a checkpoint.

    python -m tests.benchmarks._host_memory_rank FOLDER CHECKPOINTS TOLD

All but the last block are frozen, so that the optimizer's state, which is not what is measured, fits the machine. What was
loaded is compared with the safetensors library's reading, after the peak was taken. TOLD/RANK.json has the figures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.benchmarks._anonymous import AnonymousPeak

LENGTH = 16


def main(folder: Path, checkpoints: Path, told: Path) -> None:
    peak = AnonymousPeak(os.getpid())
    import torch

    from dsgpt import distributed, engine
    from dsgpt.checkpoint.saver import Saver
    from dsgpt.checkpoint.weights import hf_weights
    from dsgpt.config import fill_deepspeed, load_config
    from dsgpt.config.schema import OptimizerSection
    from dsgpt.model.gpt import GPT
    from dsgpt.model.hf_import import read_hf_config
    from dsgpt.optimizer import build_optimizer
    from dsgpt.planning import parameter_count
    from dsgpt.process import tune_allocator
    from dsgpt.train.step import largest_micro_batch

    engine.prepare_process()
    tune_allocator()
    world = distributed.start("cpu")
    torch.set_num_threads(1)
    engine.init_distributed(world)
    model = read_hf_config(folder)
    overrides = ["training.dtype=bf16", "training.micro_batch_size_per_gpu=1", "deepspeed=zero3"]
    overrides += [f"training.global_batch_size={world.size}"]
    filled = fill_deepspeed(load_config(["quickstart"], overrides).config, world.size, parameter_count(model))
    peaks = {"imports": peak.take()}
    module = engine.construct(lambda: GPT(model), filled)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(f"blocks.{model.num_hidden_layers - 1}."))
    peaks["model"] = peak.take()
    running = engine.Engine(module, build_optimizer(module, OptimizerSection(learning_rate=1e-3)), filled, world)
    peaks["engine"] = peak.take()
    running.rehearse(largest_micro_batch(model.vocab_size, LENGTH, 1, world.device))
    peaks["rehearsal"], before = peak.take(), peak.now()
    weights = hf_weights(folder, model)
    running.load(weights.read, ("master",), 0)
    peaks["load"], after = peak.take(), peak.now()
    different = count_different(running, folder)
    peak.take()
    saver = Saver(running, world, checkpoints)
    about = {"counters": {"consumed_tokens": 0}, "data": {"seq_length": LENGTH, "sources": []}}  # for the model's card
    about |= {"dtype": "bf16", "versions": {"torch": str(torch.__version__)}, "model": model.model_dump(mode="json")}
    saver.begin({"step": 1, "state_kinds": list(running.state_kinds), **about}, "a")
    saver.finish()
    peaks["save"] = peak.stop()
    trained = sum(fragment.numel for fragment in running.fragments())
    frozen = sum(fragment.numel for fragment in running.frozen_fragments())
    figures = {"trained": trained, "frozen": frozen, "bytes_read": weights.bytes_read(), "different": different}
    (told / f"{world.rank}.json").write_text(json.dumps({**figures, "peaks": peaks, "before": before, "after": after}))
    distributed.last_barrier()


def count_different(running, folder):
    """Elements of this rank's partition that are not what the safetensors library reads."""
    from safetensors import safe_open

    from dsgpt.model.hf_format import key_table
    from dsgpt.model.hf_import import read_hf_config

    files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
    names = {key.native[0]: key.hf for key in key_table(read_hf_config(folder))}
    different = 0
    for fragments, read in (
        (running.fragments(), lambda one: running.read(one, "master")),
        (running.frozen_fragments(), running.read_frozen),
    ):
        for one in fragments:
            expected = where[names[one.name]].get_tensor(names[one.name]).flatten()[one.start :][: one.numel]
            different += int((read(one).float() != expected.float()).sum())
    return different


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
