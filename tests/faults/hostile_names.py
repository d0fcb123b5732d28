"""Hostile arguments, folders, variables, hostfiles and filters: byte-equal on the other host, or refused (T910, T911).

    python -m tests.faults hostile_names [--trials 5000]

Arguments, the working folder and a variable go through the commands that `dsgpt train --hostfile` runs, with an `ssh` and a
`pdsh` that execute the remote command by `sh -c`; a recorder in the place of Python on the other side writes down what
arrives. Hostile lines of hostfiles and filters must be refused, or name hosts only. No canary may exist at the end, and
the controls show that the same texts do make one where a shell expands them. Trade-off: fifty texts share one connection.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsgpt.errors import ConfigError
from dsgpt.launch import remote
from dsgpt.launch.carried import Carried, carried_environment, pack, python_words
from dsgpt.launch.hosts import HOST, Node, read_hostfile, select
from tests.faults._hosts import fake_programs
from tests.faults._names import canary_pieces, hostile_texts
from tests.frame import Outcome, Row

TRIALS, TOGETHER = 5000, 50
NODES = (Node("hosta", (0,)), Node("hostb", (0, 1)))
RECORDER = """#!{python}
import os, sys
sys.path.insert(0, {source!r})
from dsgpt.launch.carried import Carried
carried = Carried.unpack(sys.argv[sys.argv.index("dsgpt.launch.node") + 1])
os.environ.update(carried.environment)
os.chdir(carried.folder)
echo = "import os,sys;a=sys.argv[2:]+[os.environ['DSGPT_HOSTILE'],os.getcwd()];" + \\
       "open(sys.argv[1],'ab').write(repr([os.fsencode(x) for x in a]).encode()+b'\\\\n')"
os.execv({python!r}, [{python!r}, "-S", "-c", echo, {record!r}, sys.argv[-1], *carried.arguments])
"""


def arrived(folder: Path, texts: list[str], where: Path, launcher: str, environment: dict[str, str]) -> list[str]:
    """What was not as it should be on two hosts, for arguments `texts` given in `where` with the last one as a variable."""
    record = folder / "record"
    record.unlink(missing_ok=True)
    hosts = remote.Remote(NODES, launcher, "hosta", 29500)
    variables = carried_environment({"DSGPT_HOSTILE": texts[-1]})
    carried = Carried(texts, str(where), str(where), {"hosta": [0], "hostb": [0, 1]}, "hosta", 29500, variables)
    started = remote.commands(hosts, carried, where, {})
    stub = str(folder / "recorder")
    for command in started.values():
        words = [stub if word == sys.executable else word for word in command]
        done = subprocess.run(words, env={**os.environ, **environment}, cwd=where, capture_output=True, text=True)
        if done.returncode:
            return [f"{launcher}: {done.stderr[-500:]}{done.stdout[-500:]}"]
    expected = [
        repr([os.fsencode(word) for word in (f"--node-rank={n}", *texts, texts[-1], str(where))]) for n in (0, 1)
    ]
    seen = sorted(record.read_text("ascii").splitlines())
    return [] if seen == sorted(expected) else [f"{launcher}: {texts!r} arrived as {seen!r}"]


def hostfile_violations(folder: Path, text: str, rng: random.Random) -> tuple[bool, list[str]]:
    """(whether it was refused, what is wrong) with a hostile line between good ones, and with a hostile filter."""
    file = folder / "hosts"
    line = rng.choice((f"{text} slots=1", text, f"node9 slots={text}", f"node9 slots=1 {text}", f"node9{text} slots=1"))
    file.write_bytes(os.fsencode(f"node1 slots=2\n{line}\nnode2 slots=2\n"))
    pool = {"node1": 2, "node2": 2}
    refused, found = False, []
    try:
        pool = read_hostfile(file)
        found += [f"{line!r} gives the host {host!r}" for host in pool if not HOST.fullmatch(host) or host[0] in "-."]
    except ConfigError as error:
        refused = True
        found += [f"{line!r}: control characters in {error}"] if {"\x1b", "\r", "\x7f"} & set(str(error)) else []
    try:
        filters = {
            rng.choice(("include", "exclude")): rng.choice((text, f"node1:{text}", f"node1@{text}", f"{text}:0"))
        }
        chosen = select(pool, **filters)
        found += [f"{filters} gives {node}" for node in chosen if node.host not in pool]
    except ConfigError:
        refused = True
    return refused, found


def unsafe_paths(texts: Iterator[str]) -> tuple[int, int]:
    """(refused, let through though a shell would change it) of hostile paths of Python and PYTHONPATH."""
    refused = through = 0
    for text in texts:
        try:
            words = python_words({"PYTHONPATH": f"/x/{text}"}, "/usr/bin/python3") + python_words({}, f"/x/{text}")
            through += any(set(word) & set(" \t\r\n'\"\\;&|*?~!#%$`()<>[]{}^") for word in words)
        except ConfigError:
            refused += 1
    return refused, through


def run(trials: int | None, seed: int) -> Outcome:
    count, rng = trials or TRIALS, random.Random(seed)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        canary = folder / "X"
        environment = fake_programs(folder)
        source = str(Path(remote.__file__).parents[2])
        text = RECORDER.format(python=sys.executable, source=source, record=str(folder / "record"))
        (folder / "recorder").write_text(text, "utf-8")
        (folder / "recorder").chmod(0o755)
        live = 0
        for piece in canary_pieces(canary):
            subprocess.run(["sh", "-c", f"echo {piece}"], capture_output=True, cwd=folder)
            live += canary.exists()
            canary.unlink(missing_ok=True)
        texts = list(hostile_texts(rng, canary, count))
        for start in range(0, count, TOGETHER):
            batch = texts[start : start + TOGETHER]
            where = folder / (rng.choice(batch).replace("/", "_")[:60] or "empty")
            where = where if where.name not in (".", "..", "", "X") else folder
            where.mkdir(exist_ok=True)
            wrong += arrived(folder, batch, where, rng.choice(("ssh", "pdsh")), environment)
            wrong += [f"the canary was made by {batch!r}"] if canary.exists() else []
            canary.unlink(missing_ok=True)
        checked = [hostfile_violations(folder, text, rng) for text in texts]
        bad_hosts = [told for _, found in checked for told in found]
        refused, through = unsafe_paths(iter(texts))
        made = int(canary.exists())
        too_long = 0
        try:
            noise = "".join(rng.choice("abcdefghijklmnop") for _ in range(400_000))
            pack(Carried([noise], "/", "/", {}, "a", 1))
        except ConfigError:
            too_long = 1
    rows = [
        Row("control: pieces that a shell executes", live, at_least=8),
        Row("arguments, folder, variable not byte-equal", len(wrong), at_most=0, note="; ".join(wrong)[:2000]),
        Row("hostfile lines and filters let through", len(bad_hosts), at_most=0, note="; ".join(bad_hosts)[:2000]),
        Row("of them refused", sum(was for was, _ in checked)),
        Row("unsafe paths of Python let through", through, at_most=0, note=f"{refused} refused"),
        Row("canaries", made, at_most=0),
        Row("arguments too long for one word refused", too_long, at_least=1),
    ]
    return Outcome(rows, count)
