"""An installed wheel works as the clone does: the shipped configs, ds_configs and sbatch scripts are in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel unpacked by pip, outside the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def run(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import sys, dsgpt; print(dsgpt.__file__, file=sys.stderr); from dsgpt.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert str(installed) in done.stderr, "another dsgpt was imported"
    return done


def test_the_wheel_has_every_module_and_every_shipped_file(installed):
    ours = {
        p.relative_to(ROOT / "dsgpt").as_posix() for p in (ROOT / "dsgpt").rglob("*") if p.suffix in (".py", ".yaml")
    }
    theirs = {p.relative_to(installed / "dsgpt").as_posix() for p in (installed / "dsgpt").rglob("*") if p.is_file()}
    assert ours <= theirs
    assert {f"ds_configs/{p.name}" for p in (ROOT / "ds_configs").iterdir()} <= theirs
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "slurm").rglob("*") if p.is_file()} <= theirs


def test_the_installed_command_resolves_trains_and_exports_as_the_clone_does(installed, tmp_path, dataset, write_run):
    assert "gpt2-124m" in run(installed, tmp_path, "config", "ls").stdout
    assert run(installed, tmp_path, "config", "validate", "gpt2-124m").returncode == 0
    yaml = write_run("wheel")
    dry = run(installed, tmp_path, "train", str(yaml), "deepspeed=zero3", "--dry-run")
    assert dry.returncode == 0 and '"stage": 3' in dry.stdout, dry.stderr
    trained = run(installed, tmp_path, "train", str(yaml))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    exported = run(installed, tmp_path, "checkpoint", "export", str(tmp_path / "wheel"), "--output", "exported")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "exported/model.safetensors").exists()
