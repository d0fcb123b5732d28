"""Each site file in a real job: what it calls gets the arguments it should, and dsgpt runs in what it chose.

The commands of a site (module, conda, apptainer, srun with pyxis) are small scripts on PATH here, which write down their
arguments, refuse those the real one would refuse, and then do the plain thing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from dsgpt.data.manifest import load_manifest
from tests.slurm import lab

pytestmark = pytest.mark.slurm
SITES = lab.SCRIPTS / "site"
# Writes down what it was called with, then does `{then}`.
SHIM = """#!/usr/bin/env bash
for word in "$@"; do printf '%s\\0' "$word"; done >>"$SHIM_LOG/{name}"
printf '\\n' >>"$SHIM_LOG/{name}"
{then}
"""
CONDA = """[ "$*" = "shell.bash hook" ] || exit 2
cat <<'END'
conda() { [ "$*" = "activate science" ] && export CONDA_PREFIX="$FAKE_PREFIX" PATH="$FAKE_PREFIX/bin:$PATH"; }
END
"""
APPTAINER = """[ "$1 $2 $3" = "exec --nv --bind" ] && [ "$5" = --pwd ] && cd "$6" && [ -r "$7" ] || exit 255
shift 7
exec "$@"
"""
PYXIS = """words=()
for word in "$@"; do case $word in --container-*) ;; *) words+=("$word") ;; esac; done
exec {srun} "${words[@]}"
"""


@pytest.fixture()
def shim(tmp_path, monkeypatch) -> Callable[..., None]:
    """shim(name, then) puts a command on PATH, for this process and so for its jobs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "called").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SHIM_LOG", str(tmp_path / "called"))

    def write(name: str, then: str) -> None:
        file = tmp_path / "bin" / name
        file.write_text(SHIM.replace("{name}", name).replace("{then}", then))
        file.chmod(0o755)

    return write


@pytest.fixture()
def called(tmp_path) -> Callable[[str], list[list[str]]]:
    def read(name: str) -> list[list[str]]:
        lines = (tmp_path / "called" / name).read_text().splitlines()
        return [line.split("\0")[:-1] for line in lines]

    return read


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment of a few files; its python says where it is and sees the packages of this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    tell = (
        'import os, sys; open(os.environ["PREFIXES"], "a").write(sys.prefix + "\\n") if "PREFIXES" in os.environ else 0'
    )
    (packages / "here.pth").write_text(f"{tell}\n{sysconfig.get_paths()['purelib']}\n")
    return folder


@pytest.fixture()
def prepare(submit, dataset, tmp_path) -> Callable[..., str]:
    """prepare(site text, *options) runs prepare_data.sbatch to its end and returns its log; the dataset must be there."""

    def run(site: str, *options: str, state: str = "COMPLETED") -> str:
        (tmp_path / "site.sh").write_text(site)
        texts, tokenizer = dataset.parent / "texts.jsonl", dataset.parent / "tokenizer"
        job = submit(
            lab.SCRIPTS / "prepare_data.sbatch", texts, "--tokenizer", tokenizer, "--output", tmp_path / "data",
            options=["--cpus-per-task=1", *options],
            DSGPT_SITE=str(tmp_path / "site.sh"), PREFIXES=str(tmp_path / "prefixes"),
        )  # fmt: skip
        assert lab.wait(job, 180).state == state, lab.log_of(job)
        assert state != "COMPLETED" or load_manifest(tmp_path / "data").splits
        return lab.log_of(job)

    return run


def prefixes(tmp_path: Path) -> set[str]:
    return set((tmp_path / "prefixes").read_text().split())


def test_modules_are_loaded_in_order_and_python_is_the_environments(prepare, shim, called, environment, tmp_path):
    shim("module", "")
    prepare(f'DSGPT_MODULES="gcc/12 cuda/12.6" DSGPT_VENV={environment}\n. {SITES}/modules-venv.sh\n')
    assert called("module") == [["load", "gcc/12"], ["load", "cuda/12.6"]]
    assert prefixes(tmp_path) == {str(environment)}


def test_a_module_that_is_not_there_ends_the_job_by_name(prepare, shim, environment):
    shim("module", "exit 1")
    log = prepare(f"DSGPT_MODULES=cuda/99 DSGPT_VENV={environment}\n. {SITES}/modules-venv.sh\n", state="FAILED")
    assert "site: module load cuda/99 failed on " in log


def staged(environment: Path, tmp_path: Path, folder: str) -> str:
    subprocess.run(["tar", "-czf", str(tmp_path / "env.tgz"), "-C", str(environment), "."], check=True)
    return (
        f"DSGPT_VENV={environment} DSGPT_STAGE={tmp_path}/env.tgz DSGPT_STAGE_DIR={folder}\n. {SITES}/modules-venv.sh\n"
    )


def test_a_packed_environment_is_unpacked_on_every_node_and_removed_again(prepare, environment, tmp_path):
    anywhere = ["srun", "--nodes=2", "--ntasks-per-node=1"]
    lab.call(*anywhere, "mkdir", "-p", "/dev/shm/dsgpt-env-999999999-1-1/bin", env=lab.job_environment())
    log = prepare(staged(environment, tmp_path, "/dev/shm"), "--nodes=2", "--ntasks=2")
    assert "env.tgz is unpacked on every node (2), in " in log
    (prefix,) = prefixes(tmp_path) - {str(environment)}
    assert prefix.startswith("/dev/shm/dsgpt-env-")
    left = lab.call(*anywhere, "ls", "/dev/shm", env=lab.job_environment())
    assert Path(prefix).name not in left
    assert "dsgpt-env-999999999-1-1" not in left, "what a killed job left is still there"


def test_where_staging_fails_the_job_says_so_and_goes_on(prepare, environment, tmp_path):
    log = prepare(staged(environment, tmp_path, "/dev/shm/not/there"), "--nodes=2", "--ntasks=2")
    assert f"could not be staged to /dev/shm/not/there; python comes from {environment}" in log
    assert prefixes(tmp_path) == {str(environment)}


def test_conda_is_activated_and_not_run_through(prepare, shim, called, environment, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_PREFIX", str(environment))
    shim("conda", CONDA)
    prepare(f"DSGPT_CONDA_ENV=science\n. {SITES}/conda.sh\n")
    assert called("conda") == [["shell.bash", "hook"]]
    assert prefixes(tmp_path) == {str(environment)}
    log = prepare(f"DSGPT_CONDA_ENV=other\n. {SITES}/conda.sh\n", state="FAILED")
    assert "conda activate other failed on" in log


def test_apptainer_gets_the_image_the_folders_and_the_command(prepare, shim, called, tmp_path):
    shim("apptainer", APPTAINER)
    image = tmp_path / "our image.sif"
    image.touch()
    prepare(f"DSGPT_IMAGE='{image}' DSGPT_BIND=/data\n. {SITES}/apptainer.sh\n")
    (words,) = called("apptainer")
    assert words[:7] == ["exec", "--nv", "--bind", f"{tmp_path},/data", "--pwd", str(tmp_path), str(image)]
    assert words[7:12] == ["python", "-m", "dsgpt", "data", "prepare"]
    log = prepare(f"DSGPT_IMAGE=/nothing.sif\n. {SITES}/apptainer.sh\n", state="FAILED")
    assert "cannot read the image /nothing.sif" in log


def test_pyxis_gets_its_options_through_srun(prepare, shim, called, tmp_path):
    shim("srun", PYXIS.replace("{srun}", str(shutil.which("srun"))))
    (tmp_path / "image.sqsh").touch()
    prepare(f"DSGPT_IMAGE={tmp_path}/image.sqsh DSGPT_MOUNTS=/data:/data\n. {SITES}/pyxis.sh\n")
    (words,) = called("srun")
    assert [word for word in words if word.startswith("--container-")] == [
        f"--container-image={tmp_path}/image.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data",
        "--container-mount-home",
        f"--container-workdir={tmp_path}",
    ]
    assert words[words.index("python") :][:4] == ["python", "-m", "dsgpt", "data"]


@pytest.mark.parametrize("site", ["pyxis", "staged", "apptainer"])
def test_a_training_job_on_two_nodes_runs_by_each_kind_of_site(
    site, submit, shim, called, environment, write_run, tmp_path
):
    """The batch script's own calls of python go the same way as the ranks."""
    image = tmp_path / "image"
    image.touch()
    shim("srun", PYXIS.replace("{srun}", str(shutil.which("srun"))))
    shim("apptainer", APPTAINER)
    text = (
        staged(environment, tmp_path, "/dev/shm") if site == "staged" else f"DSGPT_IMAGE={image}\n. {SITES}/{site}.sh\n"
    )
    (tmp_path / "site.sh").write_text(text)
    job = submit(
        lab.SCRIPTS / "train.sbatch", write_run(), options=["--nodes=2", "--ntasks-per-node=1"],
        DSGPT_SITE=str(tmp_path / "site.sh"), PREFIXES=str(tmp_path / "prefixes"),
    )  # fmt: skip
    assert lab.wait(job, 300).state == "COMPLETED", lab.log_of(job)
    assert "finished: step 12" in lab.log_of(job)
    if site == "pyxis":
        ours = [words for words in called("srun") if "python" in words]
        modules = [words[words.index("-m") + 1] for words in ours]
        assert modules == ["dsgpt.train.slurm_job", "dsgpt.train", "dsgpt.train.slurm_job"]
        assert all(f"--container-image={image}" in words for words in ours)
    elif site == "apptainer":
        assert len(called("apptainer")) == 4  # before, two ranks, after
    else:
        assert any(prefix.startswith("/dev/shm/dsgpt-env-") for prefix in prefixes(tmp_path))
