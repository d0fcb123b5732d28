"""Reading the pickles that DeepSpeed writes without executing anything in them.

    content = load_pickled(path, trust=False)

They are read with torch's unpickler for tensors plus the few names in `_HARMLESS`, for which stand-ins without behaviour are
made; anything else is refused by name. The price is that a checkpoint whose client state holds objects of other libraries is
refused until a person trusts it (`model.trust_checkpoint`).

Growth: tensors are mapped, not read; an opened file costs the names in it and its mapping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsgpt.errors import CheckpointError
from dsgpt.model.hf_import import execute_pickled


class Plain:
    """Stands in for an object of DeepSpeed's: its attributes, and nothing that could run."""


_HARMLESS = [
    (Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load_pickled(path: Path, trust: bool) -> Any:
    """The content of a file that torch.save wrote, its tensors mapped. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise CheckpointError(
                "a file of the checkpoint cannot be read", seen=f"{path}: {_first_line(error)}", do="copy it again"
            ) from error
        refused = error
    if not trust:
        raise CheckpointError(
            "a file of the checkpoint holds more than tensors, and reading that could execute code",
            seen=f"{path}: {_foreign_names(path) or _first_line(refused)}",
            do="save without client state of other libraries; if you trust who made it: model.trust_checkpoint=true",
        )
    try:
        return execute_pickled(path, mmap=True)
    except Exception as error:  # whatever the file's own code raises
        raise CheckpointError("a file of the checkpoint cannot be read", seen=f"{path}: {error!r}") from error


def _foreign_names(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))))
    except Exception:  # a pickle that even its names cannot be read from
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:300]
