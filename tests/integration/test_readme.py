"""The README's commands on one's own text, as written there, run one after the other. Only the training is shortened."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def bash_lines(heading: str) -> list[str]:
    """The command lines of the bash blocks below a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_two_commands_are_there_and_short():
    assert bash_lines("Two commands") == ["pip install -e . && dsgpt quickstart", "pip install -e '.[test]' && pytest"]


def test_every_verb_and_every_exit_code_of_the_readme_exists():
    from dsgpt.cli import VERBS
    from dsgpt.errors import ExitCode

    for verb in re.findall(r"\bdsgpt (\w[\w-]*)", README):
        assert verb in VERBS, verb
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert codes == {int(code) for code in ExitCode}


def test_the_run_that_is_shown_whole_is_a_valid_one(tmp_path):
    from dsgpt.config import load_config

    (shown,) = re.findall(r"```yaml\n(run:.*?)```", README, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(shown)
    loaded = load_config([tmp_path / "run.yaml"])
    assert loaded.config.fine_tuning.train == "last_blocks" and loaded.warnings == []


def test_every_path_of_the_map_exists():
    block = README.split("\n## Map\n")[1].split("```")[1]
    for line in block.strip().splitlines():
        # "dsgpt/tokenizer/  data/   what": names after the first are beside it.
        words = line.split("   ")[0].split()
        for word in words:
            word = word.rstrip(",")
            folder = ROOT / "dsgpt" if not word.startswith(("dsgpt/", "ds_configs", "tests", "slurm")) else ROOT
            assert (folder / word).exists(), word


@pytest.mark.slow
def test_the_commands_on_own_text_work_as_written(tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    (tmp_path / "my-text/more").mkdir(parents=True)
    for path in sorted(library.glob("*.py"))[:150]:
        shutil.copy(path, tmp_path / "my-text/more" / f"{path.stem}.txt")
    (tmp_path / "some-file.txt").write_text("def main():\n    pass\n" * 20)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    for line in bash_lines("Your own text in four commands"):
        if line.startswith("dsgpt train"):
            line += " training.max_steps=8 optimizer.warmup_steps=2"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my-model").num_parameters() > 1e6
