"""The frame of the benchmarks and faults: lists, prints, judges; and the protocol's fault matrix in small."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

import tests.benchmarks
import tests.faults
from dsgpt.checkpoint import commit
from tests import frame
from tests.faults import protocol
from tests.frame import Outcome, Row, main


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of entries with one that holds and one whose must is the number of trials."""
    folder = tmp_path / "entries_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Entries."""\n')
    (folder / "__main__.py").write_text("raise AssertionError\n")
    (folder / "_helper.py").write_text("raise AssertionError\n")
    entry = '"""{about}"""\nfrom tests.frame import Outcome, Row\ndef run(trials, seed):\n    return {outcome}\n'
    good, strict = 'Outcome([Row("seconds", 1.5, "s", at_most=2)], 3)', 'Outcome([Row("count", trials, at_least=9)], 1)'
    (folder / "good.py").write_text(entry.format(about="Good: holds.", outcome=good))
    (folder / "strict.py").write_text(entry.format(about="Strict.", outcome=strict))
    monkeypatch.syspath_prepend(str(tmp_path))
    import entries_for_test  # type: ignore[import-not-found]

    return entries_for_test


def test_without_a_name_the_entries_are_listed(package: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(package, []) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["good", "Good:", "holds."],
        ["strict", "Strict."],
    ]


def test_each_entry_ends_with_one_json_line(package: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(package, ["good", "--seed", "7"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line.pop("versions").keys() >= {"python", "torch", "deepspeed"}
    assert line == {
        "name": "good",
        "value": {"seconds": 1.5},
        "must": {"seconds": "<= 2"},
        "holds": True,
        "trials": 3,
        "seed": 7,
    }


def test_a_must_that_fails_ends_with_1_whatever_the_others_say(package: ModuleType) -> None:
    assert main(package, ["strict", "good", "--trials", "8"]) == 1
    assert main(package, ["strict", "good", "--trials", "9"]) == 0


def test_an_unknown_entry_is_refused_with_the_names_there_are(
    package: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(package, ["god"])
    assert end.value.code == 2
    assert "good, strict" in capsys.readouterr().err


def test_every_shipped_entry_says_what_it_is_for() -> None:
    for package, name in ((tests.benchmarks, "startup"), (tests.faults, "protocol")):
        loaded = {entry: load() for entry, load in frame.entries(package).items()}
        assert name in loaded
        assert all(module.__doc__ and callable(module.run) for module in loaded.values())


def test_a_row_without_a_must_always_holds() -> None:
    assert Row("context", 1e9).holds and not Row("context", 1e9).must
    assert not Row("zero", 1, at_most=0).holds
    assert Outcome([], 0).rows == []


@pytest.mark.slow
def test_the_commit_protocol_survives_kills_at_random_instants(tmp_path: Path) -> None:
    """T103: 500 of the 5,000 kills of `python -m tests.faults protocol`."""
    rounds, broken = protocol.random_instants(tmp_path / "checkpoints", kills=500, seed=1)
    assert broken == []
    assert rounds >= 4  # the kills did not keep it from ever committing
    assert protocol.left_behind(tmp_path / "checkpoints") == []


@pytest.mark.slow
def test_the_fault_matrix_catches_a_commit_without_a_rename(tmp_path: Path) -> None:
    _, broken = protocol.every_point(tmp_path / "checkpoints", protocol.BROKEN[0])
    assert "visible without a manifest" in broken[0]


def test_the_fault_matrix_catches_a_lost_commit_and_a_changed_byte(tmp_path: Path) -> None:
    acknowledged, killed = protocol.trial(tmp_path, 2, commit.commit)
    assert (acknowledged, killed) == (2, False)
    assert protocol.broken_promises(tmp_path, 2) == []
    assert protocol.broken_promises(tmp_path, 3) == ["step 3 was committed and the newest is 2"]
    shard = tmp_path / "step-00000002" / "rank-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert protocol.broken_promises(tmp_path, 2) == ["step 2: file content differs from its hash"]
