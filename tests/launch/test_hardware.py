"""What `detect` makes of machines built from files, environment variables and a stand-in for nvidia-smi."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsgpt.launch import hardware
from dsgpt.launch.hardware import GpuSigns, Hardware, cpu_count, examine, gpu_signs, memory_bytes, with_gpus

GIB = 1 << 30
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 85_520_809_984}


def _answer(gpus: list[dict[str, Any]], cuda: str | None = "12.8", **more: Any) -> dict[str, Any]:
    return {"torch": "2.13.0", "cuda": cuda, "hip": None, "gpus": gpus, "bf16": bool(gpus), "warnings": [], **more}


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _nvidia_smi(folder: Path, output: str, code: int = 0) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'EOF'\n{output}\nEOF\nexit {code}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.fixture
def never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(environment: Any) -> Any:
        raise AssertionError("torch was asked on a machine without any sign of a GPU")

    monkeypatch.setattr(hardware, "ask_torch", refuse)


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}])
def test_no_sign_of_a_gpu_costs_no_second_python(never_ask: None, tmp_path: Path, environment: dict[str, str]) -> None:
    found = examine({"PATH": "", **environment}, tmp_path)
    assert (found.device, found.num_gpus, found.problems) == ("cpu", 0, [])


def test_amd_graphics_of_a_laptop_are_worth_a_look_and_no_problem(tmp_path: Path) -> None:
    signs = gpu_signs({"PATH": ""}, _machine(tmp_path, {"dev/kfd": ""}))
    assert signs.look
    assert with_gpus(Hardware(), signs, _answer([], cuda=None)).problems == []


def test_the_smallest_gpu_and_the_driver_are_reported(tmp_path: Path) -> None:
    environment = _nvidia_smi(tmp_path / "bin", "550.54.15, NVIDIA H100 80GB HBM3\n550.54.15, NVIDIA H100 80GB HBM3")
    signs = gpu_signs(environment, tmp_path)
    small = {"name": "NVIDIA A30", "memory": 24 * GIB}
    found = with_gpus(Hardware(driver=signs.driver), signs, _answer([H100, small]))
    assert (found.device, found.num_gpus, found.gpu_name) == ("cuda", 2, "NVIDIA A30")
    assert (found.gpu_memory_bytes, found.bf16, found.driver) == (24 * GIB, True, "550.54.15")
    assert found.torch_build == "2.13.0 (CUDA 12.8)"
    assert found.problems == []


def test_nvidia_smi_without_gpus_on_a_login_node_is_no_problem(tmp_path: Path) -> None:
    environment = _nvidia_smi(tmp_path / "bin", "No devices were found", code=6)
    signs = gpu_signs(environment, tmp_path)
    assert signs.look and not signs.evidence
    assert with_gpus(Hardware(), signs, _answer([])).problems == []


KERNEL = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Tue Mar 5 22:42:15 UTC 2024\nGCC version: 12.3.0"
DRIVER = {"proc/driver/nvidia/version": KERNEL}
WITH_GPU = {**DRIVER, "dev/nvidia0": ""}
IN_CONTAINER = {**DRIVER, "proc/driver/nvidia/gpus/0000:01:00.0/information": ""}
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)"


@pytest.mark.parametrize(
    ("files", "environment", "answer", "remedy"),
    [
        (WITH_GPU, {}, _answer([], cuda=None), "built for CPUs only"),
        (WITH_GPU, {}, _answer([], warnings=[TOO_OLD]), "older CUDA than 12.8"),
        (WITH_GPU, {}, _answer([], error="RuntimeError: unknown"), "run `nvidia-smi`"),
        (IN_CONTAINER, {}, _answer([]), "docker run --gpus all"),
        ({}, {"SLURM_GPUS_ON_NODE": "4"}, _answer([]), "no NVIDIA driver is loaded"),
        ({}, {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, _answer([]), "unset CUDA_VISIBLE_DEVICES"),
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}, _answer([]), "no NVIDIA driver is loaded"),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_problem_with_its_remedy(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], answer: dict[str, Any], remedy: str
) -> None:
    signs = gpu_signs({"PATH": "", **environment}, _machine(tmp_path, files))
    (problem,) = with_gpus(Hardware(driver=signs.driver), signs, answer).problems
    assert remedy in problem.do and "device=cpu" in problem.do
    assert "torch 2.13.0" in problem.seen and f"driver {signs.driver or 'none'}" in problem.seen


def test_a_gpu_missing_from_the_allocation_is_a_problem(tmp_path: Path) -> None:
    signs = gpu_signs({"PATH": "", "SLURM_GPUS_ON_NODE": "4"}, tmp_path)
    (problem,) = with_gpus(Hardware(), signs, _answer([H100] * 3)).problems
    assert problem.what == "torch can use 3 of 4 GPUs"


def test_a_task_bound_to_one_gpu_of_the_allocation_is_no_problem(tmp_path: Path) -> None:
    signs = gpu_signs({"PATH": "", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, tmp_path)
    assert with_gpus(Hardware(), signs, _answer([H100])).problems == []


def test_what_the_deepspeed_launcher_sets_for_a_cpu_rank_is_no_sign_of_a_gpu(tmp_path: Path) -> None:
    assert not gpu_signs({"PATH": "", "CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "0"}, tmp_path).look


def test_a_torch_that_crashes_or_hangs_becomes_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_PROBE", "import os; os.abort()")
    answer, failure = hardware.ask_torch(os.environ)
    assert answer is None and "signal 6" in failure
    monkeypatch.setattr(hardware, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(hardware, "PROBE_SECONDS", 0.2)
    answer, failure = hardware.ask_torch(os.environ)
    (problem,) = with_gpus(Hardware(), GpuSigns(), answer, failure).problems
    assert problem.what == "torch does not start" and "longer than" in problem.seen


def test_torch_answers_as_it_does_here() -> None:
    import torch

    answer, failure = hardware.ask_torch(os.environ)
    assert failure == "" and answer is not None
    assert (answer["torch"], answer["cuda"]) == (torch.__version__, torch.version.cuda)
    assert len(answer["gpus"]) == torch.cuda.device_count()


def test_a_module_planted_in_the_working_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("open('canary', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "_PROBE", "try:\n    import torch\nfinally:\n    print('PROBE{}')")
    hardware.ask_torch({"PATH": os.environ["PATH"]})
    assert not (tmp_path / "canary").exists()


def test_cpus_are_the_affinity_cut_to_the_quota_of_every_group_above(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert cpu_count(tmp_path) == allowed
    _machine(tmp_path, {"proc/self/cgroup": "0::/slurm/job\n", "sys/fs/cgroup/slurm/job/cpu.max": "max 100000\n"})
    assert cpu_count(tmp_path) == allowed
    _machine(tmp_path, {"sys/fs/cgroup/slurm/cpu.max": "150000 100000\n"})  # one and a half CPUs: one whole one
    assert cpu_count(tmp_path) == 1


def test_memory_is_the_machine_cut_to_the_tightest_group(tmp_path: Path) -> None:
    total = "MemTotal:       16777216 kB\nMemFree: 1 kB\n"
    _machine(tmp_path, {"proc/meminfo": total, "proc/self/cgroup": "0::/a/b\n"})
    assert memory_bytes(tmp_path) == 16 * GIB
    groups = tmp_path / "sys/fs/cgroup"
    limits = {"a/b/memory.max": "max\n", "a/memory.max": f"{3 * GIB}\n", "memory.max": f"{8 * GIB}\n"}
    _machine(groups, limits)
    assert memory_bytes(tmp_path) == 3 * GIB


def test_control_groups_of_version_1_limit_too(tmp_path: Path) -> None:
    groups = "5:cpu,cpuacct:/x\n4:memory:/x\n"
    _machine(tmp_path, {"proc/meminfo": "MemTotal: 16777216 kB\n", "proc/self/cgroup": groups})
    files = {
        "memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu/x/cpu.cfs_quota_us": "100000\n",
        "cpu/x/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
    }
    _machine(tmp_path / "sys/fs/cgroup", files)
    assert (memory_bytes(tmp_path), cpu_count(tmp_path)) == (2 * GIB, 1)


@pytest.mark.slow
def test_looking_at_the_hardware_imports_no_torch() -> None:
    code = "import sys; from dsgpt.launch import hardware; hardware.detect(True); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
