"""The structure of the package as data, and the walk over its syntax trees that finds what breaks it.

Used by tests/test_architecture.py; kept apart so that each rule can also be tried on source that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# An import goes to a lower floor, or along one of the sideways arrows.
FLOORS = {
    **dict.fromkeys(("cli", "quickstart", "applications", "__main__"), 7),
    **dict.fromkeys(("train", "serve"), 6),
    **dict.fromkeys(("evaluate", "generate"), 5),
    **dict.fromkeys(("engine", "checkpoint", "probe"), 4),
    **dict.fromkeys(("tokenizer", "data", "model", "optimizer", "loss_scale", "partitioned", "nodes", "device"), 3),
    **dict.fromkeys(("distributed", "planning", "launch", "report", "fetch", "commands"), 2),
    **dict.fromkeys(("config", "process", "lease", "verdict", "watchdog", "rendezvous", "hub"), 1),
    **dict.fromkeys(("errors", "units"), 0),
}
SIDEWAYS = {
    ("watchdog", "verdict"),
    ("watchdog", "process"),
    ("verdict", "process"),
    ("lease", "process"),
    ("data", "tokenizer"),
    ("evaluate", "generate"),
    ("checkpoint", "engine"),
    ("cli", "quickstart"),
    ("cli", "applications"),
    ("__main__", "cli"),
}

# The only modules (and what lies below them) that may import a library at all.
DOORS = {
    "deepspeed": ("dsgpt.engine", "dsgpt.checkpoint"),
    "transformers": ("dsgpt.model", "dsgpt.tokenizer", "dsgpt.checkpoint.export"),
    "datasets": ("dsgpt.data",),
    "peft": ("dsgpt.model",),
    "huggingface_hub": ("dsgpt.hub",),
    "lm_eval": ("dsgpt.evaluate",),
    "rouge_score": ("dsgpt.evaluate",),
    "starlette": ("dsgpt.serve",),
    "uvicorn": ("dsgpt.serve",),
}
# dsgpt.process: a rank has to know its number before torch is imported.
ENVIRONMENT = ("dsgpt.process", "dsgpt.commands", "dsgpt.distributed", "dsgpt.launch", "dsgpt.cli", "dsgpt.quickstart")

# Importing these, or anything they import in turn, loads none of the heavy libraries; a function may do so later.
LIGHT = (
    "errors",
    "units",
    "process",
    "lease",
    "verdict",
    "watchdog",
    "hub",
    "fetch",
    "config",
    "planning",
    "launch",
    "report",
    "cli",
    "quickstart",
    "checkpoint.base_model",
    "checkpoint.commit",
    "checkpoint.deepspeed_files",
    "checkpoint.locate",
    "checkpoint.model_card",
    "checkpoint.retention",
    "checkpoint.starts",
    "train.cancel",
    "train.run_logs",
    "train.runs",
    "train.status",
    "train.tail",
)
HEAVY = {
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
}
TORCH_FREE = (*LIGHT, "tokenizer", "data")
TORCH_SIDE = {"torch", "deepspeed", "transformers", "datasets", "peft"}
# These never import torch, not even inside a function: they start another process for what needs it.
NEVER_TORCH = (*(name for name in LIGHT if name not in ("cli", "quickstart")), "tokenizer", "data")

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "imp"}
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "__import__"), "executes text"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "is a shell"),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), "is not yaml.safe_load"),
    "torch.save": "writes pickle; write safetensors",
}
# keyword -> the only value it may have where it is written at all
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}

# "dsgpt.module:function" that may use a keyword with another value -> which one and why
KEYWORD_EXCEPTIONS = {
    "dsgpt.model.hf_import:execute_pickled": (
        "weights_only",
        "a person trusts this very file, with --trust-checkpoint or model.trust_checkpoint",
    ),
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
SIZE_EXCEPTIONS: dict[str, str] = {}  # "dsgpt.module" or "dsgpt.module:function" -> the reason


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its text, its tree, and whether it is a package's __init__."""

    name: str
    text: str
    tree: ast.Module
    is_package: bool = False

    @property
    def part(self) -> str:
        """The part of the package it belongs to: 'data' for dsgpt.data.indexed, '' for dsgpt itself."""
        return self.name.split(".")[1] if "." in self.name else ""


def parse(name: str, text: str, is_package: bool = False) -> Module:
    return Module(name, text, ast.parse(text), is_package)


def read_package(folder: Path) -> dict[str, Module]:
    """All modules below a package folder by dotted name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(folder.parent).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = parse(name, path.read_text(encoding="utf-8"), is_package)
    return modules


def below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def imports(module: Module, at_import_only: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported; a `from a import b` gives a and a.b. Type-checking blocks are not."""
    todo: list[ast.AST] = [module.tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and at_import_only:
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def loaded(start: str, modules: Mapping[str, Module]) -> dict[str, str]:
    """Every library that importing `start` loads -> the module of ours that imports it."""
    todo, seen, libraries = [start], set(), {}
    while todo:
        name = todo.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        todo.extend(".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1))
        for target, _ in imports(modules[name], at_import_only=True):
            if target.split(".")[0] == "dsgpt":
                todo.append(target)
            else:
                libraries.setdefault(target.split(".")[0], name)
    return libraries


def floor_findings(module: Module) -> Iterator[str]:
    """Imports of dsgpt that go up or sideways."""
    for target, line in imports(module):
        parts = target.split(".")
        if parts[0] != "dsgpt" or len(parts) < 2 or parts[1] == module.part or parts[1] == "__version__":
            continue
        if not module.part:
            yield f"{module.name}:{line} imports {target}: importing dsgpt imports nothing else"
        elif parts[1] not in FLOORS:
            yield f"{module.name}:{line} imports {target}, which has no floor"
        elif FLOORS[parts[1]] >= FLOORS[module.part] and (module.part, parts[1]) not in SIDEWAYS:
            yield f"{module.name}:{line} (floor {FLOORS[module.part]}) imports {target} (floor {FLOORS[parts[1]]})"


def door_findings(module: Module) -> Iterator[str]:
    """Libraries imported past their door, torch where it never is, and the environment read elsewhere."""
    for target, line in imports(module):
        library = target.split(".")[0]
        if library in DOORS and not below(module.name, DOORS[library]):
            yield f"{module.name}:{line} imports {library}, whose doors are {', '.join(DOORS[library])}"
        if library == "torch" and below(module.name, tuple(f"dsgpt.{name}" for name in NEVER_TORCH)):
            yield f"{module.name}:{line} imports torch"
        if library in FORBIDDEN_MODULES:
            yield f"{module.name}:{line} imports {library}, which executes what it reads"
    for node in ast.walk(module.tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            name = next((f"os.{alias.name}" for alias in node.names if alias.name in ("environ", "getenv")), "")
        if name in ("os.environ", "os.environb", "os.getenv", "os.putenv") and not below(module.name, ENVIRONMENT):
            yield f"{module.name}:{node.lineno} reads {name}"


def call_findings(module: Module) -> Iterator[str]:
    """Calls that execute text, start a shell or read pickle."""
    excepted = {
        (id(call), KEYWORD_EXCEPTIONS[name][0])
        for function in ast.walk(module.tree)
        if (name := f"{module.name}:{getattr(function, 'name', '')}") in KEYWORD_EXCEPTIONS
        for call in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{module.name}:{node.lineno} {called}"
        if called in FORBIDDEN_CALLS:
            yield f"{where} {FORBIDDEN_CALLS[called]}"
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.load" and "weights_only" not in keywords:
            yield f"{where} without weights_only=True"
        for name, only in KEYWORDS.items():
            value = keywords.get(name)
            allowed = isinstance(value, ast.Constant) and value.value is only
            if value is not None and not allowed and (id(node), name) not in excepted:
                yield f"{where} with {name}={ast.unparse(value)}"


def size_findings(module: Module) -> Iterator[str]:
    """Files and functions that outgrew their limit."""
    lines = len(module.text.splitlines())
    if lines > MAX_FILE_LINES and module.name not in SIZE_EXCEPTIONS:
        yield f"{module.name} has {lines} lines"
    for node in ast.walk(module.tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES and f"{module.name}:{node.name}" not in SIZE_EXCEPTIONS:
            yield f"{module.name}:{node.lineno} {node.name} has {lines} lines"
