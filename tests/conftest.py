"""What every test session sets first, and what it says last: which tests did not run, and why.

The environment is set before any test module imports torch or DeepSpeed. Nothing is fetched: the Hugging Face libraries
are told to stay offline, so that a test that needs the network fails here and not on the next machine without one.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsgpt.launch.hardware import gpu_signs

HAS_GPU = bool(gpu_signs(os.environ, Path("/")).evidence)

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
if not HAS_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"

# Imported after the environment is set; pytest finds fixtures by name in this module.
from tests import pool  # noqa: E402
from tests.hub_server import hub  # noqa: E402, F401
from tests.run_fixtures import dataset, write_run  # noqa: E402, F401
from tests.slurm.lab import why_no_slurm  # noqa: E402

# marker -> says why its tests cannot run here, empty where they can; asked only where such a test was chosen
UNAVAILABLE = {"gpu": lambda: "" if HAS_GPU else "no GPU here", "slurm": why_no_slurm}

TIERS = ("slow", "slurm", "gpu", "network")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that was asked for and cannot run here is skipped with the reason."""
    for item in items:
        for marker, why in UNAVAILABLE.items():
            if item.get_closest_marker(marker) and (reason := why()):
                item.add_marker(pytest.mark.skip(reason=reason))


_left_out: Counter[str] = Counter()
_ran: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", action="store_true", help="fail where no test ran: all were skipped, or none chosen")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _ran.append(report.nodeid)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        _left_out[" and ".join(tier for tier in TIERS if item.get_closest_marker(tier)) or "other"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool.close_all()
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, whose summary is nowhere to be read
        session.config.workeroutput["left_out"] = dict(_left_out)
    if session.config.getoption("--must-run") and not _ran:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, of two or more ranks at times; for tests that are named on the command line none besides
    this one, where a debugger works, nor for those that share a cluster or a device."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    left_out = config.getoption("markexpr")
    shared = [tier for tier, why in UNAVAILABLE.items() if f"not {tier}" not in left_out and not why()]
    return 0 if shared else min(8, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process of pytest-xdist collects all tests, so that the last one's counts are as good as any."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        _left_out.clear()
        _left_out.update(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out by the selection, which pytest itself only counts."""
    if config.getoption("--must-run") and not _ran:
        terminalreporter.write_line("no test ran, and --must-run asks for one", red=True)
    tiers = {name: count for name, count in _left_out.items() if name != "other"}
    if not tiers:
        return
    terminalreporter.section("not selected")
    about = dict(line.split(": ", 1) for line in config.getini("markers") if line.split(": ")[0] in TIERS)
    for name, count in sorted(tiers.items()):
        reason = "; ".join(about.get(tier, tier) for tier in name.split(" and "))
        terminalreporter.write_line(f"{count} {name}: {reason}. Run them with: pytest -m '{name}'")
