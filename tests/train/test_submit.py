"""`dsgpt submit` with a stand-in for sbatch: what is checked before, what is queued, and what is taken back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsgpt.cli import main
from dsgpt.errors import ConfigError, DsgptError
from dsgpt.launch.submission import read_submissions
from dsgpt.train.lead import DEFAULT_SECONDS, MARGIN_SECONDS
from dsgpt.train.submit import Asked, plan_submission, queue
from tests.faults.submit_names import read_header, try_texts

SHIM = """#!/bin/sh
printf '%s\\n' "$*" >>"$SHIM/calls"
[ "${0##*/}" = sbatch ] || exit 0
number=$(grep -c parsable "$SHIM/calls")
[ $number -lt "${REFUSE_FROM:-99}" ] || { echo no >&2; exit 1; }
echo $((100 + number))
"""


@pytest.fixture()
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder with stand-ins for sbatch and scancel that write down how they were called; their calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scancel", "squeue"):
        (folder / name).write_text(SHIM)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SHIM", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DSGPT_SITE", raising=False)
    monkeypatch.delenv("DSGPT_SITE_YAML", raising=False)
    return folder / "calls"


def asked(config: Path, *words: str, chain: int = 1, rehearse: bool = False, extra: dict | None = None, **options: str):
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return plan_submission(Asked((str(config), *words), named, extra or {}, chain, rehearse, ("submit", "run.yaml")))


def header_of(plan, index: int = 0) -> dict[str, str]:
    files = plan.preview()[index]
    return read_header(files.texts[Path(files.command[2]).name])


def test_everything_wrong_is_told_at_once_and_nothing_is_touched(slurm, write_run, tmp_path):
    config = write_run()
    with pytest.raises(ConfigError) as caught:
        asked(config, "trainig.max_steps=3", nodes="x", time="soon", extra={"output": "y"})
    told = str(caught.value)
    for part in ("trainig", "nodes must be", "not a time limit", "--output cannot be given"):
        assert part in told
    with pytest.raises(DsgptError) as caught:
        asked(config, f"data.train=[{{path: {tmp_path}/nowhere}}]")
    assert caught.value.exit_code == 65
    assert not slurm.exists() and not (tmp_path / "run").exists()


def test_the_dry_run_prints_the_script_without_torch_and_without_a_file(slurm, write_run, tmp_path):
    code = (
        "import sys; from dsgpt.cli import cli; "
        "cli.main(sys.argv[1:], standalone_mode=False); "
        "sys.exit(len({'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    words = ["submit", str(write_run()), "--nodes", "2-3", "--gpus-per-node", "2", "--time", "1:00:00", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] != [] and "3 nodes have 6 ranks" in done.stderr
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "submissions" / "1"
    assert f"# sbatch --parsable {folder}/train.sbatch {folder}/config.yaml" in done.stdout
    assert "#SBATCH --nodes=2-3\n" in done.stdout and "#SBATCH --gpus-per-node=2\n" in done.stdout
    assert not slurm.exists() and not (tmp_path / "run").exists()


def test_the_job_trains_the_config_as_it_was_at_submit(slurm, write_run, tmp_path):
    config = write_run()
    [done] = queue(asked(config, "training.max_steps=77", nodes="2", time="60", partition="gpu", mem="4G"))
    config.write_text("run: {}")
    kept = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert kept["training"]["max_steps"] == 77 and kept["run"]["output_dir"] == str(tmp_path / "run")
    assert slurm.read_text() == f"--parsable {done.folder}/train.sbatch {done.folder}/config.yaml\n"
    header = read_header((done.folder / "train.sbatch").read_text())
    wanted = {"nodes": "2", "time": "60", "partition": "gpu", "mem": "4G", "ntasks-per-node": "1", "job-name": "run"}
    wanted |= {"requeue": "", "open-mode": "append", "signal": f"USR1@{DEFAULT_SECONDS}"}
    wanted["output"] = str(tmp_path / "run" / "logs" / "slurm-%j.log")
    assert header == wanted
    assert (tmp_path / "run" / "logs").is_dir()
    told = json.loads((done.folder / "submission.json").read_text())
    assert told["job_id"] == "101" and told["kind"] == "train" and told["command"][0] == "sbatch"


def test_gpus_give_ranks_and_a_batch_they_do_not_divide_is_a_note(slurm, write_run):
    plan = asked(write_run(), nodes="3", gpus_per_node="2")
    assert plan.run.world_size == 4 and any("4 would train, 2 idle" in note for note in plan.notes)
    assert header_of(plan)["ntasks-per-node"] == "2"
    with pytest.raises(ConfigError, match="one GPU"):
        asked(write_run(), gpus_per_node="2", ntasks_per_node="1")
    with pytest.raises(ConfigError, match="no GPUs are asked for"):
        asked(write_run(), "device=cuda", nodes="1")


def test_the_command_line_wins_over_the_site(slurm, write_run, tmp_path, monkeypatch):
    home = tmp_path / "home" / ".config" / "dsgpt"
    home.mkdir(parents=True)
    (home / "site.yaml").write_text("partition: slow\ngpus_per_node: 4\ncpus_per_task: 7\nsbatch_options: {hint: x}\n")
    (home / "site.sh").write_text("DSGPT_PYTHON=(python3)\n")
    header = header_of(asked(write_run(), partition="fast"))
    assert (header["partition"], header["gpus-per-node"], header["cpus-per-task"]) == ("fast", "4", "7")
    assert header["hint"] == "x" and header["ntasks-per-node"] == "4"
    header = header_of(asked(write_run(), gpus_per_node="0", extra={"hint": "y"}))
    assert "gpus-per-node" not in header and header["hint"] == "y" and header["ntasks-per-node"] == "1"
    [done] = queue(asked(write_run(), gpus_per_node="0"))
    (home / "site.sh").unlink()
    assert (done.folder / "site.sh").read_text() == "DSGPT_PYTHON=(python3)\n"
    assert f"\nexport DSGPT_SITE={done.folder}/site.sh\n" in (done.folder / "train.sbatch").read_text()
    [done] = queue(asked(write_run(), gpus_per_node="0"))
    assert "\nexport DSGPT_SITE=/dev/null\n" in (done.folder / "train.sbatch").read_text(), "none was there at submit"


def test_a_chain_waits_link_for_link_and_its_jobs_do_not_requeue(slurm, write_run):
    jobs = queue(asked(write_run(), chain=3, dependency="singleton"))
    assert [job.job_id for job in jobs] == ["101", "102", "103"]
    texts = [(job.folder / "train.sbatch").read_text() for job in jobs]
    waits = [read_header(text).get("dependency") for text in texts]
    assert waits == ["singleton", "afterany:101,singleton", "afterany:102,singleton"]
    assert all("\nexport DSGPT_REQUEUE=no\n" in text for text in texts)
    assert read_header(texts[1])["kill-on-invalid-dep"] == "yes"
    with pytest.raises(ConfigError, match="chain"):
        asked(write_run(), chain=2, dependency="afterok:1?afterok:2")


def test_the_long_job_waits_for_the_rehearsals_good_end(slurm, write_run, tmp_path):
    config = write_run(**{"training.max_steps": 100})
    jobs = queue(asked(config, rehearse=True, chain=2, nodes="2-4", time="5:00:00", job_name="x"))
    assert [job.kind for job in jobs] == ["rehearse", "train", "train"]
    header = read_header((jobs[0].folder / "rehearse.sbatch").read_text())
    assert (header["time"], header["nodes"], header["job-name"]) == ("10", "2", "x-rehearsal")
    waits = [read_header((job.folder / "train.sbatch").read_text()).get("dependency") for job in jobs[1:]]
    assert waits == ["afterok:101", "afterok:101,afterany:102"]
    rehearsed = yaml.safe_load((jobs[0].folder / "interrupted.yaml").read_text())
    assert rehearsed["run"]["output_dir"] == str(jobs[0].folder / "rehearsal" / "interrupted")
    assert rehearsed["training"]["max_steps"] == 100, "the schedule stays the user's"
    assert read_submissions(tmp_path / "run")[1].after == "101"
    with pytest.raises(ConfigError, match="too short to be rehearsed"):
        asked(write_run(**{"training.max_steps": 12}), rehearse=True)


def test_a_refused_job_leaves_nothing_and_takes_those_before_it_back(slurm, write_run, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSE_FROM", "2")
    with pytest.raises(ConfigError, match="sbatch refused"):
        queue(asked(write_run(), chain=3))
    assert slurm.read_text().splitlines()[-1] == "101", "scancel"
    assert not (tmp_path / "run" / "submissions" / "2").exists()


def test_an_array_fills_the_tasks_number_in_itself(slurm, write_run, tmp_path):
    word = f"run.output_dir={tmp_path}/sweep/lr-{{task}}/run"
    plan = asked(write_run(), word, "run.seed={task}", array="3-5%2")
    assert plan.run.config.run.seed == 3 and plan.base == tmp_path / "sweep"
    [done] = queue(plan)
    assert done.command[-2:] == (word, "run.seed={task}")
    header = read_header((done.folder / "train.sbatch").read_text())
    assert header["array"] == "3-5%2" and header["output"] == f"{tmp_path}/sweep/logs/slurm-%A_%a.log"
    with pytest.raises(ConfigError, match="same run"):
        asked(write_run(), array="0-3")
    assert asked(write_run(), array="0-3%1").base == tmp_path / "run", "one after the other is a chain"


def write_history(folder: Path, saves: list[float], rates: list[float], world_size: int) -> None:
    folder.mkdir(exist_ok=True)
    events = [{"event": "start", "world_size": world_size}]
    events += [{"event": "committed", "step": 5, "seconds": seconds, "stall_seconds": 0} for seconds in saves]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    lines = ["{half a li", *(json.dumps({"step": 1, "tokens_per_second": rate}) for rate in rates)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_lead_is_a_step_a_save_and_a_margin_as_the_run_itself_measured(slurm, write_run, tmp_path):
    config = write_run()  # 16 sequences of 32 tokens
    write_history(tmp_path / "run", [20.0, 41.5, 30.0], [512.0, 51.2, 512.0], 2)
    assert asked(config, nodes="2").lead.seconds == 10 + 42 + MARGIN_SECONDS  # the slowest step, the longest save
    assert asked(config, nodes="1").lead.seconds == 2 * (10 + 41.5) + MARGIN_SECONDS, (
        "half the ranks take twice as long"
    )
    with pytest.raises(ConfigError, match="leaves nothing to train in"):
        asked(config, nodes="2", time="2")
    assert header_of(asked(config, nodes="2", time="60"))["signal"] == f"USR1@{10 + 42 + MARGIN_SECONDS}"


def test_a_short_job_that_was_never_measured_is_told_in_its_last_quarter(slurm, write_run):
    assert asked(write_run(), time="4").lead.seconds == 60
    assert asked(write_run(), time="4:00:00").lead.seconds == DEFAULT_SECONDS


def test_the_verb_prints_how_to_watch_and_one_json_object(slurm, write_run, capsys, monkeypatch):
    config = write_run()
    monkeypatch.setattr(sys, "argv", ["dsgpt", "submit", str(config), "--nodes", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "job 101" in told and "squeue -j 101" in told and "--follow" in told
    with pytest.raises(SystemExit):
        main(["submit", str(config), "--nodes", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["jobs"][0]["job_id"] == "102" and told["world_size"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(config), "--nodes", "0", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == told["exit_code"] == 78


def test_hostile_texts_arrive_as_they_are_or_are_refused(tmp_path):
    found = try_texts(tmp_path, 140, seed=7)
    assert not (found["changed"] or found["other"] or found["canary"]) and found["equal"] > 60
