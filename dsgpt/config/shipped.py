"""The files that come with dsgpt: run configs, DeepSpeed configs and SLURM scripts, and how a name finds one.

They are ordinary files that people read and copy; in a clone `ds_configs/` and `slurm/` stand beside the package, in
an installed wheel inside it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from dsgpt.errors import ConfigError

RUNS_FOLDER = Path(__file__).resolve().parent / "runs"


def shipped_configs() -> dict[str, Path]:
    """Name -> path of the run configs that come with dsgpt."""
    return {path.stem: path for path in sorted(RUNS_FOLDER.glob("*.yaml"))}


def shipped_folder(name: Literal["ds_configs", "slurm"]) -> Path:
    """The folder `ds_configs` or `slurm`, in a clone or in a wheel. Raises ConfigError where it is missing."""
    package = RUNS_FOLDER.parent.parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the folder {name}/ that belongs to dsgpt is missing", str(package), "install dsgpt again")


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidate that nearly is `word`, else up to three that resemble it, best first."""
    known = list(candidates)
    return difflib.get_close_matches(word, known, 1, 0.85) or difflib.get_close_matches(word, known, 3, 0.6)


def find_config(name_or_path: str | Path) -> Path:
    """A run config by path, or by the name of a shipped one. Raises ConfigError with the nearest names."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = nearest(path.stem, shipped) or nearest(path.name, beside)
    raise ConfigError(
        f"no config file {name_or_path}",
        seen=f"{path.resolve()} is {'a folder' if path.is_dir() else 'not there'}",
        do=(f"did you mean {' or '.join(close)}? " if close else "")
        + f"shipped configs: {', '.join(shipped)} (dsgpt config ls)",
    )


def find_deepspeed_config(name_or_path: str) -> Path:
    """A DeepSpeed JSON by path, or by its name under ds_configs/. Raises ConfigError with the nearest names."""
    if is_path(name_or_path):
        path = Path(name_or_path)
        if path.is_file():
            return path
        raise ConfigError("deepspeed: no such file", str(path), "give the path of a DeepSpeed JSON, or a shipped name")
    names = {path.stem: path for path in sorted(shipped_folder("ds_configs").glob("*.json"))}
    if name_or_path in names:
        return names[name_or_path]
    close = nearest(name_or_path, names)
    raise ConfigError(
        "deepspeed: no shipped DeepSpeed config has this name",
        seen=name_or_path,
        do=(f"did you mean {' or '.join(close)}? " if close else "") + f"choose auto, {', '.join(names)} or a path",
    )


def is_path(name_or_path: str) -> bool:
    """Whether `deepspeed:` names a file rather than a shipped config."""
    return "/" in name_or_path or name_or_path.endswith(".json")
