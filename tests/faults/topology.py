"""A run saved on any number of ranks, at any ZeRO stage, continues on any other, with the same state to the last bit.

python -m tests.faults topology           all 352 cells, the controls, bytes and memory; --trials has no meaning

{1, 2, 4 ranks} x {stage 0, 1, 2, 3} -> the same twelve, in fp32 and bf16. Each of the 24 sources trains three steps and
writes down all of its state as DeepSpeed's own calls gather it (_topology.py). Each cell is a fresh engine of another seed,
which loads the source's checkpoint, is gathered in the same way and compared bit for bit on every rank: masters, moments,
working copies, frozen parameters, running statistics, step count. Then the first losses (training, and evaluation, which
uses the running statistics) must be the source's, and two more steps must be applied.

Runs that train a part (_topology_tuned.py: LoRA, DoRA, the last block, LoRA in a Mistral of transformers) have 16 cells each:
all pairs of stages and of numbers of ranks, both precisions at each stage. A checkpoint's layout depends on no more than that.

Trade-off: ranks live in one pool per world size, because starting DeepSpeed costs more than a cell; an engine per cell, so
that no cell finds anything in place that an earlier load has brought.

Bytes and host memory are measured with 5 M parameters: in the small model's cells headers and checksums would be most of
what is read. Growth: what a cell proves does not depend on the number of ranks, because a rank asks for its own ranges only.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

from dsgpt.checkpoint.files import CHUNK_BYTES
from tests.faults._topology import LARGE, Cell, Found, load_cell, save_cell
from tests.faults._topology_loads import Cost, controls, load_large, mutations
from tests.faults._topology_tuned import TUNED
from tests.frame import Outcome, Row

WORLDS, STAGES, DTYPES = (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16")
LOSS_ERROR = {"fp32": 1e-5, "bf16": 2e-3}
LARGE_CELLS = [
    (Cell(4, 3, "fp32"), Cell(2, 3, "fp32")),
    (Cell(4, 2, "fp32"), Cell(2, 2, "fp32")),
    (Cell(2, 2, "fp32"), Cell(4, 3, "fp32")),
    (Cell(2, 3, "fp32"), Cell(4, 0, "fp32")),
    (Cell(4, 3, "bf16"), Cell(1, 1, "bf16")),
]
BUFFERS = 4 * CHUNK_BYTES  # of reading, whatever the size of the state
SECONDS = 900.0


def run_controls(root: Path, source: Cell, targets: list[Cell]) -> dict[tuple[Cell, str], bool]:
    """(target, mutation) -> whether at least one rank found what was forgotten."""
    from tests.pool import ranks

    found: dict[tuple[Cell, str], bool] = {}
    for target in targets:
        on_ranks = ranks(target.world).run(controls, root, source, target, timeout=SECONDS)
        found |= {(target, name): any(one[name] for one in on_ranks) for name in on_ranks[0]}
    return found


def run_cells(root: Path, cells: list[tuple[Cell, Cell]]) -> dict[tuple[Cell, Cell], list[Found]]:
    """Save every source once, load every cell; {(source, target): what each rank found}."""
    from tests.pool import ranks

    for source in dict.fromkeys(source for source, _ in cells):
        for changed in ranks(source.world).run(save_cell, root, source, timeout=SECONDS):
            assert not changed, f"{source}: saving changed {changed}"
    return {
        (source, target): ranks(target.world).run(load_cell, root, source, target, timeout=SECONDS)
        for source, target in cells
    }


def run_large(root: Path) -> list[Row]:
    """Bytes read by all ranks, and host memory beside the engine's own, with a model that is larger than headers are."""
    from tests.pool import ranks

    for source in dict.fromkeys(source for source, _ in LARGE_CELLS):
        ranks(source.world).run(save_cell, root, source, LARGE, timeout=SECONDS)
    rows, wrong = [], 0
    for source, target in LARGE_CELLS:
        costs, label = _cost(root, source, target), f"{source} -> {target}"
        wrong += sum(len(cost.differences) for cost in costs)
        rows += [
            _bytes_row(f"bytes read / needed, {label}", costs),
            _memory_row(f"host memory / bound, {label}", costs),
        ]
    rows.append(Row("tensors that differ in these", wrong, at_most=0))
    costs = _cost(root, *LARGE_CELLS[0], True)
    caught = [not row.holds for row in (_bytes_row("", costs), _memory_row("", costs))]
    return [*rows, Row("reading it all on every rank, caught", sum(caught), at_least=2, note="by bytes and by memory")]


def _cost(root: Path, source: Cell, target: Cell, at_once: bool = False) -> list[Cost]:
    from tests.pool import ranks

    return ranks(target.world).run(load_large, root, source, target, at_once, timeout=SECONDS)


def _bytes_row(label: str, costs: list[Cost]) -> Row:
    """Less than 1 would be reading that is not counted."""
    read, needed = sum(cost.read for cost in costs), sum(cost.needed for cost in costs)
    return Row(label, read / needed, at_most=1.1, at_least=1.0, note=f"{read / 1e6:.1f} of {needed / 1e6:.1f} MB")


def _memory_row(label: str, costs: list[Cost]) -> Row:
    """What a rank's memory grows by, while its own state is there already, against one tensor and the reader's buffers."""
    worst = max(costs, key=lambda cost: cost.memory)
    note = (
        f"{worst.memory / 1e6:.1f} MB; largest tensor {worst.tensor / 1e6:.1f}, rank's state {worst.needed / 1e6:.1f}"
    )
    return Row(label, worst.memory / (worst.tensor + BUFFERS), at_most=1.0, note=note)


def all_cells() -> list[tuple[Cell, Cell]]:
    """Sources and targets of the same precision."""
    topologies = list(itertools.product(WORLDS, STAGES))
    return [
        (Cell(*source, dtype), Cell(*target, dtype))
        for dtype in DTYPES
        for target in topologies
        for source in topologies
    ]


def covering_cells(trained: str = "") -> list[tuple[Cell, Cell]]:
    """Sixteen: every topology's stage and world, all pairs of stages and of worlds, both precisions at each stage."""
    turn, cells = list(TUNED).index(trained) if trained else 0, []
    for source, target in itertools.product(STAGES, STAGES):
        dtype = DTYPES[(source + target + turn) % 2]
        worlds = WORLDS[(source + target + turn) % 3], WORLDS[(source - target + 1 + turn) % 3]
        cells.append((Cell(worlds[0], source, dtype, trained), Cell(worlds[1], target, dtype, trained)))
    return cells


def run(trials: int | None, seed: int) -> Outcome:
    """Everything once; there is nothing random in it."""
    from tests.pool import close_all

    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="dsgpt-topology-") as name:
        root, rows, count = Path(name), [], 0
        for trained in ("", *TUNED):
            cells = covering_cells(trained) if trained else all_cells()
            rows += _cell_rows(root / "small", trained, cells)
            count += len(cells)
        rows += _control_rows(root / "small")
        rows += run_large(root / "large")
        close_all()
    return Outcome(rows, count)


def _cell_rows(root: Path, trained: str, cells: list[tuple[Cell, Cell]]) -> list[Row]:
    label, found = f"{trained}: " if trained else "", run_cells(root, cells)
    different = {pair: sorted({d for one in ranks for d in one.differences}) for pair, ranks in found.items()}
    for (source, target), names in different.items():
        if names:
            print(f"{source} -> {target}: {len(names)} differ: {', '.join(names[:6])}")
    equal = sum(not names for names in different.values())
    rows = [Row(f"{label}cells equal", equal, at_least=len(cells), note=f"of {len(cells)}")]
    for dtype in DTYPES:
        errors = {pair: max(one.loss_error for one in ranks) for pair, ranks in found.items() if pair[0].dtype == dtype}
        worst = max(errors, key=lambda pair: errors[pair])
        name, note = f"{label}first loss, {dtype}, worst", f"{worst[0]} -> {worst[1]}"
        rows.append(Row(name, errors[worst], "relative", at_most=LOSS_ERROR[dtype], note=note))
    return rows


def _control_rows(root: Path) -> list[Row]:
    """What a load forgets is found: at every stage in both precisions; adapters, which are parameters like others, in fp32."""
    caught: dict[tuple[Cell, str], bool] = {}
    tuned = next(source for source, _ in covering_cells("dora") if source[1:3] == (2, "fp32"))
    for source in (*(Cell(4, 2, dtype) for dtype in DTYPES), tuned):
        caught |= run_controls(root, source, [source._replace(world=2, stage=stage) for stage in STAGES])
    overlooked = ", ".join(f"{name} ({target})" for (target, name), seen in caught.items() if not seen)
    forgotten = [name for trained in ("", "dora") for name in mutations(trained)]
    note = f"overlooked: {overlooked or 'none'}; forgotten: {', '.join(forgotten)}"
    return [Row("controls caught", sum(caught.values()), at_least=len(caught), note=note)]
