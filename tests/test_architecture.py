"""The package keeps the structure that tests/architecture.py holds as data, and each rule finds what breaks it."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.architecture import (
    FLOORS,
    HEAVY,
    LIGHT,
    SIZE_EXCEPTIONS,
    TORCH_FREE,
    TORCH_SIDE,
    Module,
    below,
    call_findings,
    door_findings,
    floor_findings,
    imports,
    loaded,
    parse,
    read_package,
    size_findings,
)

CLONE = Path(__file__).parents[1]
MODULES = read_package(CLONE / "dsgpt")
TESTS = read_package(CLONE / "tests")
RULES = (floor_findings, door_findings, call_findings, size_findings)
LIBRARY_OF = {"yaml": "pyyaml", "pydantic_core": "pydantic"}


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"dsgpt.{name}" for name in names)


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {module.part for module in MODULES.values()} - {""} <= FLOORS.keys()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    assert [finding for module in MODULES.values() for finding in rule(module)] == []


def test_the_tests_keep_the_sizes_too() -> None:
    assert [finding for module in TESTS.values() for finding in size_findings(module)] == []


def test_every_size_exception_is_still_needed_and_has_a_reason() -> None:
    assert all(SIZE_EXCEPTIONS.values())
    assert {name.split(":")[0] for name in SIZE_EXCEPTIONS} <= MODULES.keys() | TESTS.keys()


@pytest.mark.parametrize(
    ("parts", "libraries"), [(LIGHT, HEAVY), (TORCH_FREE, TORCH_SIDE)], ids=["light", "torch-free"]
)
def test_importing_a_light_module_loads_no_heavy_library(parts: tuple[str, ...], libraries: set[str]) -> None:
    found = {
        f"{name} loads {library} through {through}"
        for name in MODULES
        if below(name, _dotted(parts))
        for library, through in loaded(name, MODULES).items()
        if library in libraries
    }
    assert found == set()


def test_every_module_says_what_it_is_for() -> None:
    modules = {**MODULES, **TESTS}
    silent = [name for name, one in modules.items() if one.text.strip() and not isinstance(_docstring(one), str)]
    assert silent == []


def _docstring(module: Module) -> str | None:
    first = module.tree.body[0]
    value = getattr(getattr(first, "value", None), "value", None)
    return value if isinstance(value, str) else None


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(CLONE / "setup.cfg", encoding="utf-8")
    return parser


def test_every_library_that_is_imported_is_declared() -> None:
    options, extras = _setup()["options"], _setup()["options.extras_require"]
    lines = "\n".join((options["install_requires"], extras["serve"], extras["eval"])).split("\n")
    declared = {re.split(r"[^\w.-]", line)[0].lower() for line in lines if line}
    imported = {target.split(".")[0]: name for name, module in MODULES.items() for target, _ in imports(module)}
    foreign = {
        library: name for library, name in imported.items() if library not in {"dsgpt", *sys.stdlib_module_names}
    }
    missing = {
        one: by for one, by in foreign.items() if LIBRARY_OF.get(one, one).lower().replace("_", "-") not in declared
    }
    assert missing == {}


def test_every_package_reaches_the_wheel() -> None:
    listed = set(_setup()["options"]["packages"].split())
    assert {name for name, module in MODULES.items() if module.is_package} == listed - {
        "dsgpt.ds_configs",
        "dsgpt.slurm",
    }


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (floor_findings, "dsgpt.launch.x", "from dsgpt.train import loop"),
        (floor_findings, "dsgpt.launch.x", "def f():\n    import dsgpt.planning"),
        (floor_findings, "dsgpt.data.x", "from dsgpt import model"),
        (floor_findings, "dsgpt.config.x", "from ..launch import hardware"),
        (floor_findings, "dsgpt.units", "import dsgpt.nowhere"),
        (floor_findings, "dsgpt", "from dsgpt.errors import DsgptError"),
        (door_findings, "dsgpt.train.x", "def f():\n    import deepspeed.comm as dist"),
        (door_findings, "dsgpt.evaluate", "from transformers import AutoTokenizer"),
        (door_findings, "dsgpt.checkpoint.store", "import transformers"),
        (door_findings, "dsgpt.launch.x", "def f():\n    import torch"),
        (door_findings, "dsgpt.model.x", "import pickle"),
        (door_findings, "dsgpt.train.x", "import os\nRANK = os.environ['RANK']"),
        (door_findings, "dsgpt.train.x", "from os import getenv"),
        (call_findings, "dsgpt.model.x", "torch.load(path)"),
        (call_findings, "dsgpt.model.x", "torch.load(path, weights_only=False)"),
        (call_findings, "dsgpt.model.x", "torch.save(state, path)"),
        (call_findings, "dsgpt.config.x", "yaml.load(text, Loader=yaml.Loader)"),
        (call_findings, "dsgpt.data.x", "np.load(path, allow_pickle=True)"),
        (call_findings, "dsgpt.launch.x", "subprocess.run(line, shell=flag)"),
        (call_findings, "dsgpt.launch.x", "os.system(line)"),
        (call_findings, "dsgpt.launch.x", "eval(text)"),
        (call_findings, "dsgpt.model.x", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        (size_findings, "dsgpt.data.x", "x = 1\n" * 401),
        (size_findings, "dsgpt.data.x", "def f():\n" + "    x = 1\n" * 80),
    ],
)
def test_a_rule_finds_what_breaks_it(rule: Callable[[Module], Iterator[str]], name: str, source: str) -> None:
    assert list(rule(parse(name, source)))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dsgpt.data.x", "from dsgpt.tokenizer import Tokenizer\nfrom dsgpt.data import indexed"),
        ("dsgpt.train.x", "import torch\nfrom dsgpt.evaluate import evaluate\nmodel.eval()"),
        ("dsgpt.checkpoint.export", "import transformers\ntorch.load(path, weights_only=True)"),
        ("dsgpt.launch.x", "import os\nos.environ.get('RANK')\nsubprocess.run(argv, shell=False)"),
        ("dsgpt.data.x", "def f():\n" + "    x = 1\n" * 79),
    ],
)
def test_a_rule_leaves_alone_what_is_allowed(name: str, source: str) -> None:
    assert [finding for rule in RULES for finding in rule(parse(name, source))] == []


def test_a_heavy_library_is_found_through_a_chain_and_a_packages_init() -> None:
    sources = {
        "dsgpt": "",
        "dsgpt.cli.x": "from dsgpt.data.reader import read",
        "dsgpt.data": "from dsgpt.data import fast",
        "dsgpt.data.reader": "def f():\n    import transformers",
        "dsgpt.data.fast": "try:\n    import torch\nexcept ImportError:\n    pass",
    }
    modules = {name: parse(name, text, name in ("dsgpt", "dsgpt.data")) for name, text in sources.items()}
    assert loaded("dsgpt.cli.x", modules) == {"torch": "dsgpt.data.fast"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config", "validate", "quickstart"], ["train", "--help"]], ids=" ".join
)
def test_a_light_command_imports_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-c", "from dsgpt.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CLONE)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "dsgpt" in imported and "click" in imported
    assert imported & HEAVY == set()
