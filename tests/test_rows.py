"""Every row of the fault matrix stands in tests/README.md, with a test that exists, or with a reason."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = ((1, 4), (101, 115), (201, 210), (301, 312), (401, 414), (501, 507), (601, 618), (701, 718), (801, 810))
GROUPS += ((901, 904), (910, 920), (951, 953))
ROWS = [f"T{number:03d}" for first, last in GROUPS for number in range(first, last + 1)]
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(test_\w+))?")


def table(text: str) -> dict[str, str]:
    """Row -> what stands beside it."""
    return dict(re.findall(r"^\| (T\d{3}) \|.*?\| (.+?) \|$", text, flags=re.MULTILINE))


def missing_tests(text: str) -> list[str]:
    found = []
    for path, name in TEST.findall(text):
        file = ROOT / path
        if not file.is_file() or (name and f"def {name}(" not in file.read_text("utf-8")):
            found.append(f"{path}::{name}")
    return found


def test_every_row_has_a_test_that_exists_or_a_reason():
    where = table((ROOT / "tests/README.md").read_text("utf-8"))
    assert [row for row in ROWS if row not in where] == [] and sorted(where) == ROWS
    assert [(row, text) for row, text in where.items() if missing_tests(text)] == []
    commands = {"protocol", "kill", "storage", "corruption", "controls", "hostile", "topology"}
    commands |= {"slurm_timelimit", "slurm_signals", "slurm_nodeloss"}
    commands |= {"hostile_names", "hosts_killed", "kill_moving", "submit_names"}
    for row, text in where.items():
        named = re.findall(r"`python -m tests\.faults (\w+)`", text)
        assert set(named) <= commands, row
        assert TEST.search(text) or named or len(text.split()) >= 3, f"{row}: neither a test nor a reason"


def test_each_promise_of_the_readme_names_its_test():
    section = (ROOT / "README.md").read_text("utf-8").split("\n## Promises\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!what|---)(.+?) \| (.+?) \|$", section, flags=re.MULTILINE)
    assert len(rows) >= 12
    for promise, tests in rows:
        assert TEST.search(tests), promise
        assert missing_tests(tests) == [], promise


def test_a_missing_row_and_a_missing_test_are_found():
    text = "| T001 | same run twice | tests/test_rows.py::test_nothing_like_it |\n"
    assert table(text) == {"T001": "tests/test_rows.py::test_nothing_like_it"}
    assert missing_tests(text) == ["tests/test_rows.py::test_nothing_like_it"]
    assert missing_tests("tests/test_rows.py::test_a_missing_row_and_a_missing_test_are_found") == []
