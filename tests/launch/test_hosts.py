"""Hostfiles, filters, the word that carries a start, and the commands made of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsgpt.errors import ConfigError
from dsgpt.launch import carried, hosts, launcher, openmpi, remote
from dsgpt.launch.hosts import Node

POOL = {"node1": 4, "node2": 2}


def test_a_hostfile_is_read_in_its_order_with_comments_blank_lines_and_windows_line_ends(tmp_path):
    file = tmp_path / "hosts"
    file.write_bytes(b"# all\r\nnode2 slots=2\r\n\r\n\tnode1\t slots=4  # the old one\r\n")
    assert list(hosts.read_hostfile(file).items()) == [("node2", 2), ("node1", 4)]


def test_everything_wrong_with_a_hostfile_is_told_at_once_with_its_line(tmp_path):
    file = tmp_path / "hosts"
    lines = [
        "-oProxyCommand=x slots=1",
        "a;touch slots=1",
        "$(x) slots=2",
        "good slots=2",
        "good slots=2",
        "zero slots=0",
    ]
    lines += ["huge slots=99999999999", "half", "two words slots=1", "\x1b[31mred slots=1", "é slots=1", "ok slots=٣"]
    file.write_text("\n".join(lines), "utf-8")
    with pytest.raises(ConfigError) as caught:
        hosts.read_hostfile(file)
    told = str(caught.value)
    for number in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12):
        assert f"{file}:{number}: " in told
    assert f"{file}:4" not in told and "good stands in line 4 already" in told and "\x1b" not in told
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n", b"\xff\xfe"])
def test_a_file_without_hosts_is_refused(tmp_path, content):
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(ConfigError):
        hosts.read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError):
        hosts.read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, [("node1", (0, 1, 2, 3)), ("node2", (0, 1))]),
        ({"include": "node2@node1:0,2"}, [("node1", (0, 2)), ("node2", (0, 1))]),
        ({"include": "node1:3@node1:1,3"}, [("node1", (1, 3))]),
        ({"exclude": "node1:0,1"}, [("node1", (2, 3)), ("node2", (0, 1))]),
        ({"exclude": "node1"}, [("node2", (0, 1))]),
        ({"num_gpus": 2}, [("node1", (0, 1)), ("node2", (0, 1))]),
    ],
)
def test_filters_mean_what_deepspeed_means_by_them(options, chosen):
    assert [(node.host, node.slots) for node in hosts.select(POOL, **options)] == chosen
    if "num_gpus" not in options:
        from deepspeed.launcher.runner import parse_inclusion_exclusion

        theirs = parse_inclusion_exclusion(POOL, options.get("include", ""), options.get("exclude", ""))
        assert {host: tuple(slots) for host, slots in theirs.items()} == dict(chosen)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"include": "node3"}, "no such host"),
        ({"include": "node1:4"}, "node1 has no slot 4"),
        ({"include": "node1:x"}, "these are no slots"),
        ({"include": "node1:"}, "these are no slots"),
        ({"exclude": "node1@node2"}, "leaves no host"),
        ({"include": "node1", "exclude": "node2"}, "exclude each other"),
        ({"include": "node1", "num_gpus": 1}, "exclude each other"),
        ({"num_gpus": 3}, "fewer slots than --num-gpus"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        hosts.select(POOL, **options)


def test_what_is_carried_arrives_and_secrets_and_this_hosts_own_variables_stay():
    environment = {
        "NCCL_DEBUG": "a b$(x)",
        "HF_TOKEN": "s",
        "WANDB_API_KEY": "s",
        "CUDA_VISIBLE_DEVICES": "1",
        "PATH": "/x",
    }
    kept = carried.carried_environment({**environment, "DSGPT_ATTEMPT": "1", "PYTHONPATH": "/a"})
    assert kept == {"NCCL_DEBUG": "a b$(x)", "DSGPT_ATTEMPT": "1", "PYTHONPATH": "/a"}
    one = carried.Carried(["a\udcff\n'\"", ""], "/ü", "/l", {"node1": [0, 2]}, "node1", 29500, kept)
    word = carried.pack(one)
    assert carried.SAFE.fullmatch(word) and carried.Carried.unpack(word) == one
    with pytest.raises(ValueError, match=r"not a start|Incorrect|base64"):
        carried.Carried.unpack("xyz")


def test_only_words_of_safe_characters_go_to_another_host(tmp_path):
    one = carried.Carried(["$(x)"], "/a b", "/c d", {"node1": [0], "node2": [0]}, "node1", 29500)
    for name in ("ssh", "pdsh", "openmpi"):
        planned = remote.Remote((Node("node1", (0,)), Node("node2", (0,))), name, "node1", 29500)
        for command in remote.commands(planned, one, tmp_path, {"PYTHONPATH": "/a:/b"}).values():
            words = command[command.index("env") :]
            assert all(carried.SAFE.fullmatch(word.replace("%n", "0")) for word in words), words
            assert "PYTHONPATH=/a:/b" in " ".join(words)
    with pytest.raises(ConfigError, match="PYTHONPATH has characters"):
        remote.commands(planned, one, tmp_path, {"PYTHONPATH": "/a b"})


@pytest.mark.parametrize(
    "nodes, options, told",
    [
        (["localhost", "node2"], {}, "localhost is another machine"),
        (["node1"], {"launcher": "no-ssh"}, "needs a port"),
        (["node1"], {"launcher": "no-ssh", "master_port": 1, "node_rank": 1}, "no such node"),
        (["node1"], {"node_rank": 0}, "--node-rank is for"),
        (["node1"], {"master_addr": "-oX"}, "no host name"),
    ],
)
def test_hosts_that_cannot_be_started_so_are_refused(monkeypatch, nodes, options, told):
    monkeypatch.setattr(remote.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(ConfigError, match=told):
        remote.plan_remote([Node(host, (0,)) for host in nodes], **options)


def test_a_program_that_is_missing_and_gpus_that_mpirun_cannot_choose_are_told(monkeypatch):
    monkeypatch.setattr(remote.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs the program pdsh"):
        remote.plan_remote([Node("node1", (0,))], "pdsh")
    monkeypatch.setattr(remote.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(ConfigError, match="cannot leave out GPUs"):
        remote.plan_remote([Node("node1", (1,))], "openmpi")


def test_ranks_of_mpirun_are_what_open_mpi_says():
    said = {f"OMPI_COMM_WORLD_{name}": value for name, value in
            (("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))}  # fmt: skip
    where = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert openmpi.ranks({**said, **where}) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    assert openmpi.ranks({**said, "RANK": "0"}) == {} == openmpi.ranks({})
    with pytest.raises(ConfigError, match="where rank 0 is"):
        openmpi.ranks(said)
    with pytest.raises(ConfigError, match="not numbers"):
        openmpi.ranks({**said, **where, "OMPI_COMM_WORLD_SIZE": "x"})


def test_a_launcher_that_died_is_no_success_whatever_its_code(tmp_path):
    log = tmp_path / "launcher.log"
    log.write_text("node2: no route\n")
    for codes in (
        {"node1": 0, "node2": 0},
        {"node1": 0, "node2": -9},
        {"node1": 255, "node2": 0},
        {"node1": 1, "node2": 143},
    ):
        end = launcher._end_of(tmp_path, log, codes)
        assert end.exit_code == 76 and "no route" in end.message
    assert launcher._end_of(tmp_path, log, {"node1": 76, "node2": 78}).exit_code == 78


def test_no_ssh_prints_the_command_of_each_host(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    words = ["train", "a b.yaml", "--hostfile", "hosts", "--launcher", "no-ssh", "--master-port", "29500"]
    command = [sys.executable, "-m", "dsgpt", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("dsgpt train 'a b.yaml' ") and "--node-rank 0   # node1" in lines[1]
    assert "--master-port 29500" in lines[2] and "--node-rank 1   # node2" in lines[2]


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--include", "node1"], 2, "--include needs --hostfile"),
        (["--num-processes", "2", "--num-gpus", "2"], 2, "--num-processes is for this machine alone"),
        (["--hostfile", "nowhere"], 78, "cannot be read"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, words, code, told):
    command = [sys.executable, "-m", "dsgpt", "train", "run.yaml", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and told in done.stderr
