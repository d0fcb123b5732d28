"""The header of a batch script, read back by sbatch's own rules; time limits and nodes as sbatch has them; the site's file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dsgpt.errors import ConfigError, DsgptError
from dsgpt.launch import sbatch
from dsgpt.launch.site import Site, load_site
from dsgpt.launch.submission import Submission, create_folder, next_number, read_submissions, record
from tests.faults.submit_names import expand, read_header

SCRIPT = '#!/bin/bash\n# what it is\n#SBATCH --nodes=1\n#SBATCH --requeue\nset -u\n#SBATCH is a word here\necho "$@"\n'


def test_the_rendered_header_replaces_the_packaged_one_and_the_rest_is_as_it_was():
    options = {"job-name": 'it\'s $(touch X) "a" \\ #b', "requeue": "", "comment": "--wrap=x"}
    text = sbatch.render(SCRIPT.replace("\n#SBATCH is a word here", ""), options, {"DSGPT_SITE": "/a b/'c"})
    assert read_header(text) == options
    assert text.startswith("#!/bin/bash\n# what it is\n#SBATCH") and text.endswith('set -u\necho "$@"\n')
    shown = subprocess.run(["bash"], input=text + 'printf %s "$DSGPT_SITE"', capture_output=True, text=True, check=True)
    assert shown.stdout == "\n/a b/'c"


def test_a_script_with_two_blocks_of_options_is_refused():
    with pytest.raises(ConfigError, match="single block"):
        sbatch.render(SCRIPT, {}, {})


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\x1b[0m", "\x7f", "a\u2028b", "\udcff", "\0"])
def test_what_a_line_cannot_hold_is_refused(value):
    with pytest.raises(ConfigError):
        sbatch.header({"comment": value})
    with pytest.raises(ConfigError):
        sbatch.log_pattern(f"/runs/{value}/logs", "slurm-%j.log")
    with pytest.raises(ConfigError):
        sbatch.render("#SBATCH -n1\n", {}, {"X": value})


def test_percent_signs_of_a_folder_are_not_patterns_and_a_backslash_is_refused():
    assert expand(sbatch.log_pattern("/runs/50%j%%/logs", "slurm-%j.log")) == "/runs/50%j%%/logs/slurm-77.log"
    with pytest.raises(ConfigError, match="log"):
        sbatch.log_pattern("/runs/a\\b", "slurm-%j.log")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:15", 95415), ("0", 0)],
)
def test_time_limits_are_those_of_sbatch(text, seconds):
    assert sbatch.parse_time(text) == seconds
    assert sbatch.parse_time("UNLIMITED") is None


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-5", "1-", "-1:00", "٣", "1:x", "1-2-3"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(ConfigError, match="time limit"):
        sbatch.parse_time(text)


def test_nodes_are_a_number_or_a_range():
    assert [sbatch.parse_nodes(text) for text in ("4", "2-8", "3-3")] == [(4, 4), (2, 8), (3, 3)]
    for text in ("", "0", "8-2", "a", "1,2", "1-", "-3"):
        with pytest.raises(ConfigError, match="nodes"):
            sbatch.parse_nodes(text)


def test_neither_the_login_script_nor_a_surrounding_job_overrules_the_header():
    before = {
        "SBATCH_PARTITION": "x",
        "SBATCH_QOS": "kept",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "RANK": "3",
    }
    before |= {"SLURM_CONF": "/etc/slurm.conf", "SLURM_MEM_PER_NODE": "9", "PATH": "/bin", "DSGPT_REQUEUE": "no"}
    options = {"partition": "gpu", "time": "5", "requeue": ""}
    kept = {"SBATCH_QOS": "kept", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    assert sbatch.clean_environment(options, before) == {**kept, "DSGPT_REQUEUE": "no"}
    assert sbatch.clean_environment(options, {**before, "SLURM_JOB_ID": "5"}) == kept, "that was for the job around us"


def test_options_that_would_break_the_loop_are_refused_by_name():
    problems = sbatch.check_extra({"output": "x", "no-requeue": "", "Bad Name": "1", "hint": "nomultithread"})
    assert [problem.what.split()[0] for problem in problems] == ["not", "--output", "--no-requeue"]


def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    shim = tmp_path / "sbatch"
    shim.write_text(f"#!/bin/sh\n{text}\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("echo 'sbatch: error: invalid partition specified: nix' >&2; exit 1", 78),
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", 76),
        ("echo nonsense", 78),
    ],
)
def test_a_refusal_is_told_in_sbatchs_words_and_a_controller_that_is_down_is_worth_another_try(
    tmp_path, monkeypatch, answer, code
):
    fake_sbatch(tmp_path, monkeypatch, answer)
    with pytest.raises(DsgptError) as caught:
        sbatch.submit(["sbatch", "--parsable", "x"], {})
    assert caught.value.exit_code == code


def test_the_jobs_id_is_found_on_a_federated_cluster_and_under_a_sites_chatter(tmp_path, monkeypatch):
    fake_sbatch(tmp_path, monkeypatch, "echo welcome; echo '123;big'")
    assert sbatch.submit(["sbatch", "--parsable", "x"], {}) == "123"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="not on PATH"):
        sbatch.submit(["sbatch"], {})


def test_numbers_of_submissions_are_given_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as threads:
        folders = list(threads.map(create_folder, [tmp_path] * 64))
    assert sorted(int(folder.name) for folder in folders) == list(range(1, 65))
    assert next_number(tmp_path) == 65
    record(folders[0], Submission("7", 1.0, ("sbatch", "x"), asked=("submit", "a b")))
    (tmp_path / "submissions" / "9" / "submission.json").write_text("{")
    [found] = read_submissions(tmp_path)
    assert (found.job_id, found.command, found.asked) == ("7", ("sbatch", "x"), ("submit", "a b"))


# ---- the site's file -------------------------------------------------------------------------------------------------


def site_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    monkeypatch.setenv("DSGPT_SITE_YAML", str(path))
    return load_site()


def test_a_site_gives_sbatchs_options_and_times_are_not_read_as_numbers_of_base_60(tmp_path, monkeypatch):
    text = (
        "partition: gpu\naccount: 1234\ntime: 24:00:00\ngpus_per_node: 8\nsbatch_options: {hint: x, exclusive: null}\n"
    )
    site = site_of(tmp_path, monkeypatch, text)
    assert site.options() == {"partition": "gpu", "account": "1234", "time": "24:00:00", "gpus-per-node": "8"}
    assert site.extra() == {"hint": "x", "exclusive": ""}


def test_everything_wrong_in_a_sites_file_is_told_at_once(tmp_path, monkeypatch):
    text = "particion: gpu\ngpus_per_node: 0\ntime: soon\nsbatch_options: {output: x}\n"
    with pytest.raises(ConfigError) as caught:
        site_of(tmp_path, monkeypatch, text)
    told = str(caught.value)
    assert "particion: unknown key" in told and "did you mean partition?" in told and "gpus_per_node" in told
    with pytest.raises(ConfigError) as caught:
        site_of(tmp_path, monkeypatch, "time: soon\nsbatch_options: {output: x}\n")
    assert "soon" in str(caught.value) and "--output" in str(caught.value)


def test_no_site_file_is_no_site_and_a_named_one_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DSGPT_SITE_YAML", raising=False)
    assert load_site() == Site()
    monkeypatch.setenv("DSGPT_SITE_YAML", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="names no file"):
        load_site()
