"""Ranks that mpirun started: what Open MPI says, in the variables that torch reads.

    adopt()

DeepSpeed asks mpi4py for the same; the environment has it without another package. Trade-off: Open MPI says neither where
rank 0 is nor a port, so whoever starts mpirun gives MASTER_ADDR and MASTER_PORT (`-x`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dsgpt.errors import ConfigError

_NAMES = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def adopt() -> None:
    """`ranks` of this process, into its environment: for a rank that mpirun started without anything in between."""
    os.environ.update(ranks(os.environ))


def ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE of an Open MPI rank; {} elsewhere. Raises ConfigError.

    A launcher that set RANK itself is believed: it may have been started by mpirun, one per host.
    """
    if "RANK" in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return {}
    told = {name: environment.get(source, "") for name, source in _NAMES.items()}
    if bad := [f"{_NAMES[name]}={value!r}" for name, value in told.items() if not value.isdecimal()]:
        raise ConfigError("Open MPI's variables are not numbers", ", ".join(bad), "start the ranks with mpirun")
    if told["WORLD_SIZE"] != "1" and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise ConfigError(
            "ranks started by mpirun do not know where rank 0 is",
            f"WORLD_SIZE={told['WORLD_SIZE']}, no MASTER_ADDR or no MASTER_PORT",
            "mpirun -x MASTER_ADDR=<first host> -x MASTER_PORT=29500 …, or dsgpt train --hostfile … --launcher openmpi",
        )
    return told
