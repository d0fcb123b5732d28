"""What the tests of this folder need: a SLURM, two nodes of it that see this folder, and a cluster that may be broken.

Each fixture skips with the reason where it cannot be had; only .ci/run insists that the tests ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm import lab


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The nodes that are there, at least two, on which a folder made here can be read."""
    if reason := lab.why_no_slurm():
        pytest.skip(reason)
    names = lab.nodes()
    if len(names) < 2:
        pytest.skip(f"one node only: {', '.join(names)}")
    probe = tmp_path_factory.mktemp("shared") / "probe"
    probe.touch()
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=1", "--immediate=60", "test", "-e", str(probe)]
    try:
        lab.call(*command, seconds=120, env=lab.job_environment())
    except AssertionError as error:
        pytest.skip(f"nodes do not see {probe.parent}, use --basetemp with a shared folder: {error}")
    return names


@pytest.fixture()
def submit(cluster: list[str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """submit(script, *arguments, options=[…], NAME=value) -> job id; whatever is left of it is cancelled at the end."""
    jobs: list[str] = []

    def one(*arguments: object, **keywords: object) -> str:
        script, *rest = arguments
        jobs.append(lab.submit(script, *rest, **{"folder": tmp_path, **keywords}))
        return jobs[-1]

    yield one
    for job in jobs:
        lab.cancel(job)


@pytest.fixture()
def own_cluster(cluster: list[str]) -> Iterator[Callable[..., str]]:
    """control("fail", "node2"), …; afterwards every node is there again."""
    if not lab.is_ours():
        pytest.skip(
            "this SLURM is not our own (SLURMLAB_DIR of tests/slurm/cluster.sh is not set): nothing is broken here"
        )
    yield lab.control
    for name in cluster:
        lab.control("start", name)
        lab.control("net", name, "up")
    lab.until(lambda: lab.nodes() == cluster, 60, "all nodes to be back")
