"""The doctor's findings, each on a machine that has the trouble."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsgpt.cli.doctor import doctor
from dsgpt.errors import Problem
from dsgpt.launch import doctor as checks
from dsgpt.launch.doctor import Check, accelerators, host_limits, in_range, output_folder, requirements, slurm, space
from dsgpt.launch.hardware import Hardware

GIB = 1 << 30


@pytest.mark.parametrize(
    ("version", "wanted", "inside"),
    [
        ("2.13.0+cpu", ">=2.10,<2.14", True),
        ("2.10", ">=2.10.0", True),
        ("2.9.1", ">=2.10,<2.14", False),
        ("2.14.0", ">=2.10,<2.14", False),
        ("2.14.0.dev20260101", ">=2.10,<2.14", False),
        ("5.3", ">=5.3,<6", True),
        ("6.0.0rc1", ">=5.3,<6", False),
        ("1.0", "", True),
        ("1.2.1", "!=1.2.1", False),
        ("1.2.0", "==1.2", True),
    ],
)
def test_a_version_lies_in_its_range(version: str, wanted: str, inside: bool) -> None:
    assert in_range(version, wanted) is inside


def test_ranges_agree_with_what_installers_decide() -> None:
    specifiers = pytest.importorskip("packaging.specifiers", reason="packaging is the oracle")
    wanted = requirements()[1]
    assert {"torch", "deepspeed", "transformers"} <= wanted.keys()
    for name, spec in wanted.items():
        for version in (metadata.version(name), "0.1", "2.10", "2.14.0", "5.2.9", "99"):
            assert in_range(version, spec) == specifiers.SpecifierSet(spec).contains(version), (name, version, spec)


def test_a_package_that_is_missing_or_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"click": ">=999", "no-such-package-anywhere": ">=1", "rich": ">=1"}
    monkeypatch.setattr(checks, "requirements", lambda: (">=3.11", wanted))
    old, missing, good = checks.package_versions()
    assert (old.status, old.seen, old.do) == ("problem", metadata.version("click"), "pip install 'click>=999'")
    assert (missing.status, missing.seen) == ("problem", "not installed")
    assert good.status == "ok"


def test_gpus_that_torch_cannot_use_reach_the_report_with_their_remedy() -> None:
    hardware = Hardware(problems=[Problem("there are GPUs that torch cannot use", "driver 470", "update the driver")])
    (check,) = accelerators(hardware)
    assert (check.status, check.do) == ("problem", "update the driver")
    assert "driver 470" in check.seen


def test_an_output_folder_that_can_be_made_is_left_as_it_was(tmp_path: Path) -> None:
    found = {check.name: check for check in output_folder(tmp_path / "runs" / "new")}
    assert found["output folder"].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    (check,) = output_folder(tmp_path / "runs" / "new")
    assert check.status == "problem" and "not a folder" in check.seen


def test_an_output_folder_without_write_access_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)  # as root, file modes refuse nothing
    (check,) = output_folder(tmp_path)
    assert check.status == "problem" and "Permission denied" in check.seen
    assert list(tmp_path.iterdir()) == []


def _disk(free_bytes: int, inodes: int, free_inodes: int) -> os.statvfs_result:
    blocks = free_bytes // 4096
    return os.statvfs_result((4096, 4096, blocks, blocks, blocks, inodes, free_inodes, free_inodes, 0, 255))


@pytest.mark.parametrize(
    ("free", "inodes", "free_inodes", "statuses"),
    [
        (100 * GIB, 1_000_000, 900_000, ["ok", "ok"]),
        (5 * GIB, 1_000_000, 40_000, ["warning", "warning"]),
        (GIB // 2, 1_000_000, 10, ["problem", "problem"]),
        (100 * GIB, 0, 0, ["ok", "ok"]),
    ],
)
def test_a_full_disk_is_seen_in_bytes_and_in_inodes(free: int, inodes: int, free_inodes: int, statuses: list) -> None:
    assert [check.status for check in space(Path("/"), _disk(free, inodes, free_inodes))] == statuses


def test_scarce_memory_cpus_and_open_files_are_warnings_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 2048))
    found = host_limits(Hardware(num_gpus=8, cpu_count=8, memory_bytes=2 * GIB))
    assert [check.status for check in found] == ["warning"] * 3
    assert [check.do.split(":")[0] for check in found] == [
        "ask for more (--mem)",
        "ask for 16 or more (--cpus-per-task)",
        "ulimit -n 2048",
    ]


def test_shared_memory_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    assert checks.shared_memory(tmp_path / "none").status == "warning"


def test_a_slurm_job_is_described() -> None:
    seen = slurm({"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}).seen
    assert seen == "job 42: job_num_nodes=2, gpus_on_node=8"


def test_names_that_do_not_resolve_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket, "create_server", fail)
    assert [check.status for check in checks.names()] == ["problem", "warning"]


def test_a_deepspeed_that_does_not_import_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('numpy is too new')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = checks.deepspeed_import()
    assert check.status == "problem" and "numpy is too new" in check.seen


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 78)])
def test_the_command_prints_one_json_object_and_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    check = Check("disk", status, "[bold]full[/bold]", "free space")  # type: ignore[arg-type]
    monkeypatch.setattr("dsgpt.cli.doctor.examine_machine", lambda output_dir, progress=None: [check])
    as_json = CliRunner().invoke(doctor, ["--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {"ok": code == 0, "checks": [vars(check)]}
    as_table = CliRunner().invoke(doctor, [])
    assert as_table.exit_code == code
    assert "[bold]full[/bold]" in as_table.stdout and "-> free space" in as_table.stdout


@pytest.mark.slow
def test_the_doctor_examines_this_machine_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dsgpt.launch.doctor import examine_machine\n"
        "found = examine_machine(Path(sys.argv[1]))\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & sys.modules.keys()\n"
        "print(*(check.name for check in found), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"python", "torch", "accelerators", "deepspeed import", "free space", "shared memory", "localhost"}
    assert expected <= set(done.stdout.splitlines())
