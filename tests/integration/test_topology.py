"""A run saved on one topology continues on another: some of the cells of `python -m tests.faults topology`, and controls.

Every number of ranks and every stage is a source and a target, all pairs of stages and of numbers of ranks are there, and
both precisions at each stage. Of each way to train a part there is one cell.
"""

from __future__ import annotations

import itertools

import pytest

from dsgpt.checkpoint import commit
from tests.benchmarks.read_plan import layout
from tests.faults._topology import Cell, build, load_cell, save_cell
from tests.faults._topology_loads import controls, mutations
from tests.faults._topology_tuned import TUNED
from tests.faults.topology import DTYPES, LOSS_ERROR, STAGES, WORLDS, covering_cells
from tests.pool import RankPool, ranks

# The cells of a way to train a part that are not left to the matrix: ranks and stage of source and target.
MOVES = {"lora": (2, 3, 1, 1), "dora": (1, 2, 2, 3), "last_blocks": (4, 3, 2, 0), "mistral": (2, 1, 1, 3)}


def pairs():
    yield from covering_cells()
    for number, (trained, (*source, world, stage)) in enumerate(MOVES.items()):
        dtype = DTYPES[number % 2]
        yield Cell(*source, dtype, trained), Cell(world, stage, dtype, trained)


# From stage 0 to 3 with more ranks in bf16; from 4 ranks to 2 in fp32.
IN_DEFAULT_TIER = (3, 5)


def marked_pairs():
    """Two in the default tier; the others in the slow one, and all in `python -m tests.faults topology`."""
    for number, pair in enumerate(pairs()):
        yield pytest.param(*pair, marks=() if number in IN_DEFAULT_TIER else pytest.mark.slow)


@pytest.mark.parametrize("source, target", marked_pairs(), ids=str)
def test_all_state_arrives_to_the_last_bit_and_training_goes_on(source, target, tmp_path):
    for changed in ranks(source.world).run(save_cell, tmp_path, source):
        assert changed == [], "the save itself changed the state"
    for found in ranks(target.world).run(load_cell, tmp_path, source, target):
        assert found.differences == []
        assert found.loss_error <= LOSS_ERROR[source.dtype]


@pytest.mark.slow
def test_whatever_a_load_forgets_is_found(tmp_path):
    for trained in ("", "dora"):
        source, target = Cell(1, 3, "bf16", trained), Cell(2, 1, "bf16", trained)
        ranks(source.world).run(save_cell, tmp_path, source)
        found = ranks(target.world).run(controls, tmp_path, source, target)
        expected = set(mutations(trained))
        assert {name for name in expected if any(on_rank[name] for on_rank in found)} == expected


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(Cell(4, 0, "fp32"), marks=pytest.mark.slow),
        pytest.param(Cell(4, 1, "bf16"), marks=pytest.mark.slow),
        pytest.param(Cell(4, 2, "fp32"), marks=pytest.mark.slow),
        Cell(4, 3, "fp32"),
    ],
    ids=str,
)
def test_the_simulated_read_plan_divides_parameters_as_engines_do(cell, tmp_path):
    ranks(cell.world).run(save_cell, tmp_path, cell)
    (checkpoint,) = (path for _, path in commit.list_committed(cell.folder(tmp_path)))
    saved = commit.read_manifest(checkpoint)["parameters"]
    shapes = {name: tuple(entry["shape"]) for name, entry in saved.items()}
    assert layout(shapes, cell.stage, cell.world) == saved


@pytest.mark.parametrize("trained", ["", *TUNED])
def test_the_cells_cover_every_topology_and_every_pair_of_stages_and_of_worlds(trained):
    cells, topologies = covering_cells(trained), set(itertools.product(WORLDS, STAGES))
    assert {source[:2] for source, _ in cells} == topologies == {target[:2] for _, target in cells}
    assert {(s.stage, t.stage) for s, t in cells} == set(itertools.product(STAGES, STAGES))
    assert {(s.world, t.world) for s, t in cells} == set(itertools.product(WORLDS, WORLDS))
    for stage in STAGES:
        assert (
            {s.dtype for s, _ in cells if s.stage == stage}
            == {t.dtype for _, t in cells if t.stage == stage}
            == set(LOSS_ERROR)
        )


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["dora", "mistral"])
def test_a_process_that_has_imported_nothing_builds_it_under_zero_3(trained):
    pool = RankPool(1)
    try:
        pool.run(build_only, Cell(1, 3, "fp32", trained))
    finally:
        pool.close()


def build_only(world, cell):
    build(cell, world, seed=1)
