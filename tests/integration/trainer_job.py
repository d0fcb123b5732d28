"""One rank of a real transformers.Trainer with DeepSpeed: `python -m tests.integration.trainer_job STAGE FOLDER`.

Rank 0 also keeps what the saved tensors were, gathered by DeepSpeed itself, as FOLDER/live.pt.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import Trainer, TrainingArguments

from tests.checkpoint.deepspeed_saves import LENGTH, STEPS, VOCABULARY, live_state, transformers_model


def main(stage, folder):
    torch.set_num_threads(1)
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=STEPS, save_steps=STEPS, deepspeed=deepspeed, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="cosine", logging_steps=1,
    )  # fmt: skip
    ids = [torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(i)) for i in range(64)]
    data = [{"input_ids": one, "labels": one} for one in ids]
    trainer = Trainer(model=transformers_model("llama"), args=arguments, train_dataset=data)
    trainer.train()
    live = live_state(trainer.model_wrapped)
    if os.environ["RANK"] == "0":
        torch.save(live, f"{folder}/live.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
