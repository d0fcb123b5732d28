"""What a site's users would otherwise type with every job: `~/.config/dsgpt/site.yaml`, typed. Torch-free.

    partition: gpu
    account: my-project
    gpus_per_node: 8
    cpus_per_task: 12
    time: 24:00:00
    sbatch_options: {hint: nomultithread}

DSGPT_SITE_YAML names another file. The command line wins over it. What is set up inside the job (modules, virtual
environments, containers) is the shell file `site.sh` beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from dsgpt.config.fields import Count, Section
from dsgpt.config.shipped import nearest
from dsgpt.config.source import parse_yaml, plain
from dsgpt.errors import ConfigError, Problem
from dsgpt.launch.sbatch import check_extra, check_options, parse_nodes, parse_time


def _as_text(value: Any) -> Any:
    """Numbers are fine where sbatch wants a text: accounts, minutes and megabytes are often written so."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


class Site(Section):
    """Defaults of `dsgpt submit`: sbatch's options of these names, and a few of dsgpt's own."""

    partition: Text | None = Field(default=None)
    account: Text | None = Field(default=None)
    qos: Text | None = Field(default=None)
    constraint: Text | None = Field(default=None)
    reservation: Text | None = Field(default=None)
    exclude: Text | None = Field(default=None, description="nodes that are never to be used")
    time: Text | None = Field(default=None, description="minutes, 12:00:00 or 2-12:00:00")
    nodes: Text | None = Field(default=None, description="a number, or a range such as 2-8")
    mem: Text | None = Field(default=None, description="memory of a node")
    gpus_per_node: Count | None = Field(default=None, description="one rank each")
    ntasks_per_node: Count | None = Field(default=None, description="ranks of a node without GPUs")
    cpus_per_task: Count | None = Field(default=None, description="CPUs of a rank")
    signal_lead_seconds: Count | None = Field(
        default=None, le=65535, description="how long before the time limit a run is told; null = measured"
    )
    sbatch_options: dict[str, Text | None] = Field(
        default={}, description="any other option of sbatch, by its long name; null = an option without a value"
    )

    def options(self) -> dict[str, str]:
        """sbatch's options with their values."""
        told = self.model_dump(exclude={"signal_lead_seconds", "sbatch_options"}, exclude_none=True)
        return {name.replace("_", "-"): str(value) for name, value in told.items()}

    def extra(self) -> dict[str, str]:
        return {name: value or "" for name, value in self.sbatch_options.items()}


def site_file(suffix: str) -> Path:
    """Where `site.yaml` or `site.sh` is: what the environment names, else the one in the user's home."""
    named = os.environ.get({"yaml": "DSGPT_SITE_YAML", "sh": "DSGPT_SITE"}[suffix])
    return Path(named).expanduser() if named else Path.home() / ".config" / "dsgpt" / f"site.{suffix}"


def load_site() -> Site:
    """The site's defaults; none where there is no file. Raises ConfigError with everything that is wrong in it."""
    path = site_file("yaml")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        if "DSGPT_SITE_YAML" in os.environ:
            raise ConfigError("DSGPT_SITE_YAML names no file", seen=str(path), do="correct or unset it") from error
        return Site()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the site's defaults cannot be read", seen=f"{path}: {error}") from error
    problems: list[Problem] = []
    tree = parse_yaml(text, str(path), path.parent, problems)
    data = plain(tree) if tree is not None else None
    if not problems and data is not None and not isinstance(data, dict):
        problems.append(Problem(f"{path} has no keys", repr(data)[:200], "write lines such as `partition: gpu`"))
    site = Site()
    if not problems:
        try:
            site = Site.model_validate(data or {})
        except ValidationError as error:
            problems += [_in_words(path, item) for item in error.errors()]
    problems += check_options(site.options()) + check_extra(site.extra())
    for check, value in ((parse_time, site.time), (parse_nodes, site.nodes)):
        try:
            if value is not None:
                check(value)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems=problems)
    return site


def _in_words(path: Path, item: Any) -> Problem:
    key, value = ".".join(map(str, item["loc"])), repr(item.get("input"))[:200]
    if item["type"] != "extra_forbidden":
        return Problem(f"{path}: {key}: {item['msg']}", value, Site.model_fields[str(item["loc"][0])].description or "")
    close = nearest(key, Site.model_fields)
    known = f"keys: {', '.join(Site.model_fields)}"
    return Problem(f"{path}: {key}: unknown key", value, f"did you mean {' or '.join(close)}?" if close else known)
