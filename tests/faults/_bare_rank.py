"""One rank that trains with bare DeepSpeed and its own checkpoints: `python _bare_rank.py FOLDER`. For controls (T004).

As its documentation shows it: load_checkpoint at the start, save_checkpoint every few steps, the tag from its `latest`. The
samples of a step depend on the step and the rank alone, and the step counter goes into client_state. Storage is as slow as
for dsgpt: DeepSpeed forces nothing to it, so what takes its time is the writing of a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

WIDTH, LAYERS, STEPS, SAVE_INTERVAL = 512, 4, 40, 4


def slow(state: object, *arguments: object, write: Any = torch.save, **named: object) -> None:
    seconds = float(os.environ["FSYNC_SECONDS"])
    time.sleep(seconds / 2)
    write(state, *arguments, **named)
    time.sleep(seconds / 2)


def main(folder: Path) -> None:
    torch.save = slow
    rank = int(os.environ["RANK"])
    log = (folder / "metrics.jsonl").open("a") if rank == 0 else None

    def tell(**fields: object) -> None:
        if log is not None:
            log.write(json.dumps({"time": time.time(), **fields}) + "\n")
            log.flush()

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at first use
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(1)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    path, client_state = engine.load_checkpoint(str(folder / "checkpoints"))
    step = client_state["step"] if path else 0
    tell(resumed=step)
    while step < STEPS:
        torch.manual_seed(step * 100 + rank)
        inputs = torch.randn(8, WIDTH)
        loss = (engine(inputs) - inputs.roll(1, 1)).square().mean()
        engine.backward(loss)
        engine.step()
        step += 1
        tell(step=step, loss=float(loss).hex())
        if step % SAVE_INTERVAL == 0:
            began = time.perf_counter()
            engine.save_checkpoint(str(folder / "checkpoints"), tag=f"step{step}", client_state={"step": step})
            tell(saved=step, seconds=time.perf_counter() - began)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in engine.module.parameters())
    tell(final=hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
