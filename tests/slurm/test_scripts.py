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


def test_what_must_be_set_is_named_where_it_is_not():
    for site in SITES:
        command = ["bash", "-c", '. "$1" && echo on', "bash", str(site)]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert done.returncode != 0 and "on" not in done.stdout.split(), site
        assert "set it in site.sh to the" in done.stderr, site
