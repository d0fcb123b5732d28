"""A run saved on one topology continues on another: 16 of the 288 cells of `python -m tests.faults topology`, and a control.

Every number of ranks and every stage is a source and a target, all pairs of stages and of numbers of ranks are there, and
both precisions at each stage.
"""

from __future__ import annotations

import itertools

import pytest

from dsgpt.checkpoint import commit
from tests.benchmarks.read_plan import layout
from tests.faults._topology import Cell, load_cell, save_cell
from tests.faults._topology_loads import MUTATIONS, controls
from tests.faults.topology import LOSS_ERROR, STAGES, WORLDS
from tests.pool import ranks


def pairs():
    for source, target in itertools.product(STAGES, STAGES):
        dtype = ("fp32", "bf16")[(source + target) % 2]
        worlds = WORLDS[(source + target) % 3], WORLDS[(source - target + 1) % 3]
        yield Cell(worlds[0], source, dtype), Cell(worlds[1], target, dtype)


@pytest.mark.parametrize("source, target", pairs(), ids=str)
def test_all_state_arrives_to_the_last_bit_and_training_goes_on(source, target, tmp_path):
    for changed in ranks(source.world).run(save_cell, tmp_path, source):
        assert changed == [], "the save itself changed the state"
    for found in ranks(target.world).run(load_cell, tmp_path, source, target):
        assert found.differences == []
        assert found.loss_error <= LOSS_ERROR[source.dtype]


def test_whatever_a_load_forgets_is_found(tmp_path):
    source, target = Cell(1, 3, "bf16"), Cell(2, 1, "bf16")
    ranks(source.world).run(save_cell, tmp_path, source)
    found = ranks(target.world).run(controls, tmp_path, source, target)
    assert {name for name in MUTATIONS if any(on_rank[name] for on_rank in found)} == set(MUTATIONS)


@pytest.mark.parametrize(
    "cell", [Cell(4, 0, "fp32"), Cell(4, 1, "bf16"), Cell(4, 2, "fp32"), Cell(4, 3, "fp32")], ids=str
)
def test_the_simulated_read_plan_divides_parameters_as_engines_do(cell, tmp_path):
    ranks(cell.world).run(save_cell, tmp_path, cell)
    (checkpoint,) = (path for _, path in commit.list_committed(cell.folder(tmp_path)))
    saved = commit.read_manifest(checkpoint)["parameters"]
    shapes = {name: tuple(entry["shape"]) for name, entry in saved.items()}
    assert layout(shapes, cell.stage, cell.world) == saved


def test_the_cells_here_cover_every_topology_and_every_pair_of_stages_and_of_worlds():
    cells, topologies = list(pairs()), set(itertools.product(WORLDS, STAGES))
    assert {source[:2] for source, _ in cells} == topologies == {target[:2] for _, target in cells}
    assert {(s.stage, t.stage) for s, t in cells} == set(itertools.product(STAGES, STAGES))
    assert {(s.world, t.world) for s, t in cells} == set(itertools.product(WORLDS, WORLDS))
    for stage in STAGES:
        assert (
            {s.dtype for s, _ in cells if s.stage == stage}
            == {t.dtype for _, t in cells if t.stage == stage}
            == set(LOSS_ERROR)
        )
