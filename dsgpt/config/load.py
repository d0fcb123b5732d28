"""YAML files and `key=value` words in, one checked RunConfig out, with the origin of every value.

    loaded = load_config(["gpt2-124m", "cluster.yaml"], ["training.max_steps=100"])

Later sources win. Everything that is wrong is collected over all sources and raised at once: what cannot be used is
replaced by a stand-in so that the rest can still be checked, and checks that would only repeat the complaint are
dropped. That is more work than stopping at the first error, and saves a queueing time per typo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsgpt.config.checks import check, ineffective_settings
from dsgpt.config.explain_errors import Location, explain, without
from dsgpt.config.schema import RunConfig
from dsgpt.config.shipped import RUNS_FOLDER, find_config, is_path
from dsgpt.config.source import Leaf, Tree, dump, leaves, merge, parse_override, parse_yaml, plain
from dsgpt.errors import ConfigError, Problem

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, where each value came from (dotted key -> "default", "file.yaml:LINE", "command line"), and
    what in it has no effect."""

    config: RunConfig
    origins: dict[str, str]
    warnings: list[str]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words as (config files or names, key=value overrides)."""
    overrides = [word for word in arguments if _OVERRIDE.match(word) and not Path(word).exists()]
    return [word for word in arguments if word not in overrides], overrides


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge and check. `paths` are files or names of shipped configs, `overrides` words like `run.seed=7`.

    Relative paths count from the file they are written in; on the command line, and in shipped configs, from the
    working folder. Raises ConfigError with every problem of every source.
    """
    problems: list[Problem] = []
    tree: Tree = {}
    if not paths:
        problems.append(Problem("no config file given", do="name a YAML file or a shipped config (dsgpt config ls)"))
    for name in paths:
        parsed = _read(name, problems)
        tree = merge(tree, parsed) if parsed is not None else tree
    unread = bool(problems)
    for word in overrides:
        parsed = parse_override(word, Path.cwd(), problems)
        tree = merge(tree, parsed) if parsed is not None else tree

    origins = leaves(tree)
    data = _with_absolute_paths(plain(tree), origins)
    config, tainted = _validate(data, origins, problems)
    if config is not None:
        problems += [finding.problem for finding in check(config) if not tainted.intersection(finding.keys)]
    if config is None or problems:
        # Keys of a file that could not be read are missing for that reason alone: do not list them as well.
        told = [problem for problem in problems if not (unread and "required" in problem.what)]
        raise ConfigError(problems=told)
    named = _named_origins(config, origins)
    written = {key for key, origin in named.items() if origin != "default"}
    return LoadedConfig(config, named, ineffective_settings(config, written))


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML; `load_config` reads it back to an equal config from any folder."""
    return dump(config.model_dump(mode="json"))


def flatten(value: Any, path: tuple[str | int, ...] = ()) -> dict[str, Any]:
    """Nested values -> dotted key -> value. A list of scalars is one value, a list of mappings is walked into."""
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {".".join(map(str, path)): value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(flatten(item, (*path, key)))
    return flat


def _read(name: str | Path, problems: list[Problem]) -> Tree | None:
    try:
        path = find_config(name)
        text = path.read_text(encoding="utf-8")
    except ConfigError as error:
        problems += error.problems
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(f"cannot read the config {name}", str(error), "give a readable UTF-8 YAML file"))
        return None
    folder = path.resolve().parent
    tree = parse_yaml(text, path.name, Path.cwd() if folder == RUNS_FOLDER else folder, problems)
    if isinstance(tree, Leaf) and tree.value in (None, {}):
        return {}
    if tree is not None and not isinstance(tree, dict):
        problems.append(Problem(f"{name} is not a config", "it has no keys", "write sections such as `training:`"))
        return None
    return tree


def _with_absolute_paths(data: Any, origins: dict[tuple[str | int, ...], Leaf]) -> Any:
    """`data` with every relative path made absolute against the folder of the source that wrote it."""

    def absolute(keys: tuple[str | int, ...], root: Path | None = None) -> Path | None:
        leaf = origins.get(keys)
        if leaf is None or not isinstance(leaf.value, str):
            return None
        return Path(leaf.base, *([root] if root else []), Path(leaf.value).expanduser()).resolve()

    def put(keys: tuple[str | int, ...], value: str) -> None:
        target = data
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    root = absolute(("data", "root"))
    for keys in origins:
        match keys:
            case ("run", "output_dir") | ("tokenizer", "path") | ("data", "root"):
                path = absolute(keys)
            case ("data", "train" | "validation", _, "path"):
                path = absolute(keys, root)
            case ("deepspeed",) if is_path(str(origins[keys].value)):
                path = absolute(keys)
            case _:
                path = None
        if path is not None:
            put(keys, str(path))
    init = origins.get(("model", "init_from"))
    if init is not None and isinstance(init.value, str):
        put(("model", "init_from"), _absolute_init(init.value, init.base))
    return data


def _absolute_init(value: str, base: Path) -> str:
    """hf:NAME stays a hub name unless a folder of that name is there; the other kinds are paths."""
    kind, colon, name = value.partition(":")
    if kind not in ("hf", "checkpoint", "deepspeed", "fork") or not name:
        return value
    path = Path(base, Path(name).expanduser()).resolve()
    return f"{kind}{colon}{path}" if kind != "hf" or name[0] in "./~" or path.is_dir() else value


def _validate(data: Any, origins: dict[Location, Leaf], problems: list[Problem]) -> tuple[RunConfig | None, set[str]]:
    """The config (None where even stand-ins do not help) and the dotted keys whose values are stand-ins."""
    data = {key: {} if value is None and key in _SECTIONS else value for key, value in data.items()}
    try:
        return RunConfig.model_validate(data), set()
    except ValidationError as error:
        explained = explain(error, data, origins)
    problems += [problem for item in explained for problem in item.problems]
    tainted = {key for item in explained for key in item.keys}
    try:
        return RunConfig.model_validate(without(data, [item.location for item in explained])), tainted
    except ValidationError:
        return None, tainted


_SECTIONS = {name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")}


def _named_origins(config: RunConfig, origins: dict[Location, Leaf]) -> dict[str, str]:
    written: dict[str, str] = {}
    for location, leaf in origins.items():
        written[".".join(map(str, location))] = leaf.origin
        if isinstance(location[-1], int):  # an entry of a list of scalars: the list is the value that is explained
            written.setdefault(".".join(map(str, location[:-1])), leaf.origin)
    return {key: written.get(key, "default") for key in flatten(config.model_dump(mode="json"))}
