"""pydantic's errors in the words of someone who has to correct a YAML file: key, value, place, remedy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from pydantic import ValidationError

from dsgpt.config.fields import Section
from dsgpt.config.schema import RunConfig
from dsgpt.config.shipped import nearest
from dsgpt.config.source import Leaf
from dsgpt.errors import Problem

Location: TypeAlias = tuple[str | int, ...]

# Stand-ins for required keys that are missing or unusable, so that the rest of the config can still be checked.
_STAND_INS: dict[Location, Any] = {
    ("run", "output_dir"): ".",
    ("data", "train"): [{"path": "."}],
    ("optimizer", "learning_rate"): 1.0,
    ("training", "seq_length"): 1,
    ("training", "global_batch_size"): 1,
}


@dataclass(frozen=True)
class Explained:
    """Everything wrong at one place: the problems, and the keys that later checks must not complain about again."""

    location: Location
    problems: list[Problem]
    keys: set[str]


def explain(error: ValidationError, data: Any, origins: dict[Location, Leaf]) -> list[Explained]:
    """One entry per place. `data` is what was validated, `origins` where each of its leaves was written."""
    messages: dict[Location, list[Any]] = {}
    for item in error.errors():
        location = tuple(item["loc"])
        if item["type"] != "missing":
            location = _existing(location, data)
        messages.setdefault(location, []).append(item)
    return [_explain_place(location, items, data, origins) for location, items in messages.items()]


def without(data: Any, locations: list[Location]) -> Any:
    """A copy of `data` without what stands at `locations`, required keys replaced by stand-ins."""
    result = copy.deepcopy(data)
    for location in locations:
        parent = _at(result, location[:-1])
        if isinstance(parent, dict):
            parent.pop(location[-1], None)
        elif isinstance(parent, list) and len(location) > 1:
            _at(result, location[:-2])[location[-2]] = []  # a list with a hole would renumber its other entries
    for location, value in _STAND_INS.items():
        parent = result.setdefault(location[0], {})
        if isinstance(parent, dict) and (not parent.get(location[1]) or _bad_entries(parent[location[1]])):
            parent[location[1]] = value
    return result


def _bad_entries(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, dict) and "path" in item for item in value)


def _explain_place(
    location: Location, items: list[dict[str, Any]], data: Any, origins: dict[Location, Leaf]
) -> Explained:
    dotted = ".".join(map(str, location))
    kind = items[0]["type"]
    if kind == "extra_forbidden":
        return _unknown_key(location, data, origins)
    keys = {dotted} | {f"{dotted}.{name}" for name in _section_keys(location)}
    description = _description(location)
    if kind == "missing":
        do = f"set {dotted}" + (f": {description}" if description else "")
        return Explained(location, [Problem(f"{dotted}: this key is required", do=do)], keys)
    value = _at(data, location)
    texts = dict.fromkeys(_in_words(item) for item in items)
    what = f"{dotted} {' or '.join(texts)}".replace(" or must be", " or")
    do = f"correct it ({description})" if description else "correct it"
    choices = [choice for item in items for choice in _choices(item)]
    close = nearest(value, choices) if isinstance(value, str) else []
    return Explained(
        location,
        [Problem(what, _seen(value, location, origins), f"did you mean {' or '.join(close)}?" if close else do)],
        keys,
    )


def _unknown_key(location: Location, data: Any, origins: dict[Location, Leaf]) -> Explained:
    *parents, key = location
    siblings = _section_keys(tuple(parents))
    prefix = "".join(f"{part}." for part in parents)
    close = [prefix + name for name in nearest(str(key), siblings)] or _elsewhere(str(key))
    if close:
        do = f"did you mean {' or '.join(close)}?"
    elif siblings:
        do = f"remove it; keys of {prefix.rstrip('.') or 'the config'}: {', '.join(siblings)}"
    else:
        do = f"remove it; {prefix.rstrip('.')} has no keys yet"
    problem = Problem(f"{prefix}{key}: unknown key", _seen(_at(data, location), location, origins), do)
    return Explained(location, [problem], {f"{prefix}{key}", *close})


def _elsewhere(key: str) -> list[str]:
    """Full names of keys of other sections: the key may only stand in the wrong place."""
    names = {name: [*_names((name,))] for name in RunConfig.model_fields}
    everywhere = [full for group in names.values() for full in group]
    by_last = {full.rsplit(".", 1)[-1]: full for full in reversed(everywhere)}
    return [by_last[name] for name in nearest(key, by_last)]


def _names(location: Location) -> list[str]:
    keys = _section_keys(location)
    own = ".".join(map(str, location))
    return [full for key in keys for full in _names((*location, key))] if keys else [own]


def _section_at(location: Location) -> type[Section] | None:
    """The section whose keys stand below `location`; an entry of a list counts as its element type."""
    section: type[Section] | None = RunConfig
    field_type: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            field_type = next(iter(get_args(field_type)), None)
        elif section is None or part not in section.model_fields:
            return None
        else:
            field_type = section.model_fields[part].annotation
        section = field_type if isinstance(field_type, type) and issubclass(field_type, Section) else None
    return section


def _section_keys(location: Location) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section is not None else []


def _description(location: Location) -> str:
    section = _section_at(location[:-1])
    field = section.model_fields.get(str(location[-1])) if section is not None and location else None
    return (field.description or "") if field is not None else ""


def _existing(location: Location, data: Any) -> Location:
    """The part of pydantic's location that exists in the data; the rest names branches of a union."""
    found: list[str | int] = []
    for part in location:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            found.append(part)
            data = data[part]  # type: ignore[index]
        else:
            break
    return tuple(found)


def _at(data: Any, location: Location) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _in_words(item: dict[str, Any]) -> str:
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a section with keys of its own"
    if item["type"] in ("tuple_type", "list_type"):
        return "must be a list"
    text: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_type":
        return "must be a text: put it in quotes if it is meant as one"
    return text.replace("Input should be", "must be").replace("a valid ", "a ").replace("integer", "whole number")


def _choices(item: dict[str, Any]) -> list[str]:
    expected = item.get("ctx", {}).get("expected", "") if item["type"] == "literal_error" else ""
    return [word.strip("'") for word in expected.replace(" or ", ", ").split(", ") if word]


def _seen(value: Any, location: Location, origins: dict[Location, Leaf]) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    origin = next((leaf.origin for place, leaf in origins.items() if place[: len(location)] == location), "")
    return f"{text[:200]} ({origin})" if origin else text[:200]
