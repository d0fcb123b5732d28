"""The commands themselves: real launcher, real signals, real exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsgpt.checkpoint import commit
from dsgpt.process import SECOND_REQUEST_SECONDS

DSGPT = [sys.executable, "-m", "dsgpt"]


def start(command, before=None, **environment):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=before,
    )


def wait_for_step(folder: Path, step: int, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1]).get("step", -1) >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early with {process.returncode}:\n{process.stdout.read()}")
        time.sleep(0.05)
    raise AssertionError("the run did not get that far")


def processes_of(text: str) -> list[int]:
    """Live processes whose command line contains `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_gone(yaml: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(str(yaml)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(str(yaml)), "processes of the job are left"


def deepspeed_command(yaml: Path) -> list[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_gpus", "2", "--module", "dsgpt.train", str(yaml)]


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_sigterm_commits_one_step_and_the_deepspeed_launcher_itself_continues_it(write_run, tmp_path):
    yaml = write_run("signal", **{"training.max_steps": 4000, "logging.eval_interval": 50})
    process = start([*DSGPT, "train", str(yaml)])
    wait_for_step(tmp_path / "signal", 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert f"continue with: dsgpt train {yaml}" in output
    ((step, checkpoint),) = commit.list_committed(tmp_path / "signal/checkpoints")
    assert step >= 5 and f"stopped at step {step} of 4000, committed" in output
    assert commit.verify(checkpoint) == []
    assert not processes_of(str(yaml)), "nothing of the job is left"

    # DeepSpeed's own command, and its own way of stopping: SIGTERM to the launcher, which passes it on.
    launcher = deepspeed_command(yaml)
    finishing = start([*launcher, f"training.max_steps={step + 6}"], DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    output, _ = finishing.communicate(timeout=120)
    assert finishing.returncode == 0, output
    assert f"continuing from step {step}" in output
    assert commit.list_committed(tmp_path / "signal/checkpoints")[-1][0] == step + 6

    again = subprocess.run(
        [*DSGPT, "train", str(yaml), f"training.max_steps={step + 6}"], capture_output=True, text=True
    )
    assert again.returncode == 0 and "nothing to train" in again.stderr + again.stdout


@pytest.mark.slow
def test_a_second_signal_ends_at_once_with_the_last_commit_intact(write_run, tmp_path):
    yaml = write_run(
        "twice", **{"training.max_steps": 100000, "checkpoint.save_interval": 5, "checkpoint.keep_last": 2}
    )
    process = start([*DSGPT, "train", str(yaml)])
    wait_for_step(tmp_path / "twice", 12, process)
    (pid,) = {int(text) for text in children_of(process.pid)}
    os.kill(pid, signal.SIGSTOP)  # the launcher cannot help; and the ranks cannot reach the end of a step:
    ranks = [int(text) for text in children_of(pid)]
    os.kill(ranks[1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(SECOND_REQUEST_SECONDS + 0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    wait_until_gone(yaml, 15)
    committed = commit.list_committed(tmp_path / "twice/checkpoints")
    assert committed and all(commit.verify(path) == [] for _, path in committed)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_process_and_a_committed_step(write_run, tmp_path):
    yaml = write_run("orphans", **{"training.max_steps": 100000})
    process = start([*DSGPT, "train", str(yaml)])
    wait_for_step(tmp_path / "orphans", 3, process)
    process.kill()
    process.wait()
    wait_until_gone(yaml, 40)
    ((step, path),) = commit.list_committed(tmp_path / "orphans/checkpoints")
    assert step >= 3 and commit.verify(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["runner", "group"])
def test_the_deepspeed_command_stopped_by_sigterm_commits_and_leaves_nothing(write_run, tmp_path, victim):
    yaml = write_run("runner", **{"training.max_steps": 100000})
    launcher = deepspeed_command(yaml)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    wait_for_step(tmp_path / "runner", 3, process)
    # The command alone, which tells nobody; or every process of the job at once, as a scheduler does.
    (os.kill if victim == "runner" else os.killpg)(process.pid, signal.SIGTERM)
    wait_until_gone(yaml, 60)
    ((step, path),) = commit.list_committed(tmp_path / "runner/checkpoints")
    assert step >= 3 and commit.verify(path) == []


def test_a_dry_run_shows_everything_resolved_without_torch_and_starts_nothing(write_run, tmp_path):
    yaml = write_run("dry")
    code = (
        "import sys; from dsgpt.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "train", str(yaml), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("16 sequences = 4 per rank x 2 ranks x 2 accumulation", "dtype: fp32", '"train_batch_size": 16',
                 "deepspeed.launcher.launch"):  # fmt: skip
        assert text in done.stdout
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "override, code, expected",
    [
        ("training.max_step=5", 78, "training.max_steps"),
        ("training.micro_batch_size_per_gpu=3", 78, r"global_batch_size = micro_batch_size_per_gpu x GPUs"),
        ("model.vocab_size=100", 78, "vocabulary is smaller than the tokenizer's"),
        ("data.train=[{path: nowhere}]", 65, "holds no finished dataset"),
        ("training.global_batch_size=4000", 65, "smaller than one global batch"),
        ("training.seq_length=100000", 65, "too short for one sequence"),
        ("device=cuda", 78, "there is no GPU here"),
        ("deepspeed=zero9", 78, "zero3"),
    ],
)
def test_bad_input_ends_with_its_code_and_says_what_to_do(write_run, override, code, expected):
    yaml = write_run("bad")
    done = subprocess.run([*DSGPT, "train", str(yaml), override], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert re.search(expected, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_made_ends_with_73(write_run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    yaml = write_run("bad")
    done = subprocess.run(
        [*DSGPT, "train", str(yaml), f"run.output_dir={tmp_path}/file/run"], capture_output=True, text=True
    )
    assert done.returncode == 73, done.stderr
    assert "run.output_dir" in done.stderr and "Traceback" not in done.stderr


def test_data_of_another_tokenizer_is_refused_by_name(write_run, dataset, tmp_path):
    from dsgpt.tokenizer.training import train_on_texts

    train_on_texts([Path(__file__).read_text("utf-8")], 300, tmp_path / "other", "hf-bpe", {})
    yaml = write_run("other")
    done = subprocess.run(
        [*DSGPT, "train", str(yaml), f"tokenizer.path={tmp_path / 'other'}"], capture_output=True, text=True
    )
    assert done.returncode == 78 and "another tokenizer than tokenizer.path=" in done.stderr, done.stderr
    same = [*DSGPT, "train", str(yaml), f"tokenizer.path={dataset / 'tokenizer'}", "--dry-run"]
    assert subprocess.run(same, capture_output=True).returncode == 0
