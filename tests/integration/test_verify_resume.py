"""`dsgpt verify-resume`: real runs killed and resumed; a resume that forgets something must be seen and named.

A defect is put into a copy of the package, by one changed line, and the copy is what runs: launcher, ranks and the verb.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsgpt
from dsgpt.checkpoint import commit
from dsgpt.errors import ConfigError
from dsgpt.train.verify_resume import Trial
from tests.integration.test_launch import processes_of

STEPS = 4
NO_DROPOUT = {"model.dropout": {"embedding": 0.0, "attention": 0.0, "residual": 0.0}}


def verify(yaml: Path, *words: str, package: Path | None = None) -> tuple[int, dict]:
    """Exit code and JSON of the verb, run from the folder that holds `package`."""
    home = package or Path(dsgpt.__file__).parents[1]
    command = [sys.executable, "-m", "dsgpt", "verify-resume", str(yaml), "--steps", str(STEPS), "--json", *words]
    done = subprocess.run(
        command, cwd=home, env={**os.environ, "PYTHONPATH": str(home)}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def verdicts(told: dict) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in told["checks"]}


@pytest.fixture()
def package_with(tmp_path):
    """package_with(file, old, new) -> a folder with a copy of dsgpt in which one line is another."""

    def change(file: str, old: str, new: str) -> Path:
        home = tmp_path / "changed"
        source = Path(dsgpt.__file__).parent
        shutil.copytree(source, home / "dsgpt", ignore=shutil.ignore_patterns("__pycache__"))
        for extra in ("ds_configs", "slurm"):
            shutil.copytree(source.parent / extra, home / extra)
        text = (home / "dsgpt" / file).read_text("utf-8")
        assert text.count(old) == 1
        (home / "dsgpt" / file).write_text(text.replace(old, new), "utf-8")
        return home

    return change


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_told_to_be_bit_identical_and_the_runs_own_folder_stays_away(write_run, tmp_path):
    yaml = write_run("good", **{"training.max_steps": 9, "checkpoint.save_interval": 2})  # too short for 2 x 5
    code, told = verify(yaml, "--steps", "5")
    assert code == 0 and told["ok"] and told["identical"], told
    assert (told["committed_step"], told["last_step"]) == (4, 8)
    assert 4 < told["killed_at_step"] <= 8
    assert all(verdicts(told).values()) and len(told["checks"]) == 5
    assert told["first_differing_step"] is None and told["first_differing_tensor"] is None
    assert told["folder"] is None and not list(tmp_path.glob("good*/")), "its runs are removed, and it made no other"


FORGETFUL = (
    "checkpoint/store.py",
    "return reader.read(fragment.name, kind, fragment.start, fragment.numel)\n",
    "return reader.read(fragment.name, kind, fragment.start, fragment.numel) * (kind != 'exp_avg_sq')\n",
)


@pytest.mark.slow
def test_a_resume_that_forgets_a_moment_is_found_with_its_first_step_and_tensor(write_run, package_with, tmp_path):
    package = package_with(*FORGETFUL)
    code, told = verify(write_run("bad"), package=package)
    assert code == 1 and not told["ok"] and told["identical"] is False
    assert told["first_differing_step"] == STEPS + 2, "step 5 updates with it, step 6 sees the weights"
    tensor = told["first_differing_tensor"]
    assert (tensor["step"], tensor["kind"]) == (STEPS, "exp_avg_sq"), "as it was read, before the next step"
    assert list(verdicts(told).values()) == [True, True, False, True, False, False]
    assert Path(told["folder"]).is_dir(), "what differs stays, to be looked at"


@pytest.mark.slow
def test_one_flipped_bit_in_the_checkpoint_is_found_and_named(write_run):
    class Flipped(Trial):
        def _kill(self):
            lines = super()._kill()
            file = self._checkpoint("resumed", self.saved) / "rank-00001.safetensors"
            data = bytearray(file.read_bytes())
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            self.flipped = next(name for name in header if name.startswith("master:"))
            data[8 + length + header[self.flipped]["data_offsets"][0] + 2] ^= 1  # of its first element
            file.write_bytes(data)
            return lines

    trial = Flipped([str(write_run("flip", **{"checkpoint.verify": "size"}))], STEPS)
    report = trial.run()
    assert not report.ok and report.first_differing_step == STEPS + 1
    tensor = report.first_differing_tensor
    assert tensor["step"] == STEPS and tensor["unequal"] == 1
    assert f"{tensor['kind']}:{tensor['name']}" == trial.flipped
    assert f"first tensor: {tensor['kind']} of {tensor['name']} at step {STEPS}" in report.verdict


@pytest.mark.slow
def test_another_topology_keeps_the_state_bit_for_bit_and_the_first_loss(write_run):
    code, told = verify(write_run("moved", **NO_DROPOUT), "--world-size", "1", "--deepspeed", "zero3")
    assert code == 0 and told["ok"] and told["identical"] is None, told
    assert all(verdicts(told).values()) and len(told["checks"]) == 6
    assert told["drift"]["first"] <= 1e-5
    assert "60 of 60 tensors" in next(c["detail"] for c in told["checks"] if "saved one" in c["name"])


@pytest.mark.slow
def test_a_forgotten_moment_is_found_in_another_topology_though_the_first_loss_agrees(write_run, package_with):
    package = package_with(*FORGETFUL)
    code, told = verify(write_run("bad", **NO_DROPOUT), "--deepspeed", "zero3", package=package)
    assert code == 1 and not told["ok"]
    assert told["drift"]["first"] <= 1e-5, "the weights were read: only the state shows it"
    assert told["first_differing_tensor"]["kind"] == "exp_avg_sq" and told["first_differing_step"] == STEPS


@pytest.mark.slow
def test_dropout_on_other_ranks_is_told_and_not_judged(write_run):
    code, told = verify(write_run("dropout"), "--world-size", "4")
    assert code == 0, told
    (first,) = [check for check in told["checks"] if "first loss" in check["name"]]
    assert first["passed"] is None and "dropout" in first["detail"]


@pytest.mark.slow
def test_a_run_that_does_not_repeat_itself_is_told_from_a_resume_that_fails(write_run, package_with):
    line = "lr=run.learning_rate,"
    package = package_with("train/loop.py", line, "lr=run.learning_rate * (1 + 1e-7 * __import__('os').getpid()),")
    code, told = verify(write_run("noisy"), package=package)
    assert code == 0 and told["ok"] and told["identical"] is False, told
    assert "not repeatable here, even without a resume" in told["verdict"]
    assert told["first_differing_step"] <= STEPS and told["first_differing_tensor"] is None


@pytest.mark.slow
def test_a_start_at_step_0_is_no_resume_though_its_bits_are_right(write_run, package_with):
    line = "find_checkpoint(wanted, world, plan.config.checkpoint.verify)"
    package = package_with("train/resume.py", line, "(None, [])")
    code, told = verify(write_run("again"), package=package)
    assert code == 1 and not told["ok"]
    assert verdicts(told)[f"the second start continued from step {STEPS}"] is False


@pytest.mark.slow
def test_a_fork_is_verified_from_its_own_first_step(write_run, tmp_path):
    def words(yaml):
        return [sys.executable, "-m", "dsgpt", "train", str(yaml)]

    origin = write_run("origin", **{"run.stop_at_step": 3})
    assert subprocess.run(words(origin), capture_output=True).returncode == 0
    assert [step for step, _ in commit.list_committed(tmp_path / "origin/checkpoints")] == [3]
    code, told = verify(write_run("fork", **{"model.init_from": f"fork:{tmp_path / 'origin'}"}))
    assert code == 0 and told["identical"], told
    assert (told["committed_step"], told["last_step"]) == (3 + STEPS, 3 + 2 * STEPS)


@pytest.mark.slow
def test_a_run_that_fails_by_itself_passes_its_code_and_log_on(write_run):
    code, told = verify(write_run("broken", **{"optimizer.learning_rate": 1e30}))
    assert code == told["exit_code"] == 79
    assert "the run 'reference' failed with code 79" in told["message"] and "reference.log" in told["message"]


@pytest.mark.slow
def test_a_run_that_ended_before_the_kill_is_started_again_and_killed_earlier(write_run):
    class Late(Trial):
        starts = 0

        def _start(self, name, *rest):
            self.starts += name == "killed"
            return super()._start(name, *rest)

        def _has_reached(self, step):
            return self.starts > 1 and super()._has_reached(step)

    told = []
    trial = Late([str(write_run("quick"))], STEPS, say=told.append)
    report = trial.run()
    assert report.identical and trial.starts == 2
    assert f"it had committed step {2 * STEPS} before the kill" in told


def test_what_cannot_work_is_refused_before_anything_is_started(write_run, tmp_path):
    yaml = str(write_run("refused"))
    with pytest.raises(ConfigError, match=r"cannot be on 3 ranks(.|\n)*verify-resume RUN.yaml --world-size 2 or 4"):
        Trial([yaml], world_size=3)
    with pytest.raises(ConfigError, match="too short to be interrupted"):
        Trial([yaml, "training.max_steps=3", "optimizer.warmup_steps=1"])
    with pytest.raises(ConfigError, match="is not empty"):
        Trial([yaml], output=tmp_path)
    assert not list(tmp_path.glob("refused*/"))


@pytest.mark.slow
def test_a_stopped_verification_leaves_no_process_and_no_folder(write_run, tmp_path):
    yaml = write_run("stopped", **{"training.max_steps": 100000})
    command = [sys.executable, "-m", "dsgpt", "verify-resume", str(yaml), "--steps", "40000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("stopped.verify-resume-*/reference/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not processes_of(str(yaml)) and not list(tmp_path.glob("stopped*/"))
