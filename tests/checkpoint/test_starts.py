"""What earlier starts say about the next one; the verdict of which there is only one."""

from __future__ import annotations

import json
import multiprocessing
import shutil

from dsgpt.checkpoint.commit import begin, commit, set_aside
from dsgpt.checkpoint.starts import (
    Start,
    cut_off,
    has_committed,
    has_rewound,
    read_starts,
    record_start,
    starts_without_progress,
)
from dsgpt.verdict import Verdict, read_verdict, record_verdict


def begun(folder, attempt, commits=(), end=None, **fields):
    (folder / "logs" / attempt).mkdir(parents=True, exist_ok=True)
    start = Start(attempt, fields.get("job", ""), fields.get("restarts", 0), tuple(commits), fields.get("rewound_to"))
    record_start(folder, start)
    if end is not None:
        record_verdict(folder / "logs" / attempt, Verdict(end, "word"))
    return start


def count(folder, commits=()):
    return starts_without_progress(folder, read_starts(folder), commits)


def test_what_is_recorded_is_read_back_and_a_torn_line_costs_only_itself(tmp_path):
    first = begun(tmp_path, "a", [(10, "x"), (20, "x")], job="7", restarts=2, rewound_to=10)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"attempt": "torn')
    second = begun(tmp_path, "b")
    assert read_starts(tmp_path) == [first, second]
    assert read_starts(tmp_path / "nowhere") == []


def test_only_failures_in_a_row_without_a_commit_count(tmp_path):
    """T612. 75 never counts, a commit of a start's own breaks the row, no verdict at all counts like 76."""
    begun(tmp_path, "a", end=76)
    begun(tmp_path, "b")
    assert count(tmp_path) == 2
    begun(tmp_path, "c", end=75)
    assert count(tmp_path) == 0
    begun(tmp_path, "d", end=76)
    begun(tmp_path, "e", [(5, "d")], end=76)  # d committed step 5
    assert count(tmp_path, [(5, "d")]) == 1
    begun(tmp_path, "f", [(5, "d")], end=76)
    begun(tmp_path, "g", [(5, "d")])
    assert count(tmp_path, [(5, "d")]) == 3
    assert count(tmp_path, [(5, "d"), (6, "g")]) == 0
    begun(tmp_path, "h", [(5, "d")], end=93)
    assert count(tmp_path, [(5, "d")]) == 0, "the refusal itself breaks the row: the next start tries again"


def test_commits_of_a_job_that_was_cut_off_are_known_by_the_start_that_did_not_see_them():
    old = Start("a", "", 0, ())
    new = Start("b", "", 0, ((10, "a"),))
    assert cut_off([], [(10, "a")]) == []
    assert cut_off([old, new], [(10, "a"), (15, "a"), (20, "b")]) == [(15, "a")]
    assert cut_off([old], [(10, "a"), (15, "a")]) == []


def test_commits_that_are_gone_are_missed_unless_they_were_set_aside(tmp_path):
    """A rewound run has checkpoints aside for good; what it had besides them must still be there."""
    checkpoints = tmp_path / "checkpoints"
    for step in (20, 40):
        tmp = begin(checkpoints, step, "a")
        commit(checkpoints, tmp, {"step": step, "attempt": "a", "files": {}})
    begun(tmp_path, "b", [(20, "a"), (40, "a")], rewound_to=20)
    set_aside(checkpoints, [checkpoints / "step-00000040"])
    assert has_committed(tmp_path, read_starts(tmp_path))
    shutil.rmtree(checkpoints / "step-00000020")
    assert has_committed(tmp_path, read_starts(tmp_path)), "step 20 is neither there nor set aside"
    begun(tmp_path, "c")
    assert not has_committed(tmp_path, read_starts(tmp_path)), "it saw none and made none"
    (tmp_path / "events.jsonl").write_text('{"event": "committed", "step": 10, "attempt": "c"}\n')
    assert has_committed(tmp_path, read_starts(tmp_path))


def test_a_rewind_is_for_the_first_start_of_a_job(tmp_path):
    before = Start("a", "7", 0, ((20, "x"), (40, "x")), rewound_to=20)
    assert has_rewound([before], "7", 1, 20, [(20, "x"), (30, "a")])
    assert not has_rewound([before], "7", 1, 20, [(20, "x"), (40, "x")]), "it died before it went back"
    assert not has_rewound([before], "7", 0, 20, [(20, "x")]), "the same start is no requeue"
    assert not has_rewound([before], "8", 1, 20, [(20, "x")])
    assert not has_rewound([before], "7", 1, 10, [(20, "x")])
    assert not has_rewound([Start("a", "", 0, (), 20)], "", 0, 20, []), "by hand every command is a job of its own"


def give(folder, number):
    record_verdict(folder, Verdict(76, f"cause {number}", rank=number))


def test_the_first_verdict_stands_and_has_one_event(tmp_path):
    folder = tmp_path / "logs" / "a1"
    folder.mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.starmap(give, [(folder, number) for number in range(32)])
    verdict = read_verdict(folder)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["cause"] == verdict.cause and event["attempt"] == "a1" and event["requeue"] is True
    assert [path.name for path in folder.iterdir()] == ["end.json"]


def test_the_third_failed_start_in_a_row_ends_with_93():
    failed = Verdict(76, "rank_died", "killed", committed_here=False)
    assert [failed.after(number).exit_code for number in (0, 1, 2, 3)] == [76, 76, 93, 93]
    third = failed.after(2)
    assert third.cause == "rank_died" and not third.requeue and "3 starts in a row" in third.message
    assert Verdict(76, "rank_died", committed_here=True).after(2).exit_code == 76
    assert [Verdict(code, "").after(2).exit_code for code in (0, 75, 77, 79)] == [0, 75, 77, 79]


def test_out_of_memory_is_worth_another_start_only_where_this_one_committed():
    assert not Verdict(77, "out_of_memory").requeue
    assert Verdict(77, "out_of_memory", committed_here=True).requeue
    assert [code for code in (0, 65, 73, 75, 76, 78, 79, 93) if Verdict(code, "").requeue] == [75, 76]
