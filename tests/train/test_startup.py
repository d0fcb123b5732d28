"""Ranks that do not mean the same run, nodes that do not see its folder or its data, and where a start's time goes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from dsgpt.config import load_config
from dsgpt.errors import DsgptError
from dsgpt.process import batch_phases, free_port, process_age
from dsgpt.train import startup
from dsgpt.train.resolve import resolve_run
from dsgpt.train.state import RunLog
from dsgpt.watchdog import Heartbeat
from tests.integration.test_launch import start
from tests.pool import ranks
from tests.test_nodes import own_node


def attempt(world, function, *arguments):
    with own_node(world):
        try:
            return function(world, *arguments)
        except DsgptError as error:
            return int(error.exit_code), str(error)


def together(world, yaml, overrides):
    loaded = load_config([Path(yaml)], overrides[world.rank])
    return bool(
        startup.resolve_together(
            world, lambda: resolve_run(loaded.config, world_size=2, device="cpu", gpu_memory_bytes=None, bf16=True)
        )
    )


def test_ranks_with_the_same_config_go_on(write_run):
    assert ranks(2).run(attempt, together, write_run(), [[], []]) == [True, True]


def test_ranks_with_another_config_end_with_78_and_name_host_and_keys(write_run):
    """T809."""
    changed = ["optimizer.learning_rate=0.5", "run.output_dir=/elsewhere"]
    (code, text), other = ranks(2).run(attempt, together, write_run(), [[], changed])
    assert (code, text) == other and code == 78
    assert "optimizer.learning_rate" in text and "0.5 on node2, 0.003 on rank 0 (node1)" in text
    assert "run.output_dir" in text and "'/elsewhere' on node2" in text


def test_what_one_rank_alone_finds_wrong_ends_all_with_its_code_and_host(write_run, dataset, tmp_path):
    shutil.copytree(dataset.parent, tmp_path / "copy")
    (tmp_path / "copy/data/dataset.json").unlink()
    overrides = [[], [f'data.train=[{{"path": "{tmp_path}/copy/data"}}]']]
    (code, text), other = ranks(2).run(attempt, together, write_run(), overrides)
    assert code == other[0] == 65 and text == other[1]
    assert "(on node2 only)" in text


def see_folder(world, folders):
    startup.require_shared_folder(world, Path(folders[world.rank]), 1.0)
    return "seen"


def test_a_folder_that_all_see_is_left_as_it_was(tmp_path):
    assert ranks(2).run(attempt, see_folder, [str(tmp_path)] * 2) == ["seen", "seen"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "stale", "another"])
def test_a_node_that_sees_another_folder_is_named_within_the_time(tmp_path, kind):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    if kind != "missing":
        theirs.mkdir()
    if kind == "stale":
        (theirs / ".shared").write_text("an older start")
    (code, text), other = ranks(2).run(attempt, see_folder, [str(ours), str(theirs)])
    assert code == other[0] == 78 and text == other[1]
    assert "the run folder is not the same, or cannot be written, on node2" in text
    assert ("an older start" if kind == "stale" else "No such file") in text


def same_files(world, yaml, roots):
    plan = resolve_run(
        load_config([Path(yaml)], [f'data.train=[{{"path": "{roots[world.rank]}"}}]']).config,
        world_size=2, device="cpu", gpu_memory_bytes=None, bf16=True,
    )  # fmt: skip
    root = str(roots[world.rank])
    sizes = startup.file_sizes

    def as_one_path(plan):
        return {path.replace(root, "/data"): size for path, size in sizes(plan).items()}

    startup.file_sizes = as_one_path
    try:
        startup.require_same_files(world, plan)
    finally:
        startup.file_sizes = sizes
    return "same"


def test_data_cut_short_on_one_node_is_found(write_run, dataset, tmp_path):
    shutil.copytree(dataset.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "data"
    yaml = write_run()
    assert ranks(2).run(attempt, same_files, yaml, [str(dataset), str(copy)]) == ["same", "same"]
    (short, *_) = sorted(copy.rglob("*.bin"))
    with short.open("r+b") as file:
        file.truncate(10)
    (code, text), other = ranks(2).run(attempt, same_files, yaml, [str(dataset), str(copy)])
    assert code == other[0] == 78 and text == other[1]
    assert "the data files are not the same on all nodes" in text and "10 on node2" in text


def test_phases_of_the_batch_script_are_read_and_nonsense_is_not(monkeypatch):
    monkeypatch.setenv("DSGPT_PHASES", "prolog=100.5, stage=200,=3,broken,x=y")
    assert batch_phases() == [("prolog", 100.5), ("stage", 200.0)]


def test_the_age_of_a_process_includes_its_start():
    assert 0 < process_age() < 86400


def test_times_of_phases_add_up():
    heartbeat = Heartbeat()
    for name in ("build the model", "step", "build the model"):
        heartbeat.phase(name)
    times = heartbeat.times()
    assert set(times) == {"start", "build the model", "step"} and min(times.values()) >= 0


def tell(world, folder):
    log = RunLog(Path(folder), "a1", enabled=world.is_main)
    heartbeat = Heartbeat()
    heartbeat.phase("build the model")
    time.sleep(0.3 * world.rank)
    heartbeat.phase("step")
    startup.tell_startup(world, heartbeat, log)


def test_the_slowest_rank_of_a_phase_is_named_also_without_a_batch_script(tmp_path):
    ranks(2).run(tell, str(tmp_path))
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["event"] == "startup" and told["batch"] == {}
    assert told["phases"]["model"]["rank"] == 1 and told["phases"]["model"]["seconds"] >= 0.3


def run_ranks(yaml, folder, **per_rank):
    """Two ranks without a launcher, as under srun, each as a node of its own; `per_rank` are variables, one value each."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
    processes = [
        start(
            [sys.executable, "-m", "dsgpt.train", str(yaml)],
            **common, RANK=str(rank), LOCAL_RANK="0", DS_ACCELERATOR="cpu", DSGPT_PHASES="batch=1",
            PYTHONPATH=os.pathsep.join([*per_rank.get("paths", ["", ""])[rank].split(), *sys.path]),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
        return [process.returncode for process in processes], outputs
    finally:
        for process in processes:
            process.kill()


def test_a_run_records_its_nodes_and_its_start(write_run, tmp_path):
    codes, outputs = run_ranks(write_run("told", **{"training.max_steps": 4}), tmp_path)
    assert codes == [0, 0], outputs
    environment = json.loads((tmp_path / "told/environment.json").read_text())
    (group,) = environment["nodes"]
    assert environment["num_nodes"] == 2 and group["num_nodes"] == 2 and group["torch"] == environment["torch"]
    events = [json.loads(line) for line in (tmp_path / "told/events.jsonl").read_text().splitlines()]
    (event,) = [one for one in events if one["event"] == "startup"]
    assert list(event["phases"])[:3] == ["python", "imports", "rendezvous"]
    assert {"nodes", "data", "model", "rehearsal", "first step"} <= event["phases"].keys()
    # Each phase is the slowest rank's, so that their sum is at least what any one rank took.
    assert sum(one["seconds"] for one in event["phases"].values()) >= event["seconds"] - 0.5
    assert all(one["rank"] in (0, 1) and one["host"] for one in event["phases"].values())
    assert event["batch"]["batch"] > 1e9 and "s to the first step: batch" in outputs[0]
    assert "nodes      2 nodes" in outputs[0]
    assert not list((tmp_path / "told/logs").glob("*/.shared*"))


def test_ranks_of_another_environment_end_with_78(write_run, tmp_path):
    """T904: on one rank another version of a package stands first on the path."""
    planted = tmp_path / "other" / "deepspeed-0.0.1.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    codes, outputs = run_ranks(write_run("mixed"), tmp_path, paths=["", str(tmp_path / "other")])
    assert codes == [78, 78], outputs
    for text in outputs:
        assert "the software is not the same on all nodes: deepspeed" in text and "'0.0.1' on" in text
        assert "(rank 1)" in text, "on one host the host's name says too little"
    assert not (tmp_path / "mixed/config.yaml").exists()
