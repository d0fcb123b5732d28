"""What a run keeps of the model it started from, so that its exports can say and give on what stood there.

    base_model/    base.json, and of the model's folder: config.json, generation_config.json, README.md, licence, notices

The folder it came from may be gone or changed by the time of the export. Torch-free.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsgpt.checkpoint import commit
from dsgpt.checkpoint.locate import locate_checkpoint, run_of
from dsgpt.config.model import described_folder
from dsgpt.errors import CheckpointError
from dsgpt.hub import LICENCE_FILES, locate_hf

FOLDER, RECORD = "base_model", "base.json"
_KEPT = ("config.json", "generation_config.json", "fetched.json", "README.md", *LICENCE_FILES)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The first words of licences by their names on the hub.
_TEXTS = {
    "apache-2.0": ("Apache License", "Version 2.0"),
    "mit": ("MIT License",),
    "gpl-3.0": ("GNU GENERAL PUBLIC LICENSE", "Version 3"),
}


@dataclass(frozen=True)
class BaseModel:
    """`origins` are the texts of init_from from the first model to the run's own, `folder` is what was kept."""

    origins: tuple[str, ...]
    folder: Path

    @property
    def place(self) -> str:
        """The folder or hub name of the weights the run began with."""
        return self.origins[-1].partition(":")[2]

    @property
    def source(self) -> tuple[str, str | None]:
        """Where anybody finds these weights: OWNER/NAME and the commit, where dsgpt fetched them; else `place`."""
        fetched = self.read("fetched.json")
        source = str(fetched.get("source", ""))
        if len(self.origins) == 1 and source.startswith("hf:"):
            return source[3:], fetched.get("revision")
        return self.place, None

    @property
    def hub_name(self) -> str | None:
        """OWNER/NAME on the hub, where that is known."""
        source = str(self.read("fetched.json").get("source", "")).removeprefix("hf:")
        first = self.origins[0].removeprefix("hf:")
        names = (source, first, self.front_matter().get("base_model"))
        return next((name for name in names if isinstance(name, str) and _HUB_NAME.fullmatch(name)), None)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file that was kept; empty where there is none, or none that can be read."""
        try:
            found = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def front_matter(self) -> dict[str, Any]:
        """The YAML at the head of its README; empty where there is none, or none that can be read."""
        try:
            parts = (self.folder / "README.md").read_text("utf-8").split("\n---", 1)
            found = yaml.safe_load(parts[0].removeprefix("---\n")) if parts[0].startswith("---\n") else None
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    def licence_files(self) -> list[Path]:
        return sorted({file for pattern in LICENCE_FILES for file in self.folder.glob(pattern)})

    def licence(self) -> dict[str, str]:
        """The keys license, license_name and license_link of a model card: of its README, else its config.json, else the
        text of its licence; empty where none of them says one."""
        for said in (self.front_matter(), self.read("config.json")):
            if isinstance(said.get("license"), str):
                return {key: said[key] for key in ("license", "license_name", "license_link") if key in said}
        for file in self.licence_files():
            head = file.read_text("utf-8", errors="replace")[:500]
            known = next((name for name, words in _TEXTS.items() if all(word in head for word in words)), None)
            if known:
                return {"license": known}
            if file.match(LICENCE_FILES[0]):
                return {"license": "other", "license_name": "of-the-base-model", "license_link": file.name}
        return {}


def keep_base(init_from: str, run_dir: Path) -> None:
    """Keep what is known of the model that a new run starts from, once: not after its first commit.

    Raises OSError, and ConfigError or CheckpointError where the model is not there.
    """
    if init_from == "scratch" or commit.list_committed(run_dir / "checkpoints"):
        return
    origin, _, place = init_from.partition(":")
    earlier = None
    if origin == "hf":
        source: Path | None = locate_hf(place)
    elif origin == "deepspeed":
        source = described_folder(Path(place))
    else:
        earlier = read_base(run_of(locate_checkpoint(place)))
        source = earlier.folder if earlier else None
    tmp = run_dir / f".tmp-{FOLDER}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for file in [file for pattern in _KEPT for file in (source.glob(pattern) if source else ())]:
        if file.is_file():
            shutil.copyfile(file, tmp / file.name)
    origins = [*(earlier.origins if earlier else ()), init_from]
    (tmp / RECORD).write_text(json.dumps({"origins": origins}, indent=2) + "\n", "utf-8")
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    tmp.rename(run_dir / FOLDER)


def read_base(run_dir: Path) -> BaseModel | None:
    """What the run kept; None of a run from scratch. Raises CheckpointError where it is damaged."""
    record = run_dir / FOLDER / RECORD
    try:
        return BaseModel(tuple(json.loads(record.read_text("utf-8"))["origins"]), record.parent)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = f"bring it back, or remove {record.parent}: then exports do not know their base model"
        raise CheckpointError("what the run kept of its base model is damaged", f"{record}: {error!r}", do) from error
