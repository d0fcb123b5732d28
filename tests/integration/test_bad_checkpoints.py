"""Damaged, foreign and planted checkpoints: what a start makes of them. Rows T301-T311 of the fault matrix.

One run of each ZeRO stage is trained halfway, once; every test damages a copy of its folder and starts it again in pooled
ranks. `python -m tests.faults corruption` does the same in numbers.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest

from dsgpt.checkpoint import commit, starts
from dsgpt.errors import CheckpointError
from tests.faults import corruption
from tests.faults._trouble import events, hashes, steps, train
from tests.faults.corruption import DAMAGES, NEWEST, OLDER, checkpoint
from tests.pool import ranks


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    """{stage: folder of a run with two checkpoints}, another run's under "foreign", the bits of their undisturbed ends."""
    folder = tmp_path_factory.mktemp("made")
    runs = {stage: corruption.half_a_run(dataset, folder, stage, deepspeed=stage) for stage in corruption.STAGES}
    ends = {stage: corruption.undisturbed(run, dataset, folder, deepspeed=stage) for stage, run in runs.items()}
    return {**runs, "foreign": corruption.half_a_run(dataset, folder, "foreign", **{"run.seed": 6})}, ends


@pytest.fixture()
def again(made, dataset, tmp_path):
    """(YAML, folder) of a copy of the ZeRO 1 run."""
    return corruption.copy_of(made[0]["zero1"], dataset, tmp_path, "again"), tmp_path / "again"


def start(yaml, overrides=(), attempt="second", restarts=0):
    """One more start: (the job's exit code, what it says). The code is that of the rank that knows why."""
    ends = ranks(2).run(train, yaml, list(overrides), attempt, None, restarts)
    knowing = [end for end in ends if not end["text"].startswith("PeerError")]
    assert len({end["code"] for end in knowing}) == 1, f"the ranks do not agree: {ends}"
    assert all(bool(end["code"]) == bool(knowing[0]["code"]) for end in ends)
    return knowing[0]["code"], knowing[0]["text"]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folder, yaml, overrides=(), restarts=0, attempt="second"):
    """Start where it must be refused: 65, before a step, with every checkpoint as it was. Returns what it says."""
    before = files_of(folder / "checkpoints")
    code, text = start(yaml, overrides, attempt, restarts)
    assert code == 65, text
    assert files_of(folder / "checkpoints") == before
    assert "first_step" not in [event["event"] for event in events(folder) if event["attempt"] == attempt]
    return text


@pytest.mark.parametrize("stage", corruption.STAGES)
def test_a_file_that_was_cut_short_anywhere_is_found(made, stage):
    """T301, every kind of file at every length."""
    assert corruption.cut_files(checkpoint(made[0][stage])) == []


def test_every_flipped_bit_is_found_and_the_formats_alone_would_have_taken_most(made):
    """T302, manifest included. The manifest's flips are many here, because nothing but itself vouches for it."""
    folders = [checkpoint(made[0][stage]) for stage in corruption.STAGES]
    missed, in_manifest, taken = corruption.flip_random_bits(folders, 150, random.Random(1))
    assert missed == []
    assert in_manifest > 30 and taken > 50
    assert all(corruption.is_refused_by_reader(folder) for folder in folders)


@pytest.mark.parametrize("what", DAMAGES)
def test_what_was_lost_swapped_or_replaced_is_found(again, made, what):
    """T303."""
    DAMAGES[what](again[1], made[0]["foreign"])
    assert commit.verify(checkpoint(again[1])) != [] and commit.verify(checkpoint(again[1], OLDER)) == []


@pytest.mark.parametrize(
    "what",
    ["a bit of a shard", "a bit of the manifest", "a shard of an older step", "an older checkpoint under its name"],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_with_the_same_bits(again, made, what):
    """T301, T302, T303: had a damaged tensor been used, or the wrong step, the last checkpoint would differ."""
    DAMAGES[what](again[1], made[0]["foreign"])
    assert corruption.go_on(*again, made[1]["zero1"]) == []


@pytest.mark.parametrize("stage", corruption.STAGES)
def test_shards_of_another_number_of_ranks_are_never_merged(made, dataset, tmp_path, stage):
    """T304. Only what the manifest names is a part of the checkpoint."""
    yaml = corruption.copy_of(made[0][stage], dataset, tmp_path, "more", deepspeed=stage)
    corruption.add_foreign_shards(tmp_path / "more", made[0]["foreign"])
    assert corruption.go_on(yaml, tmp_path / "more", made[1][stage], passed_over=False) == []


def test_no_pointer_no_link_and_no_odd_name_leads_a_start_anywhere(again, made):
    """T305. There is no file `latest`: whoever plants one, or a folder that looks like a checkpoint, changes nothing."""
    yaml, folder = again
    checkpoints, foreign = folder / "checkpoints", checkpoint(made[0]["foreign"])
    for name in ("latest", "latest.json", "latest_universal"):
        (checkpoints / name).write_text(f"step-{OLDER:08d}")
    (folder / "latest").write_text("../../foreign/checkpoints/step-00000099\n")
    (checkpoints / "step-00000009").mkdir()
    (checkpoints / "step-00000010").symlink_to(foreign, target_is_directory=True)
    for name in ("step-00000011\n", "step-٠٠٠٠٠٠١٢", "step-00000013.old", "step-13", "Step-00000014", "step-..\\15"):
        shutil.copytree(foreign, checkpoints / name)
    assert steps(folder) == [OLDER, NEWEST]
    assert corruption.go_on(yaml, folder, made[1]["zero1"], passed_over=False) == []
    assert (checkpoints / "step-00000010").is_symlink() and commit.verify(foreign) == []


@pytest.mark.parametrize(
    "name", ["../foreign/rank-00000.safetensors", "/etc/hostname", "..", ".", "a/../rank-00000.safetensors"]
)
def test_a_manifest_cannot_name_a_file_outside_of_its_folder(again, name):
    """T305, for the names in a manifest, sealed as if dsgpt had written it."""
    manifest = commit.read_manifest(checkpoint(again[1]))
    manifest["files"][name] = manifest["files"]["rank-00000.safetensors"]
    (checkpoint(again[1]) / commit.MANIFEST).write_text(commit.sealed(manifest))
    (problem,) = commit.verify(checkpoint(again[1]))
    assert problem.what == "file name leaves the checkpoint" and problem.seen == name


MANIFESTS = {
    "": "cannot be read",
    "{": "cannot be read",
    "[" * 200_000: "cannot be read",
    "\udcff": "cannot be read",
    "null": "not one of dsgpt's",
    "[]": "not one of dsgpt's",
    '{"step": 4, "files": {}}': "not one of dsgpt's",
    '{"format_version": 1, "step": 4, "files": {}}': "its own digest",
    '{"format_version": 1, "step": 4, "files": {}, "sha256": ""}': "its own digest",
    '{"format_version": 1, "step": 4, "files": {}, "sha256": 7}': "its own digest",
    '{"format_version": 9, "shards": [], "versions": {"dsgpt": "4.2"}}': "version 9 is not the one this dsgpt reads",
    '{"format_version": 9, "versions": []}': "version 9 is not the one this dsgpt reads",
    commit.sealed({"step": 4, "files": ["rank-00000.safetensors"]}): "not one of dsgpt's",
}


@pytest.mark.parametrize("text", MANIFESTS, ids=[*map(str, range(len(MANIFESTS)))])
def test_a_manifest_of_any_other_kind_is_an_error_that_names_it(tmp_path, text):
    """T306."""
    (tmp_path / commit.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=MANIFESTS[text]) as caught:
        commit.read_manifest(tmp_path)
    assert commit.verify(tmp_path) == caught.value.problems
    assert '"4.2"' not in text or "use the dsgpt that wrote it (4.2)" in str(caught.value)


def test_a_checkpoint_of_a_later_format_is_passed_over_and_its_version_named(again, made):
    """T306, in a run: the older one of this version is used, the other one stays."""
    (checkpoint(again[1]) / commit.MANIFEST).write_text('{"format_version": 9, "versions": {"dsgpt": "4.2"}}')
    assert corruption.go_on(*again, made[1]["zero1"]) == []
    assert "4.2" in events(again[1], "checkpoint_rejected")[0]["reason"]


@pytest.mark.parametrize("name", corruption.FILES)
def test_a_run_whose_checkpoints_are_all_damaged_ends_with_65_and_keeps_them(again, name):
    """T307, for shards and for manifests: it must not begin again at step 0."""
    for step in (OLDER, NEWEST):
        path = checkpoint(again[1], step) / name
        corruption.flip(path, 8 * (path.stat().st_size // 2))
    assert "no committed checkpoint is intact" in refused(again[1], again[0])


def test_damage_of_a_header_changes_no_value_of_a_resume_and_is_found_by_verify(again, made):
    """T302, for bytes that no resume reads: places of tensors follow from the manifest, which has its own digest."""
    for name in corruption.FILES[1:]:
        corruption.flip(checkpoint(again[1]) / name, 8 * 40)
    assert corruption.go_on(*again, made[1]["zero1"], passed_over=False) == []
    assert {problem.what for problem in commit.verify(checkpoint(again[1]))} == {"file content differs from its hash"}


def test_a_step_that_was_asked_for_and_is_damaged_is_not_replaced_by_another(again):
    """T308."""
    corruption.flip(checkpoint(again[1], OLDER) / corruption.FILES[2], 8 * 9001)
    assert "the checkpoint is damaged" in refused(again[1], again[0], [f"resume={OLDER}"])
    assert "no committed checkpoint of step 3" in refused(again[1], again[0], ["resume=3"], attempt="third")


def test_a_requeued_run_without_any_commit_begins_at_0_and_says_so(write_run, tmp_path):
    """T309."""
    yaml, folder = write_run("early", **{"training.max_steps": 1, "optimizer.warmup_steps": 0}), tmp_path / "early"
    folder.mkdir()
    starts.record_start(folder, starts.Start("first", "7", 0, ()))
    assert "nothing is committed" in refused_must(yaml)
    assert start(yaml, attempt="third", restarts=2) == (0, "")
    assert [event["attempt"] for event in events(folder, "nothing_committed")] == ["third"]
    assert steps(folder) == [1]


def refused_must(yaml):
    code, text = start(yaml, ["resume=must"], restarts=1)
    assert code == 65
    return text


def test_a_requeued_run_whose_folder_was_emptied_does_not_begin_at_0(write_run, tmp_path):
    """T310, where the whole folder is gone: only the scheduler knows that there was one."""
    yaml = write_run("gone", **{"training.max_steps": 1, "optimizer.warmup_steps": 0})
    assert "does not know of an earlier start" in refused(tmp_path / "gone", yaml, restarts=1)
    assert start(yaml, ["resume=fresh"], "third", restarts=1) == (0, ""), "a person may say that it never trained"


def test_a_run_whose_checkpoints_were_deleted_does_not_begin_at_0(again):
    """T310, where the rest of the folder knows that something was committed."""
    shutil.rmtree(again[1] / "checkpoints")
    refused(again[1], again[0])
    assert start(again[0], ["resume=fresh"], "third") == (0, "")


@pytest.mark.parametrize("change", ["model.hidden_size=64", "model.num_hidden_layers=3", "model.vocab_size=320"])
def test_a_checkpoint_of_another_model_is_refused_with_the_tensors_that_differ(again, change):
    """T311. The config.yaml in the folder would have told before (78); here it is gone."""
    code, text = start(again[0], [change], "second")
    assert code == 78 and change.split("=")[0] in text
    (again[1] / "config.yaml").unlink()
    text = refused(again[1], again[0], [change], attempt="third")
    assert "the checkpoint is of another model" in text and "checkpoint " in text and "model (" in text


def test_a_checkpoint_of_another_tokenizer_is_refused_with_both_hashes(again, dataset, tmp_path):
    """T311: the same texts and the same size of vocabulary, so that every tensor would fit."""
    from dsgpt.data.prepare import prepare
    from dsgpt.tokenizer.training import train_on_texts

    texts = dataset.parent / "texts.jsonl"
    words = [json.loads(line)["text"][::-1] for line in texts.read_text("utf-8").splitlines()]
    train_on_texts(words, 300, tmp_path / "tokenizer", "hf-bpe", {})
    prepare([texts], tmp_path / "tokenizer", tmp_path / "data", workers=1, validation=0.1)
    text = refused(again[1], again[0], [f"data.train=[{{path: {tmp_path / 'data'}}}]"])
    assert "tokenizer_sha256: checkpoint " in text and "fingerprint: checkpoint " in text


def test_the_runs_that_are_compared_differ_from_each_other(made):
    """Control: equal hashes mean something."""
    assert made[1]["zero1"] != made[1]["zero3"]
    assert hashes(made[0]["zero1"], NEWEST) != hashes(made[0]["foreign"], NEWEST) != made[1]["zero1"]
