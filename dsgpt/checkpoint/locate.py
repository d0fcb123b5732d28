"""Which checkpoint a text names: RUN (its newest commit), RUN@STEP, RUN@best, or a checkpoint's own folder. Torch-free."""

from __future__ import annotations

from pathlib import Path

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.deepspeed_files import is_deepspeed
from dsgpt.checkpoint.retention import best
from dsgpt.errors import CheckpointError


def split_step(text: str) -> tuple[Path, str]:
    """('runs/a@100') -> (runs/a, "100"); a folder whose own name has an @ is taken as it is."""
    name, at, step = text.rpartition("@")
    return (Path(name), step) if at and not Path(text).exists() else (Path(text), "")


def locate_checkpoint(text: str) -> Path:
    """The folder of a committed checkpoint. Raises CheckpointError where there is none of that name."""
    folder, step = split_step(text)
    if (folder / commit.MANIFEST).exists():
        return folder
    committed = commit.list_committed(folder / "checkpoints")
    if not committed:
        do = "name a run folder, RUN@STEP, RUN@best or a checkpoint folder"
        if is_deepspeed(folder):
            do = f"DeepSpeed saved it: model.init_from=deepspeed:{folder} trains from it"
        raise CheckpointError(f"no committed checkpoint at {text}", seen=f"{folder}/checkpoints", do=do)
    if not step:
        return committed[-1][1]
    if step == "best":
        found = best(committed)
        if found is None:
            raise CheckpointError(
                f"no checkpoint of {folder} was evaluated", seen=text, do="name a step: " + _steps(committed)
            )
        return found[1]
    wanted = next((path for number, path in committed if str(number) == step), None)
    if wanted is None:
        do = f"{folder}@{committed[-1][0]}"
        raise CheckpointError(f"no step {step} in {folder}", seen=f"committed: {_steps(committed)}", do=do)
    return wanted


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, also where it was set aside in a folder of its own."""
    parents = list(checkpoint.absolute().parents)
    return next((parent for parent in parents if (parent / "tokenizer").is_dir()), parents[1])


def _steps(committed: list[tuple[int, Path]]) -> str:
    return ", ".join(str(number) for number, _ in committed)
