"""A job on several hosts without a scheduler: what is started here so that each host runs its part.

    remote = Remote(nodes, "ssh", "node1", 29500)
    commands(remote, carried, log_dir)          # name -> argument list

`ssh` is one connection per host, so the one that fails is known by name; `pdsh` one program for all; `openmpi` is mpirun,
which starts the ranks themselves; `no-ssh` starts this host's part only, and a person or a script does so on each host.
DeepSpeed's front-end (`deepspeed --hostfile`) is not in between: it ends with 0 when pdsh is killed, runs `pkill -f` on
every host, reads `.deepspeed_env` from the working folder, and quotes for a shell by halves. What it starts on a
host, DeepSpeed's launcher for the node, is started here as well, by `dsgpt.launch.node`.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsgpt.errors import ConfigError
from dsgpt.launch.carried import Carried, pack, python_words
from dsgpt.launch.hosts import HOST, Node, hostfile_text
from dsgpt.process import free_port

LAUNCHERS = ("ssh", "pdsh", "openmpi", "no-ssh")
_PROGRAMS = {"ssh": "ssh", "pdsh": "pdsh", "openmpi": "mpirun"}
_HERE = ("localhost", "127.0.0.1")
# No question on a terminal, no wait for a host that is off, an end when the network is.
_SSH_OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=20",
    "-o",
    "ServerAliveInterval=10",
    "-o",
    "ServerAliveCountMax=6",
)
_PDSH_FAN_OUT = 1024
# Below the range from which Linux gives ports to connections.
_PORTS = (20000, 32000)


@dataclass(frozen=True)
class Remote:
    """The hosts of a job in the order of its ranks, and how they are reached. `node_rank` is this host's, with no-ssh."""

    nodes: tuple[Node, ...]
    launcher: str
    master_addr: str
    master_port: int
    node_rank: int = 0

    @property
    def num_ranks(self) -> int:
        return sum(len(node.slots) for node in self.nodes)

    @property
    def includes_here(self) -> bool:
        return self.launcher == "no-ssh" or any(is_here(node.host) for node in self.nodes)


def plan_remote(
    nodes: list[Node],
    launcher: str = "ssh",
    master_addr: str | None = None,
    master_port: int | None = None,
    node_rank: int | None = None,
) -> Remote:
    """Check that these hosts can be started this way from here. Raises ConfigError."""
    if len(nodes) > 1 and (local := [node.host for node in nodes if node.host in _HERE]):
        raise ConfigError(f"{local[0]} is another machine on each host", do="write its name into the hostfile")
    program = _PROGRAMS.get(launcher)
    if program and not shutil.which(program) and not (launcher == "ssh" and all(is_here(node.host) for node in nodes)):
        do = f"install it, or use --launcher {' or '.join(name for name in LAUNCHERS if name != launcher)}"
        raise ConfigError(f"--launcher {launcher} needs the program {program}, which is not on PATH", do=do)
    if launcher == "openmpi":
        for node in nodes:
            if node.slots != tuple(range(len(node.slots))):
                seen = f"{node.host}:{','.join(map(str, node.slots))}"
                raise ConfigError("mpirun cannot leave out GPUs before others", seen, "--launcher ssh, or whole hosts")
    if launcher == "no-ssh" and master_port is None:
        raise ConfigError("--launcher no-ssh needs a port that all hosts are told", do="add --master-port 29500")
    if node_rank is not None and launcher != "no-ssh":
        raise ConfigError("--node-rank is for --launcher no-ssh", f"--launcher {launcher}", "leave it out")
    if node_rank is not None and not 0 <= node_rank < len(nodes):
        raise ConfigError("no such node", f"--node-rank {node_rank}, {len(nodes)} hosts", "the first host has 0")
    address = master_addr or nodes[0].host
    if not HOST.fullmatch(address):
        raise ConfigError(
            "--master-addr is no host name or address", repr(address), "the first host's, as others see it"
        )
    port = master_port or (free_port() if is_here(nodes[0].host) else random.SystemRandom().randrange(*_PORTS))
    return Remote(tuple(nodes), launcher, address, port, node_rank or 0)


def is_here(host: str) -> bool:
    return host in (*_HERE, socket.gethostname(), socket.getfqdn())


def commands(remote: Remote, carried: Carried, log_dir: Path, environment: Mapping[str, str]) -> dict[str, list[str]]:
    """What to start here: a name for messages -> an argument list. Raises ConfigError where a path is not safe."""
    word = pack(carried)
    here = [sys.executable, "-u", "-m", "dsgpt.launch.node", word]
    there = [*python_words(environment), word]
    hosts = [node.host for node in remote.nodes]
    if remote.launcher == "no-ssh":
        return {hosts[remote.node_rank]: [*here, f"--node-rank={remote.node_rank}"]}
    if remote.launcher == "pdsh":
        # pdsh puts the number of the host for %n.
        whom = ["pdsh", "-S", "-R", "ssh", "-f", str(_PDSH_FAN_OUT), "-w", ",".join(hosts)]
        return {"pdsh": [*whom, *there, "--node-rank=%n"]}
    if remote.launcher == "openmpi":
        return {"mpirun": [*_mpirun(remote, log_dir), *there]}
    return {
        host: [*(here if is_here(host) else ["ssh", "-T", *_SSH_OPTIONS, host, *there]), f"--node-rank={rank}"]
        for rank, host in enumerate(hosts)
    }


def _mpirun(remote: Remote, log_dir: Path) -> list[str]:
    # A rank that ends with a code must not have the others killed: the verdict and their watchdogs see to them. When mpirun
    # does end ranks, it waits for so long before it sends SIGTERM, and once more before SIGKILL.
    wait = ["--mca", "orte_abort_on_non_zero_status", "0", "--mca", "odls_base_sigkill_timeout", "6"]
    reach = ["--mca", "plm_rsh_args", " ".join(_SSH_OPTIONS), "--mca", "plm", "rsh", "--mca", "ras", "^slurm"]
    place = ["--hostfile", str(log_dir / "hostfile"), "--map-by", "slot", "--bind-to", "none", "--wdir", "/"]
    return ["mpirun", "-n", str(remote.num_ranks), *place, "--stdin", "none", "--tag-output", *wait, *reach]


def transport_environment(remote: Remote, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of what is started here: the ranks have theirs from the word."""
    changed = dict(environment)
    if remote.launcher == "pdsh":
        changed["PDSH_SSH_ARGS_APPEND"] = " ".join(_SSH_OPTIONS)
    if remote.launcher == "openmpi" and os.geteuid() == 0:
        changed |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return changed


def write_hostfile(remote: Remote, log_dir: Path) -> None:
    (log_dir / "hostfile").write_text(hostfile_text(list(remote.nodes)), "ascii")
