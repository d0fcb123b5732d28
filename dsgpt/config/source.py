"""YAML text and `key=value` words, read into a tree whose leaves remember where they were written.

The dialect is the part of YAML on which 1.1 and 1.2 agree, plus `3e-4` as a number: what they read differently (on,
yes, duplicate keys) is refused instead of guessed, and aliases and tags, which a config does not need, are not there
to be abused. Reading through PyYAML's node tree instead of `safe_load` is what gives line numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dsgpt.errors import Problem

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Leaf:
    """A scalar, or an empty mapping or list, with its origin and the folder that relative paths in it count from."""

    value: Any
    origin: str
    base: Path


Tree: TypeAlias = "Leaf | dict[str, Tree] | list[Tree]"

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,300})$")  # reading thousands of digits takes quadratic time
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_AMBIGUOUS = {"on", "off", "yes", "no"}
_TAG = "tag:yaml.org,2002:"


class _NoAliases(yaml.YAMLError):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (typed in the base class; filled below)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _NoAliases(f"line {mark.line + 1}: aliases (*name) are not supported")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes a text in quotes wherever a YAML 1.1 reader or this module's would take it for something else."""


for _kind, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, list(_first))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def dump(data: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back unchanged."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_yaml(text: str, label: str, base: Path, problems: list[Problem], key: str = "") -> Tree | None:
    """The tree of one document (None for a document that was refused as a whole).

    `label` names the source in origins (a file's leaves get `label:LINE`), `key` the place where the tree will hang.
    What cannot be read is left out and described in `problems`.
    """
    reader = _Reader(label, base, problems)
    try:
        node = yaml.compose(text, Loader=_Loader)
        return Leaf(None, label, base) if node is None else reader.tree(node, key)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
    except RecursionError:
        where, what = "", "it is nested too deeply"
    problems.append(Problem(f"{key or label}: not valid YAML{where}", what, "correct the syntax"))
    return None


class _Reader:
    def __init__(self, label: str, base: Path, problems: list[Problem]):
        self.label, self.base, self.problems = label, base, problems

    def tree(self, node: yaml.Node, path: str) -> Tree | None:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            self.refuse(f"{path or self.label}: the tag {node.tag} is not supported", node, "remove the tag")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path) or self.leaf({}, node)
        items = [self.tree(item, f"{path}.{index}") for index, item in enumerate(node.value)]
        return [item for item in items if item is not None] or self.leaf([], node)

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Tree]:
        result: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            is_step = key_node.tag == _TAG + "int" and path == "fine_tuning.unfreeze_at"
            if key_node.tag != _TAG + "str" and not is_step:
                self.refuse(f"{path or self.label}: a key that is not a word", key_node, "write a key of the config")
                continue
            here = f"{path}.{key_node.value}" if path else key_node.value
            if key_node.value in result:
                self.refuse(f"{here}: the key stands here twice", key_node, "keep one of them")
                continue
            value = self.tree(value_node, here)
            if value is not None:
                result[key_node.value] = value
        return result

    def scalar(self, node: yaml.ScalarNode, path: str) -> Leaf | None:
        kind, text, lowered = node.tag.removeprefix(_TAG), node.value, node.value.lower().replace("_", "")
        if node.style is None and lowered in _AMBIGUOUS:
            what = f"{path or self.label}: YAML readers disagree whether this is a text or a truth value"
            self.refuse(what, node, "write true or false, or put it in quotes if it is a text")
            return None
        if kind == "str":
            return self.leaf(text, node)
        if kind == "null" and _NULL.match(text):
            return self.leaf(None, node)
        if kind == "bool" and _BOOL.match(text):
            return self.leaf(lowered == "true", node)
        if kind == "int" and _INT.match(text):
            return self.leaf(int(lowered), node)
        if kind == "float" and _FLOAT.match(text):
            return self.leaf(float(lowered.replace(".inf", "inf").replace(".nan", "nan")), node)
        self.refuse(f"{path or self.label}: the tag {node.tag} is not supported", node, "write a plain value")
        return None

    def leaf(self, value: Any, node: yaml.Node) -> Leaf:
        return Leaf(value, self.origin(node), self.base)

    def origin(self, node: yaml.Node) -> str:
        return self.label if self.label == COMMAND_LINE else f"{self.label}:{node.start_mark.line + 1}"

    def refuse(self, what: str, node: yaml.Node, do: str) -> None:
        seen = node.value if isinstance(node, yaml.ScalarNode) else "a mapping or list"
        self.problems.append(Problem(what, f"{seen} ({self.origin(node)})", do))


def parse_override(word: str, base: Path, problems: list[Problem]) -> Tree | None:
    """`key.path=value` as a tree that holds just this value, which is read as YAML; None and a problem if it cannot."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problems.append(Problem("not a setting", word, "write key.path=value, e.g. training.max_steps=100"))
        return None
    tree = parse_yaml(text, COMMAND_LINE, base, problems, key.strip())
    if tree is not None:
        for part in reversed(parts):
            tree = {part: tree}
    return tree


def merge(below: Tree | None, above: Tree) -> Tree:
    """`above` laid over `below`: mappings merge key by key, anything else is replaced as a whole.

    A mapping whose keys are all positions (`data.train.0.path=...` on the command line) changes entries of a list.
    """
    if isinstance(above, dict) and isinstance(below, dict):
        return {**below, **{key: merge(below.get(key), value) for key, value in above.items()}}
    if isinstance(above, dict) and isinstance(below, list) and all(_is_index(key, len(below)) for key in above):
        changed = list(below)
        for key, value in above.items():
            changed[int(key)] = merge(changed[int(key)], value)
        return changed
    if isinstance(above, Leaf) and above.value == {} and isinstance(below, dict):
        return below
    return above


def _is_index(key: str, length: int) -> bool:
    return key.isascii() and key.isdigit() and int(key) < length


def plain(tree: Tree) -> Any:
    """The values alone."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree.value


def leaves(tree: Tree, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Leaf]:
    """Path -> leaf, for every leaf below `tree`."""
    if isinstance(tree, Leaf):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[tuple[str | int, ...], Leaf] = {}
    for key, value in items:
        found.update(leaves(value, (*path, key)))
    return found
