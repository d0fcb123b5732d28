"""Which nodes of a SLURM job get how many ranks: one rank per GPU, and a number of ranks that divides the global batch.

    layout = choose_layout(record.nodes, ranks_per_node, global_batch=512, micro_batch=4)
    layout.srun_options()

An allocation that does not divide the batch is not an error: queues give what is free. The run then uses the largest part
of its nodes that does divide, and says how many stay idle. The batch itself is never touched. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dsgpt.launch.slurm import Node


@dataclass(frozen=True)
class Layout:
    """The nodes that train, in rank order, with the ranks of each; `allocated` are all nodes of the job."""

    nodes: Sequence[Node]
    ranks: Sequence[int]
    allocated: Sequence[Node]

    @property
    def world_size(self) -> int:
        return sum(self.ranks)

    @property
    def is_uniform(self) -> bool:
        return len(set(self.ranks)) == 1

    @property
    def idle_gpus(self) -> int:
        """GPUs on nodes that train which have no rank."""
        return sum(max(0, node.gpus - ranks) for node, ranks in zip(self.nodes, self.ranks, strict=True))

    def idle_text(self) -> str:
        """What of the allocation is not used, "" where nothing is."""
        idle = len(self.allocated) - len(self.nodes)
        words = [f"{idle} of {len(self.allocated)} nodes"] if idle else []
        words += (
            [f"{self.idle_gpus} GPUs on the others" if idle else f"{self.idle_gpus} GPUs"] if self.idle_gpus else []
        )
        return " and ".join(words)

    def hostfile(self) -> str:
        """A host for each rank, as srun's arbitrary distribution reads it from SLURM_HOSTFILE."""
        hosts = [node.host for node, ranks in zip(self.nodes, self.ranks, strict=True) for _ in range(ranks)]
        return "\n".join(hosts) + "\n"

    def srun_options(self, parts: int = 1) -> list[str]:
        """Options of `srun` that start exactly these ranks. An uneven layout needs SLURM_HOSTFILE besides.

        `parts` are those of a heterogeneous job: its step spans them all, with the ranks counted through.
        """
        options = [f"--nodes={len(self.nodes)}", f"--ntasks={self.world_size}"]
        if parts > 1 and len(self.nodes) == len(self.allocated) and self.is_uniform:
            options = [f"--het-group=0-{parts - 1}", f"--ntasks-per-node={self.ranks[0]}"]
        elif self.is_uniform:
            options.append(f"--ntasks-per-node={self.ranks[0]}")
            if len(self.nodes) < len(self.allocated):
                options.append(f"--nodelist={','.join(node.host for node in self.nodes)}")
        else:
            options.append("--distribution=arbitrary")
        cpus = min(node.cpus // ranks for node, ranks in zip(self.nodes, self.ranks, strict=True))
        return [*options, f"--cpus-per-task={cpus}" if cpus else "--overcommit"]


def choose_layout(nodes: Sequence[Node], tasks: Sequence[int], global_batch: int, micro_batch: int | None) -> Layout:
    """The most ranks that divide the global batch: on the first nodes with all their GPUs, else with fewer per node.

    `tasks` are SLURM's tasks per node, which count where no node has a GPU; `micro_batch` None is `auto`. One rank always
    divides.
    """
    has_gpus = any(node.gpus for node in nodes)
    full = [node.gpus for node in nodes] if has_gpus else [max(1, count) for count in tasks]
    usable = [(node, ranks) for node, ranks in zip(nodes, full, strict=True) if ranks]
    unit = micro_batch or 1
    sums = list(accumulate(ranks for _, ranks in usable))
    whole = [count for count, size in enumerate(sums, 1) if global_batch % (unit * size) == 0]
    if whole:
        chosen = usable[: whole[-1]]
        return Layout([node for node, _ in chosen], [ranks for _, ranks in chosen], nodes)
    least = min(ranks for _, ranks in usable)
    ranks, count = max(
        ((ranks, count) for ranks in range(1, least + 1) for count in range(1, len(usable) + 1)
         if global_batch % (unit * ranks * count) == 0),
        key=lambda pair: (pair[0] * pair[1], pair[0]),
        default=(1, 1),
    )  # fmt: skip
    return Layout([node for node, _ in usable[:count]], [ranks] * count, nodes)


def write_hostfile(layout: Layout, folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text(layout.hostfile(), "utf-8")
    return path
