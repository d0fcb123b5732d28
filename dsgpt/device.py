"""Which device this process computes on, as torch itself sees it, and whether that is what the user paid for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsgpt.errors import ConfigError
from dsgpt.launch import hardware


@dataclass(frozen=True)
class Device:
    """`kind` is "cpu" or "cuda"; `visible` counts the GPUs torch can use here."""

    kind: str
    visible: int = 0
    memory_bytes: int | None = None
    bf16: bool = True

    def dtype(self, wanted: str) -> str:
        """What "auto" is for using a model: bf16 on a GPU that has it, else fp32."""
        if wanted != "auto":
            return wanted
        return "bf16" if self.kind == "cuda" and self.bf16 else "fp32"

    def check_ranks(self, local_size: int) -> None:
        """Refuse to leave GPUs idle by accident: fewer ranks on this node than GPUs torch sees."""
        if self.kind == "cuda" and local_size < self.visible:
            raise ConfigError(
                "fewer ranks than GPUs on this node",
                seen=f"{local_size} ranks, {self.visible} visible GPUs",
                do=f"deepspeed --num_gpus {self.visible} --module dsgpt.train RUN.yaml, or hide GPUs with "
                "CUDA_VISIBLE_DEVICES",
            )


def choose_device(wanted: str) -> Device:
    """Resolve `device: auto|cpu|cuda`. GPUs that are there but unusable are an error, never a silent run on the CPU."""
    if wanted == "cpu":
        return Device("cpu")
    if torch.cuda.is_available():
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device("cuda", torch.cuda.device_count(), memory, bf16)
    signs = hardware.current_signs()
    if wanted == "cuda" or signs.evidence:
        raise ConfigError(
            "torch cannot use a GPU here",
            seen=f"{'; '.join(signs.evidence) or 'no GPU found'}; driver {signs.driver}; torch {torch.__version__} "
            f"(CUDA {torch.version.cuda})",
            do="install a torch build for this driver (dsgpt doctor says more), or use the CPU: device=cpu in a run, "
            "--device cpu elsewhere",
        )
    return Device("cpu")
