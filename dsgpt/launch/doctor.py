"""What would go wrong on this machine, found before a job is started: `dsgpt doctor [--output-dir DIR]`.

Every check looks at one thing, says what it saw and, where that is not good, what to do. A *problem* would stop a run,
a *warning* slows it or may bite later. torch and DeepSpeed are tried in a second Python, so that a broken one is a line
of the table; that costs the seconds of their import, which every run pays as well. Nothing is repaired, and nothing
is left behind.
"""

from __future__ import annotations

import configparser
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dsgpt.launch.hardware import Hardware, detect
from dsgpt.units import format_bytes

MIB, GIB = 1 << 20, 1 << 30
SECONDS_FOR_NAMES = 5.0
SECONDS_FOR_DEEPSPEED = 180.0


@dataclass(frozen=True)
class Check:
    """One line of the report. `do` is empty where there is nothing to do."""

    name: str
    status: Literal["ok", "warning", "problem"]
    seen: str
    do: str = ""


def examine_machine(output_dir: Path, progress: Callable[[str], None] = lambda name: None) -> list[Check]:
    """All checks, in the order of the report; `progress` hears the name of each group before it starts."""
    progress("packages")
    checks = [python_version(), *package_versions(), deepspeed_launcher()]
    progress("accelerators (importing torch)")
    hardware = detect(always_ask_torch=True)
    checks += accelerators(hardware)
    progress("deepspeed (importing it)")
    checks.append(deepspeed_import())
    progress("output folder")
    checks += output_folder(output_dir)
    progress("host")
    checks += [*host_limits(hardware), shared_memory(), compiler(), slurm(os.environ), *names()]
    return checks


# --- Python and its packages


def requirements() -> tuple[str, dict[str, str]]:
    """(range of Python, {package: range}) that this dsgpt supports, from setup.cfg in a clone, else as installed."""
    setup = Path(__file__).parents[2] / "setup.cfg"
    parser = configparser.ConfigParser(interpolation=None)
    if (
        setup.is_file()
        and parser.read(setup, encoding="utf-8")
        and parser.get("metadata", "name", fallback="") == "dsgpt"
    ):
        python, listed = parser["options"]["python_requires"], parser["options"]["install_requires"].split("\n")
    else:
        about = metadata.metadata("dsgpt")
        python, listed = about["Requires-Python"] or "", metadata.requires("dsgpt") or []
    found = (re.match(r"\s*([\w.-]+)\s*([^;]*)$", line) for line in listed)
    return python, {match[1]: match[2].strip() for match in found if match}


def in_range(version: str, wanted: str) -> bool:
    """Whether '2.13.0+cpu' lies in '>=2.10,<2.14': release numbers are compared, pre-release marks are not."""
    numbers = _release(version)
    for part in filter(None, (one.strip() for one in wanted.split(","))):
        operator, bound = re.match(r"([<>=!~]+)(.*)", part).groups()  # type: ignore[union-attr]
        other = _release(bound)
        length = max(len(numbers), len(other))
        left, right = (one + (0,) * (length - len(one)) for one in (numbers, other))
        if not {">=": left >= right, "<": left < right, "<=": left <= right, ">": left > right}.get(
            operator, (left == right) == (operator == "==")
        ):
            return False
    return True


def python_version() -> Check:
    wanted, seen = requirements()[0], f"{platform.python_version()} ({sys.executable})"
    if in_range(platform.python_version(), wanted):
        return Check("python", "ok", seen)
    return Check("python", "problem", seen, f"use Python {wanted}")


def package_versions() -> list[Check]:
    checks = []
    for name, wanted in requirements()[1].items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            checks.append(Check(name, "problem", "not installed", f"pip install '{name}{wanted}'"))
            continue
        good = in_range(version, wanted)
        checks.append(
            Check(name, "ok" if good else "problem", version, "" if good else f"pip install '{name}{wanted}'")
        )
    return checks


def deepspeed_launcher() -> Check:
    """The launcher of this Python: one of another environment on PATH would start the ranks in that one."""
    beside = Path(sys.executable).with_name("deepspeed")
    if beside.is_file():
        return Check("deepspeed launcher", "ok", str(beside))
    try:
        module = Path(str(metadata.distribution("deepspeed").locate_file("deepspeed/launcher/runner.py")))
    except metadata.PackageNotFoundError:
        module = None
    if module and module.is_file():
        return Check("deepspeed launcher", "ok", "no command beside this Python; python -m deepspeed.launcher.runner")
    elsewhere = shutil.which("deepspeed")
    seen = f"{elsewhere} belongs to another Python" if elsewhere else "neither a command nor importable"
    return Check("deepspeed launcher", "problem", seen, "pip install deepspeed with the pip of this Python")


def deepspeed_import() -> Check:
    """Import DeepSpeed in a second Python: a mismatch with torch or numpy shows here and nowhere before."""
    command = [sys.executable, "-P", "-c", "import deepspeed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_DEEPSPEED)
    except subprocess.TimeoutExpired:
        seen, do = f"takes longer than {SECONDS_FOR_DEEPSPEED:.0f} s", "put the environment on a local or faster disk"
        return Check("deepspeed import", "problem", seen, do)
    if done.returncode == 0:
        return Check("deepspeed import", "ok", "works")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    do = "run `python -c 'import deepspeed'` to see the whole message"
    return Check("deepspeed import", "problem", f"exit code {done.returncode}: {last}", do)


# --- accelerators


def accelerators(hardware: Hardware) -> list[Check]:
    problems = [Check("accelerators", "problem", f"{one.what}: {one.seen}", one.do) for one in hardware.problems]
    if problems:
        return problems
    build = f"torch {hardware.torch_build}, driver {hardware.driver or 'none'}"
    if hardware.num_gpus:
        bf16 = "bf16" if hardware.bf16 else "no bf16: dtype auto means fp16"
        gpus = f"{hardware.num_gpus} x {hardware.gpu_name}, {format_bytes(hardware.gpu_memory_bytes or 0)} each, {bf16}"
        return [Check("accelerators", "ok", f"{gpus} ({build})")]
    return [Check("accelerators", "ok", f"no GPU: runs train on the CPU ({build})")]


# --- the output folder


def output_folder(folder: Path) -> list[Check]:
    """Whether a run could write there: a file, its fsync and the rename that commits a checkpoint; space and inodes."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [Check("output folder", "problem", f"{existing} is not a folder", "choose another --output-dir")]
    try:
        with tempfile.TemporaryDirectory(prefix=".dsgpt-doctor-", dir=existing) as name:
            temporary = Path(name)
            (temporary / "a").mkdir()
            with (temporary / "a" / "file").open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary / "a", temporary / "b")
    except OSError as error:
        do = "choose a folder this user may write to, or free space or quota"
        return [Check("output folder", "problem", f"{existing}: {error}", do)]
    shown = f"{folder} can be written" if existing == folder.absolute() else f"{folder} can be made in {existing}"
    return [Check("output folder", "ok", shown), *space(existing, os.statvfs(existing))]


def space(folder: Path, stats: os.statvfs_result) -> Iterator[Check]:
    """Free bytes and inodes. A checkpoint takes 12 bytes per trained parameter and about 3 files per rank."""
    free = stats.f_bavail * stats.f_frsize
    do = "free space or choose another disk: a checkpoint takes 12 bytes per trained parameter"
    status: Literal["ok", "warning", "problem"] = "problem" if free < GIB else "warning" if free < 10 * GIB else "ok"
    yield Check("free space", status, f"{format_bytes(free)} on the disk of {folder}", "" if status == "ok" else do)
    if not stats.f_files:  # btrfs and some network file systems make inodes as they need them
        yield Check("free inodes", "ok", "no fixed number")
        return
    inodes = stats.f_favail
    status = "problem" if inodes < 1_000 else "warning" if inodes < 50_000 else "ok"
    yield Check("free inodes", status, f"{inodes:,}", "" if status == "ok" else "delete small files, or ask for quota")


# --- the host


def host_limits(hardware: Hardware) -> list[Check]:
    """Memory and CPUs as the scheduler grants them, and the limit of open files."""
    memory = hardware.memory_bytes
    machine = os.cpu_count() or 1
    cpus = f"{hardware.cpu_count} of {machine} usable by this process"
    needed = max(2, 2 * hardware.num_gpus)
    checks = [
        Check("memory", "ok", format_bytes(memory))
        if memory >= 4 * GIB
        else Check("memory", "warning", format_bytes(memory), "ask for more (--mem): two CPU ranks need about 4 GiB"),
        Check("cpus", "ok", cpus)
        if hardware.cpu_count >= needed
        else Check("cpus", "warning", cpus, f"ask for {needed} or more (--cpus-per-task): ranks compete for them"),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < 1024
    do = f"ulimit -n {4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)}" if few else ""
    checks.append(Check("open files", "warning" if few else "ok", f"limit {soft}", do))
    return checks


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """NCCL and data loaders share tensors through it; containers give 64 MiB unless told otherwise."""
    do = "docker run --shm-size=8g or --ipc=host"
    if not os.access(folder, os.W_OK):
        return Check("shared memory", "warning", f"{folder} is missing or cannot be written", do)
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    small = free < 512 * MIB
    return Check(
        "shared memory", "warning" if small else "ok", f"{format_bytes(free)} free in {folder}", do if small else ""
    )


def compiler() -> Check:
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    return Check("C++ compiler", "ok", f"{found or 'none'}; not needed unless a config offloads to NVMe")


def slurm(environment: Mapping[str, str]) -> Check:
    job = environment.get("SLURM_JOB_ID")
    if not job:
        sbatch = shutil.which("sbatch", path=environment.get("PATH"))
        return Check("SLURM", "ok", f"not inside a job; {sbatch or 'no sbatch here'}")
    keys = ("SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_ON_NODE")
    known = [f"{key.removeprefix('SLURM_').lower()}={environment[key]}" for key in keys if key in environment]
    seen = f"job {job}: " + (", ".join(known) or "no allocation variables")
    return Check("SLURM", "ok", seen)


def names() -> Iterator[Check]:
    """Ranks meet at a host name: localhost must answer on a socket, this host's own name must resolve."""
    do = "add '127.0.0.1 localhost' to /etc/hosts and bring up the loopback interface"
    try:
        with socket.create_server(("localhost", 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=SECONDS_FOR_NAMES).close()
        yield Check("localhost", "ok", "resolves and answers")
    except OSError as error:
        yield Check("localhost", "problem", str(error), do)
    host = socket.gethostname()
    addresses = _resolve(host)
    if addresses:
        yield Check("host name", "ok", f"{host} is {', '.join(addresses)}")
    else:
        do = (
            f"add '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface"
        )
        yield Check("host name", "warning", f"{host} does not resolve within {SECONDS_FOR_NAMES:.0f} s", do)


def _resolve(host: str) -> Sequence[str]:
    """Its addresses, none on failure. In a thread: a name server that is gone answers after minutes."""
    found: list[str] = []

    def ask() -> None:
        try:
            found.extend(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}))
        except OSError:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_FOR_NAMES)
    return list(found)


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\s*(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()
