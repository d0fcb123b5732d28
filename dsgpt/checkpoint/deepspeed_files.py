"""What lies in a folder that DeepSpeed, or transformers' Trainer with DeepSpeed, saved: found by names alone. Torch-free.

    found = find_deepspeed("out/checkpoint-10")       # or a save folder with `latest`, or one global_step10

Nothing is guessed: of several checkpoints the caller must name one. What dsgpt cannot read (tensor and pipeline parallel
files, experts, universal checkpoints, state on NVMe) is refused here, before a process is started for it.

Growth: one listing of the folder and two of the tag folder, whatever it holds.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from dsgpt.checkpoint.commit import MANIFEST, list_committed
from dsgpt.errors import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_USE = "save with plain data parallelism (ZeRO 0-3), or convert to Hugging Face format and use hf:<folder>"


@dataclass(frozen=True)
class DeepSpeedFolder:
    """The files of one checkpoint. `tag` is None where a Trainer's folder holds weights in safetensors alone."""

    tag: Path | None
    model_files: dict[int, Path]  # by data-parallel rank; below stage 3 there is one, of rank 0
    optimizer_files: dict[int, Path]
    safetensors: Path | None  # the folder that holds whole weights beside the tag folder, as a Trainer saves them

    @property
    def divided(self) -> bool:
        """Whether the weights themselves are divided over the ranks (ZeRO 3)."""
        return any(path.name.startswith("zero_pp_rank_") for path in self.model_files.values())


def find_deepspeed(place: str | Path) -> DeepSpeedFolder:
    """The checkpoint in a folder. Raises CheckpointError where there is none, several, or one that is not read."""
    folder = Path(place)
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "no such folder"
        do = "deepspeed:<folder that DeepSpeed saved>"
        with contextlib.suppress(OSError):  # what lies beside it may be nobody's business
            if _holds_states(folder.parent) or _inside(folder.parent):
                do = _advice(folder.parent)
        raise CheckpointError(what, seen=str(folder), do=do)
    is_tag = any(folder.glob("*_states.pt"))
    tag = folder if is_tag else _named_by_latest(folder)
    beside = folder.parent if is_tag else folder
    safetensors = beside if (beside / "config.json").exists() and any(beside.glob("*.safetensors")) else None
    if tag is None:
        if safetensors is None:
            raise CheckpointError("no DeepSpeed checkpoint here", seen=_seen(folder), do=_advice(folder))
        return DeepSpeedFolder(None, {}, {}, safetensors)
    _refuse_other_kinds(tag)
    model, optimizer = _by_rank(tag, _MODEL), _by_rank(tag, _OPTIMIZER)
    if 0 not in model:
        raise CheckpointError(
            "the checkpoint has no file of the model's state",
            seen=f"{tag}: {', '.join(sorted(path.name for path in tag.glob('*.pt'))[:5]) or 'no files'}",
            do="bring back mp_rank_00_model_states.pt (zero_pp_rank_0_mp_rank_00_model_states.pt at stage 3)",
        )
    return DeepSpeedFolder(tag, model, optimizer, safetensors)


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder looks like one that DeepSpeed saved, readable or not."""
    return (folder / "latest").is_file() or _holds_states(folder)


def _named_by_latest(folder: Path) -> Path | None:
    latest = folder / "latest"
    if not latest.is_file():
        return None
    name = latest.read_text("utf-8").strip()
    tag = folder / name
    if not name or Path(name).name != name or not tag.is_dir():
        raise CheckpointError(
            "the file `latest` names a folder that is not there", seen=f"{latest}: {name!r}", do=_advice(folder)
        )
    return tag


def _inside(folder: Path) -> list[str]:
    """Folders inside that hold a checkpoint, in the order of their numbers."""
    found = [path.name for path in folder.iterdir() if path.is_dir() and is_deepspeed(path)]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _holds_states(folder: Path) -> bool:
    return any(folder.glob("*_states.pt"))


def _seen(folder: Path) -> str:
    return f"{folder} has neither the file `latest` nor files *_states.pt"


def _advice(folder: Path) -> str:
    if _holds_states(folder):
        return f"deepspeed:{folder}"
    if list_committed(folder / "checkpoints") or (folder / MANIFEST).exists():
        return f"it is dsgpt's own: checkpoint:{folder} for its weights, fork:{folder} for all its state"
    inside = _inside(folder)
    if inside:
        return f"name one of those that are there: {', '.join(f'deepspeed:{folder / name}' for name in inside)}"
    return "name the folder given to save_checkpoint, one global_step folder in it, or a Trainer's checkpoint folder"


def _refuse_other_kinds(tag: Path) -> None:
    names = sorted(path.name for path in tag.iterdir())
    kinds = {
        "its layers are saved one by one, by pipeline parallelism": [n for n in names if n.startswith("layer_")],
        "it has mixture-of-experts files": [n for n in names if "expert_" in n or n.startswith("expp_rank_")],
        "its state lies in swap files (NVMe offload)": [n for n in names if n == "offloaded_tensors"],
        "it is a universal checkpoint": [n for n in names if n == "zero" and (tag / n).is_dir()],
        "it is divided by tensor parallelism": [
            n for n in names if (found := _MODEL.fullmatch(n) or _OPTIMIZER.fullmatch(n)) and int(found[2]) > 0
        ],
    }
    for what, found in kinds.items():
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointError(
                f"this DeepSpeed checkpoint is not read: {what}",
                seen=f"{tag}: {', '.join(found[:3])}{more}",
                do="name the checkpoint it was made from" if what.endswith("universal checkpoint") else _USE,
            )


def _by_rank(tag: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    files: dict[int, Path] = {}
    for path in sorted(tag.iterdir()):
        found = pattern.fullmatch(path.name)
        if found is None:
            continue
        rank = int(found[1] or 0)
        if rank in files:
            raise CheckpointError(
                f"two files are of rank {rank}: the folder holds two saves",
                seen=f"{files[rank]}, {path.name}",
                do="remove the older ones",
            )
        files[rank] = path
    return files
