"""What this machine offers a run: GPUs that torch can use, CPUs and memory that this process may use.

    python -m dsgpt.launch.hardware        prints what was found

The process that asks never imports torch: a second Python does, under a time limit, so that a driver that hangs or
crashes becomes a sentence and not the end of the launcher. A machine without any sign of a GPU does not pay for it.
GPUs that are there, or that were allocated, and that torch cannot use are a problem and never a silent run on the CPU.
CPUs and memory are what the scheduler and the control group grant, not what the machine has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dsgpt.errors import Problem
from dsgpt.units import format_bytes

PROBE_SECONDS = 180.0  # a cold `import torch` from a busy network file system takes most of it
_HIDDEN = {"", "-1", "NoDevFiles"}  # values of CUDA_VISIBLE_DEVICES by which a person or SLURM hides every GPU
_SMI_QUERY = ("--query-gpu=driver_version,name", "--format=csv,noheader")
_NO_LIMIT = 1 << 60  # a control group of version 1 writes a number near 2**63 for "no limit"
_PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    version = torch.version
    answer = {"torch": torch.__version__, "cuda": version.cuda, "hip": version.hip, "gpus": [], "bf16": False}
    try:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                gpu = torch.cuda.get_device_properties(index)
                answer["gpus"].append({"name": gpu.name, "memory": gpu.total_memory})
            answer["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception as error:
        answer["gpus"], answer["error"] = [], f"{type(error).__name__}: {error}"
answer["warnings"] = [str(one.message) for one in caught if "CUDA" in str(one.message) or "driver" in str(one.message)]
print("PROBE" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Hardware:
    """One machine as this process may use it. Memory in bytes; GPU fields describe the smallest GPU of the machine."""

    device: str = "cpu"
    num_gpus: int = 0
    gpu_memory_bytes: int | None = None
    gpu_name: str | None = None
    bf16: bool = False
    driver: str | None = None
    torch_build: str | None = None
    cpu_count: int = 1
    memory_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        host = f"{self.cpu_count} CPUs, {format_bytes(self.memory_bytes)} memory"
        if not self.num_gpus:
            return f"no GPU, {host}"
        return f"{self.num_gpus} x {self.gpu_name} ({format_bytes(self.gpu_memory_bytes or 0)} each), {host}"


@dataclass(frozen=True)
class GpuSigns:
    """What speaks for GPUs without torch: `look` makes asking torch worth it, `evidence` says they must be there.

    `expected` is the number this process was given, where anything says so. Hidden by CUDA_VISIBLE_DEVICES, there is
    no evidence, unless the scheduler allocated some.
    """

    look: bool = False
    evidence: list[str] = field(default_factory=list)
    expected: int | None = None
    hidden: bool = False
    driver: str | None = None


@cache
def detect(always_ask_torch: bool = False) -> Hardware:
    """The hardware of this machine, found once per process. Problems are listed, not raised."""
    return examine(os.environ, Path("/"), always_ask_torch)


def examine(environment: Mapping[str, str], root: Path, always_ask_torch: bool = False) -> Hardware:
    """`detect` for a given environment and file system root, which is how its tests build machines."""
    host = Hardware(cpu_count=cpu_count(root), memory_bytes=memory_bytes(root), torch_build=_installed_torch())
    signs = gpu_signs(environment, root)
    host = replace(host, driver=signs.driver)
    if not signs.look and not always_ask_torch:
        return host
    answer, failure = ask_torch(environment)
    return with_gpus(host, signs, answer, failure)


def current_signs() -> GpuSigns:
    """`gpu_signs` of this process's own environment, for a worker that asks torch itself."""
    return gpu_signs(os.environ, Path("/"))


def gpu_signs(environment: Mapping[str, str], root: Path) -> GpuSigns:
    """Everything that speaks for a GPU: device files, the driver, nvidia-smi, the scheduler, CUDA_VISIBLE_DEVICES."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in _HIDDEN
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    expected = int(on_node) if on_node.isdigit() else None
    driver = _loaded_driver(root)
    evidence = [f"SLURM_GPUS_ON_NODE={on_node}"] if expected else []
    if hidden:
        return GpuSigns(bool(expected), evidence, expected, hidden, driver)
    evidence += ["/dev/" + path.name for path in sorted((root / "dev").glob("nvidia[0-9]*"))]
    if loaded := len(list((root / "proc/driver/nvidia/gpus").glob("*"))):
        evidence.append(f"the NVIDIA driver lists {loaded} GPUs")
    smi = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if smi and (listed := [row for row in _run([smi, *_SMI_QUERY]).splitlines() if "," in row]):
        version, _, name = listed[0].partition(",")
        driver, expected = driver or version.strip(), expected or len(listed)
        evidence.append(f"nvidia-smi lists {len(listed)} x {name.strip()}")
    # In a rank it says nothing: DeepSpeed's launcher sets it for its CPU ranks as well.
    if visible is not None and "LOCAL_RANK" not in environment:
        evidence.append(f"CUDA_VISIBLE_DEVICES={visible}")
        expected = len(visible.split(","))
    # The device file of AMD or WSL alone is no evidence: every laptop with AMD graphics has /dev/kfd.
    others = any((root / "dev" / name).exists() for name in ("kfd", "dxg", "nvidiactl"))
    return GpuSigns(bool(evidence) or others or smi is not None, evidence, expected, hidden, driver)


def ask_torch(environment: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """What a second Python's torch says about its GPUs: (answer, "") or (None, why there is none)."""
    command = [sys.executable, "-P", "-c", _PROBE]  # -P: nothing is imported from the working folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=dict(environment))
    except subprocess.TimeoutExpired:
        return None, f"asking torch for its GPUs took longer than {PROBE_SECONDS:.0f} s"
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            answer: dict[str, Any] = json.loads(line.removeprefix("PROBE"))
            return answer, ""
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return None, f"torch ended with {how}: {last[0]}"


def with_gpus(host: Hardware, signs: GpuSigns, answer: dict[str, Any] | None, failure: str = "") -> Hardware:
    """`host` with what torch answered, and the problems that follow where the answer does not match the signs."""
    if answer is None:
        do = "run `python -c 'import torch'` to see the whole message; then install torch anew"
        return replace(host, problems=[Problem("torch does not start", failure, do)])
    build = answer["torch"] + (f" (CUDA {answer['cuda']})" if answer["cuda"] else "")
    build += f" (ROCm {answer['hip']})" if answer["hip"] else ""
    gpus = answer["gpus"]
    problems = [] if gpus else _unusable(signs, host.driver, build, answer)
    if gpus and (signs.expected or 0) > len(gpus):
        seen = f"{'; '.join(signs.evidence)}; driver {host.driver}; torch {build} sees {len(gpus)}"
        do = "look for the failed one with nvidia-smi; or name the GPUs to use in CUDA_VISIBLE_DEVICES"
        problems.append(Problem(f"torch can use {len(gpus)} of {signs.expected} GPUs", seen, do))
    if not gpus:
        return replace(host, torch_build=build, problems=problems)
    least = min(gpus, key=lambda gpu: int(gpu["memory"]))
    return replace(
        host,
        device="cuda",
        num_gpus=len(gpus),
        gpu_memory_bytes=int(least["memory"]),
        gpu_name=least["name"],
        bf16=bool(answer["bf16"]),
        torch_build=build,
        problems=problems,
    )


def _unusable(signs: GpuSigns, driver: str | None, build: str, answer: Mapping[str, Any]) -> list[Problem]:
    """The problem of GPUs that are there while torch sees none, with the remedy of the cause that fits."""
    if not signs.evidence:
        return []
    reasons = [*answer["warnings"], *([answer["error"]] if "error" in answer else [])]
    if signs.hidden:
        do = "unset CUDA_VISIBLE_DEVICES, which hides every allocated GPU"
    elif not answer["cuda"] and not answer["hip"]:
        do = "this torch is built for CPUs only: install a build for GPUs, see https://pytorch.org/get-started/locally"
    elif driver is None and not answer["hip"]:
        do = "no NVIDIA driver is loaded: ask for a node with GPUs, or install the driver"
    elif any("old" in reason for reason in reasons):
        do = f"update the driver, or install a torch built for an older CUDA than {answer['cuda']}"
    elif not any("/dev/nvidia" in sign or "nvidia-smi" in sign for sign in signs.evidence):
        do = "the GPUs are not passed into this container: docker run --gpus all, apptainer exec --nv"
    else:
        do = "run `nvidia-smi`; compare the driver with what this torch was built for; check CUDA_VISIBLE_DEVICES"
    seen = "; ".join([*signs.evidence, f"driver {driver or 'none'}", f"torch {build}", *reasons])
    return [Problem("there are GPUs that torch cannot use", seen, do + "; or train on the CPU with device=cpu")]


def cpu_count(root: Path = Path("/")) -> int:
    """CPUs this process may use: its affinity, cut to the control group's quota, at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups(root, "cpu"):
        quota = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us")
        period = quota[1:2] or _words(folder / "cpu.cfs_period_us") or ["100000"]
        if quota and quota[0].isdigit() and period[0].isdigit():
            count = min(count, int(quota[0]) / int(period[0]))
    return max(1, int(count))


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, cut to the control group's limit. 0 where unknown."""
    total = 0
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for folder in _control_groups(root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if limit and limit[0].isdigit() and int(limit[0]) < _NO_LIMIT:
            total = min(total or int(limit[0]), int(limit[0]))
    return total


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be used now: what the kernel thinks, cut to what the control group leaves. 0 where unknown."""
    free = next((int(one.split()[1]) * 1024 for one in _lines(root / "proc/meminfo") if one.startswith("MemAvail")), 0)
    for folder in _control_groups(root, "memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit() and int(limit[0]) < _NO_LIMIT:
            statistics = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
            given_back = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            free = min(free, int(limit[0]) - int(used[0]) + given_back)
    return max(0, free)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all above it: each of them limits it. Versions 2 and 1."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.strip().split(":", 2)
        if number == "0":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        inside = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(inside), -1, -1):
            yield mount.joinpath(*inside[:depth])


def _loaded_driver(root: Path) -> str | None:
    for line in _lines(root / "proc/driver/nvidia/version"):
        if found := re.search(r"\b\d{3,4}\.\d+(\.\d+)?\b", line):
            return found.group()
    return None


def _installed_torch() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _run(command: list[str]) -> str:
    """Its standard output; nothing where it fails or takes longer than 30 s, which is a sign of a sick driver."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


if __name__ == "__main__":
    found = detect(always_ask_torch=True)
    print(found, *found.problems, sep="\n")
