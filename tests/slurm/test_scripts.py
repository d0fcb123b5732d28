"""Every shipped script is sound as it stands: shellcheck, bash, and SLURM itself agree."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm import lab

SBATCH = sorted(lab.SCRIPTS.glob("*.sbatch"))
SITES = sorted((lab.SCRIPTS / "site").glob("*.sh"))
ALL = [*SBATCH, *SITES, *sorted(lab.CLUSTER.parent.glob("*.s[hb]*")), lab.ROOT / ".ci" / "run"]


def name(path: Path) -> str:
    return path.relative_to(lab.ROOT).as_posix()


def test_the_shipped_scripts_are_those_the_design_names():
    names = ["evaluate.sbatch", "prepare_data.sbatch", "rehearse.sbatch", "train.sbatch"]
    assert [path.name for path in SBATCH] == names
    assert [path.name for path in SITES] == ["apptainer.sh", "conda.sh", "modules-venv.sh", "pyxis.sh"]


@pytest.mark.parametrize("script", ALL, ids=name)
def test_bash_reads_it(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on PATH")
@pytest.mark.parametrize("script", ALL, ids=name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SBATCH, ids=name)
def test_nobody_has_to_edit_it(script):
    text = script.read_text("utf-8")
    assert "${DSGPT_SITE:-$HOME/.config/dsgpt/site.sh}" in text
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    sites_own = ("--partition", "--account", "--qos", "--constraint", "--mail", "--gres", "--chdir")
    assert [line for line in header if any(option in line for option in sites_own)] == []


@pytest.mark.slurm
@pytest.mark.parametrize("script", SBATCH, ids=name)
def test_slurm_takes_it(script, cluster, tmp_path):
    command = ["sbatch", "--test-only", "--nodes=2" if script.name == "train.sbatch" else "--nodes=1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=lab.job_environment(), timeout=60)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def run_with(folder: Path, stand_ins: dict[str, str], command: list[str], **environment: str) -> tuple[int, str]:
    """(exit code, output) of a command that finds these scripts on PATH."""
    for stand_in, text in stand_ins.items():
        (folder / stand_in).write_text(f"#!/bin/bash\n{text}\n")
        (folder / stand_in).chmod(0o755)
    known = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=known, cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", SBATCH, ids=name)
def test_a_site_file_may_use_what_is_not_set_and_one_that_fails_ends_the_job(script, tmp_path):
    """Module systems and conda do; a rehearsal that failed there would keep back a job that works."""
    site, environment = tmp_path / "site.sh", {"DSGPT_SITE": str(tmp_path / "site.sh"), "SLURM_JOB_ID": "1"}
    shims = dict.fromkeys(("srun", "python", "scontrol"), "exit 3")
    site.write_text('[ -z "$NOWHERE_SET" ] && echo read\n')
    code, told = run_with(tmp_path, shims, ["bash", str(script), "x"], DSGPT_SUBMISSION=str(tmp_path), **environment)
    assert code == 3 and "read" in told and "unbound" not in told, told
    site.write_text("return 1\n")
    code, told = run_with(tmp_path, shims, ["bash", str(script), "x"], DSGPT_SUBMISSION=str(tmp_path), **environment)
    assert code == 78, told


def test_a_rehearsal_keeps_the_environment_that_it_unpacked(tmp_path):
    """Its batch script runs train.sbatch, which reads the site file again: what the outer one calls must stay."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    subprocess.run(["tar", "-czf", str(tmp_path / "env.tgz"), "-C", str(tmp_path / "venv"), "."], check=True)
    site = f"DSGPT_VENV={tmp_path}/venv DSGPT_STAGE={tmp_path}/env.tgz DSGPT_STAGE_DIR={tmp_path}/disk\n. {SITES[2]}\n"
    (tmp_path / "site.sh").write_text(site)
    (tmp_path / "disk").mkdir()
    stand_ins = {
        "srun": 'while [[ $1 = -* ]]; do shift; done; exec "$@"',
        "sbcast": 'cp "$2" "$3"',
        "squeue": "echo 7",
    }
    inner = '. ./site.sh; "${DSGPT_PYTHON[@]}" && echo inner'
    outer = f"""set -u; . ./site.sh; bash -c '{inner}'; "${{DSGPT_PYTHON[@]}}" && echo outer"""
    code, told = run_with(tmp_path, stand_ins, ["bash", "-c", outer], SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1")
    assert code == 0 and told.splitlines()[:2] == ["inner", "outer"] and told.count("is unpacked") == 1, told
    assert list((tmp_path / "disk").iterdir()) == [], "removed at the end"


def test_what_must_be_set_is_named_where_it_is_not():
    for site in SITES:
        command = ["bash", "-c", '. "$1" && echo on', "bash", str(site)]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert done.returncode != 0 and "on" not in done.stdout.split(), site
        assert "set it in site.sh to the" in done.stderr, site
