"""What SLURM tells, as 22.05 wrote it with GPUs, arrays and heterogeneous jobs, and text that is none of it."""

from __future__ import annotations

import time

import pytest

from dsgpt.errors import ConfigError
from dsgpt.launch import slurm
from dsgpt.launch.layout import choose_layout
from dsgpt.launch.slurm import Node
from dsgpt.process import scheduler_job

# As `scontrol show job -d -o` printed them, shortened in the middle.
RECORD = (
    "JobId=12 JobName={name} UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901748 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:00 TimeLimit=00:10:00 TimeMin=N/A StartTime=2026-11-26T19:20:41 EndTime=2026-11-26T19:30:41 "
    "Partition=main NodeList=node[1-2] BatchHost=node1 NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 "
    "TRES=cpu=2,mem=1G,node=2,billing=2 Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=* JOB_GRES=gpu:fake:3   "
    "Nodes=node2 CPU_IDs=0-3,8 Mem=512 GRES=gpu:fake:1(IDX:0)   Nodes=node1 CPU_IDs=0 Mem=512 GRES=gpu:fake:2(IDX:0-1) "
    "MinCPUsNode=1 MinMemoryNode=512M Features=(null) Command=(null) WorkDir=/home/a b StdOut=/home/a b/out.log Power= "
    "TresPerJob=gres:gpu:3 "
)
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("n[01-04,7]", ["n01", "n02", "n03", "n04", "n7"]),
        ("a1,b[9-11],login.example.org", ["a1", "b9", "b10", "b11", "login.example.org"]),
        ("r[1-2]n[3-4]-ib", ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]),
    ],
)
def test_host_lists_are_those_that_scontrol_show_hostnames_prints(text, hosts):
    """T618."""
    assert slurm.expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n[a-b]", "n[5-1]", "-oProxyCommand=touch x", "n[1-99999999]", "a;b", "$(touch x)", "n[1] m"]
)
def test_what_is_no_host_list_is_refused(text):
    """T618, T911."""
    with pytest.raises(ConfigError, match="not a list of hosts"):
        slurm.expand_hosts(text)


def test_tasks_per_node():
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError):
        slurm.tasks_per_node("2(x")


def test_a_rank_learns_who_it_is_from_the_step():
    environment = dict(STEP)
    slurm.adopt_rank_environment(environment)
    told = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")}
    assert told == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"}
    assert environment["MASTER_ADDR"] == "n01" and 20000 <= int(environment["MASTER_PORT"]) < 40000
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    slurm.adopt_rank_environment(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"]
    requeued = {**STEP, "SLURM_RESTART_COUNT": "1"}
    slurm.adopt_rank_environment(requeued)
    assert requeued["MASTER_PORT"] != environment["MASTER_PORT"], "a port that was taken is not tried for ever"


def test_outside_a_step_and_under_another_launcher_nothing_is_changed():
    batch = {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    torchrun = {**STEP, "RANK": "0", "WORLD_SIZE": "1"}
    for environment in (batch, torchrun):
        before = dict(environment)
        slurm.adopt_rank_environment(environment)
        assert environment == before


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NODELIST": ""},
        {"SLURM_LOCALID": "2"},
        {"SLURM_NODEID": "2"},
        {"SLURM_PROCID": "4"},
        {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
        {"SLURM_LOCALID": "one"},
    ],
)
def test_missing_and_contradicting_variables_are_refused(change):
    """T618."""
    with pytest.raises(ConfigError, match=r"SLURM|srun"):
        slurm.adopt_rank_environment({**STEP, **change})


def test_ranks_that_leave_gpus_idle_on_purpose_see_only_theirs():
    environment = {**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3", slurm.IDLE_GPUS: "1"}
    slurm.adopt_rank_environment(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("name", ["wrap", "x JobState=CANCELLED Nodes=evil CPU_IDs=0", "a b  UserId=me", "ä %j $(x)"])
def test_a_record_is_read_whatever_the_job_is_called(name):
    """T910."""
    (record,) = slurm.parse_job(RECORD.format(name=name) + "\n")
    assert record.nodes == (Node("node1", 2, 1), Node("node2", 1, 5))
    assert (record.state, record.fields["Restarts"], record.fields["JobName"]) == ("RUNNING", "2", name)
    assert record.fields["StdOut"] == "/home/a b/out.log"
    assert record.end_time - record.start_time == 600


def test_a_time_that_is_none():
    assert [slurm.parse_time(text) for text in ("Unknown", "None", "N/A", "")] == [None] * 4


def test_times_are_utc_whatever_zone_this_process_is_in(monkeypatch):
    """The batch script asks for UTC; in a container the zone is often another one than the host's."""
    monkeypatch.setenv("TZ", "EST5EDT")
    time.tzset()
    try:
        assert slurm.parse_time("1970-01-01T00:01:00") == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_array_tasks_are_jobs_of_their_own_and_parts_of_a_heterogeneous_job_are_one():
    """T610."""
    assert scheduler_job({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}) == ("7_3", 0)
    assert scheduler_job({"SLURM_JOB_ID": "9", "SLURM_HET_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}) == ("8", 2)
    assert scheduler_job({}) == ("", 0)


def test_the_task_number_is_filled_in_only_in_an_array():
    words = ["run.yaml", "run.output_dir=runs/{task}", "{task}.yaml"]
    assert slurm.fill_task(words, {}) == words
    assert slurm.fill_task(words, {"SLURM_ARRAY_TASK_ID": "4"}) == ["run.yaml", "run.output_dir=runs/4", "{task}.yaml"]


NODE8 = [Node(f"n{i}", 8, 64) for i in range(4)]


@pytest.mark.parametrize(
    ("nodes", "batch", "micro", "ranks"),
    [
        (NODE8, 512, 4, [8, 8, 8, 8]),
        (NODE8[:3], 512, 4, [8, 8]),  # 24 ranks do not divide 128
        (NODE8[:3], 24, 1, [8, 8, 8]),
        (NODE8[:1], 12, 1, [6]),  # 8 do not divide 12
        (NODE8[:2], 12, 1, [6, 6]),
        (NODE8[:2], 7, 1, [7]),
        (NODE8, 512, None, [8, 8, 8, 8]),
        ([Node("a", 2, 2), Node("b", 1, 1)], 3, 1, [2, 1]),
        ([Node("a", 2, 2), Node("b", 1, 1)], 4, 1, [2]),
        ([Node("a", 0, 4), Node("b", 2, 4)], 4, 1, [2]),  # a node without a GPU has no rank
        ([Node("a", 0, 4), Node("b", 0, 4)], 4, 1, [1, 1]),  # no GPU anywhere: SLURM's tasks
    ],
)
def test_the_largest_part_of_an_allocation_that_divides_the_batch(nodes, batch, micro, ranks):
    layout = choose_layout(nodes, [1] * len(nodes), batch, micro)
    assert list(layout.ranks) == ranks and batch % ((micro or 1) * layout.world_size) == 0
    used, had = layout.world_size, sum(node.gpus for node in nodes)
    assert bool(layout.idle_text()) == (used < had or len(layout.nodes) < len(nodes))


def test_srun_is_told_exactly_these_ranks():
    even = choose_layout(NODE8[:3], [1] * 3, 512, 4)
    assert even.srun_options() == [
        "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--nodelist=n0,n1", "--cpus-per-task=8",
    ]  # fmt: skip
    uneven = choose_layout([Node("a", 2, 1), Node("b", 1, 1)], [1, 1], 3, 1)
    assert uneven.srun_options() == ["--nodes=2", "--ntasks=3", "--distribution=arbitrary", "--overcommit"]
    assert uneven.hostfile() == "a\na\nb\n"
    parts = choose_layout(NODE8[:2], [1] * 2, 512, 4)
    assert parts.srun_options(parts=2)[:2] == ["--het-group=0-1", "--ntasks-per-node=8"]
