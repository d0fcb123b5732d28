"""Which checkpoints stay: the newest few, every n-th for good, the best by validation, what a person pinned.

Deleting goes through a rename to `.trash-…`, so a half-deleted checkpoint is never seen. Only rank 0 deletes, after a newer
commit; the newest good checkpoint is never deleted, whatever the settings. A run that has just written the newest one looks
at sizes only (`verify_mode`); a person who prunes has it hashed. A file `KEEP` in a checkpoint's folder pins it.
`evaluation.json` beside the manifest holds its validation loss: it is written after the commit, when the step has been
evaluated, and moves with the folder. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsgpt.checkpoint.commit import fsync_path, list_committed, verify

EVALUATION, PIN = "evaluation.json", "KEEP"


def record_evaluation(checkpoint: Path, result: dict[str, Any]) -> None:
    """Keep the validation result of a committed step with it."""
    tmp = checkpoint / f".tmp-{EVALUATION}"
    tmp.write_text(json.dumps(result) + "\n", "utf-8")
    os.replace(tmp, checkpoint / EVALUATION)


def validation_loss(checkpoint: Path) -> float | None:
    """In nats per token; None where that step was not evaluated or the loss is not finite."""
    try:
        loss = json.loads((checkpoint / EVALUATION).read_text("utf-8"))["loss"]
        return float(loss) if math.isfinite(loss) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def best(committed: Sequence[tuple[int, Path]]) -> tuple[int, Path] | None:
    """The committed checkpoint of the lowest validation loss, the earlier one of two; None where none was evaluated."""
    losses = [(loss, step, path) for step, path in committed if (loss := validation_loss(path)) is not None]
    return min(losses)[1:] if losses else None


def surplus(
    committed: Sequence[tuple[int, Path]],
    keep_last: int,
    keep_every: int | None = None,
    keep_best: bool = False,
    verify_mode: str = "size",
) -> list[tuple[int, Path]]:
    """What the settings do not keep, oldest first. `keep_last` 0 keeps all."""
    if keep_last <= 0 or len(committed) <= keep_last:
        return []
    found = best(committed) if keep_best else None
    newest_good = next((step for step, path in reversed(committed) if not verify(path, verify_mode)), None)
    stay = {newest_good, found[0] if found else None}
    return [
        (step, path)
        for step, path in committed[:-keep_last]
        if step not in stay and not (keep_every and step % keep_every == 0) and not (path / PIN).exists()
    ]


def prune(
    checkpoints_dir: Path,
    keep_last: int,
    keep_every: int | None = None,
    keep_best: bool = False,
    verify_mode: str = "size",
) -> list[int]:
    """Delete the surplus, and what crashed deletes left behind. Returns the deleted steps."""
    if not checkpoints_dir.is_dir():
        return []
    for entry in list(os.scandir(checkpoints_dir)):
        if entry.name.startswith(".trash-"):
            shutil.rmtree(entry.path, ignore_errors=True)
    deleted = []
    for step, path in surplus(list_committed(checkpoints_dir), keep_last, keep_every, keep_best, verify_mode):
        trash = checkpoints_dir / f".trash-{path.name}-{os.getpid()}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
        deleted.append(step)
    if deleted:
        fsync_path(checkpoints_dir)
    return deleted
