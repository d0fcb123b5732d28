"""SIGKILL at every point and at random instants of a save: a checkpoint is wholly there or not there.

(T102, T103, T108, T109, T113.) Only the commit protocol runs, with small fake shards: no torch, no DeepSpeed, thousands of
trials in minutes. A process that is forked for it saves step after step and prunes; after its death the folder must keep
what is promised:

* whatever is visible as a checkpoint verifies, hash by hash;
* a step whose commit was acknowledged before the death is still there, or a newer one is;
* the next process goes on without any cleaning by hand, and leaves no temporary or half-deleted folder behind.

Two schedules. *Points*: the process kills itself before the n-th call of any C function, for every n of one round (a
round saves a step and prunes an older one), so each gap between two system calls is hit. *Instants*: the parent kills
it at a random moment of some rounds, so that a write is also hit half way. Controls are broken protocols (`BROKEN`): a
matrix that does not catch them proves nothing. Killing a process does not drop the page cache: what fsync adds is not
shown here but by the order of the calls, in the tests of the commit protocol.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dsgpt.checkpoint import commit as protocol
from dsgpt.checkpoint.retention import prune
from tests.frame import Outcome, Row

NUM_SHARDS, SHARD_BYTES, KEEP_LAST, ENDLESS = 3, 96 << 10, 2, 1 << 30
Commit = Callable[[Path, Path, dict], Path]


def save(folder: Path, step: int, commit: Commit, attempt: str) -> None:
    """One save as the ranks and rank 0 do it together, and the pruning after it."""
    tmp = protocol.begin(folder, step, attempt)
    names = [f"rank-{rank}.safetensors" for rank in range(NUM_SHARDS)]
    for rank, name in enumerate(names):
        (tmp / name).write_bytes(random.Random(f"{step}-{rank}").randbytes(SHARD_BYTES))
    commit(folder, tmp, {"step": step, "files": protocol.hash_files(tmp, names)})


def work(folder: Path, rounds: int, commit: Commit, acknowledge: int, prepare: Callable[[], None]) -> None:
    """What the forked process does: start as a job does, then `rounds` times save, acknowledge, prune."""
    attempt = f"{os.getpid():x}"
    protocol.remove_unfinished(folder)
    prune(folder, KEEP_LAST)
    committed = protocol.list_committed(folder)
    first = committed[-1][0] + 1 if committed else 1
    prepare()
    for step in range(first, first + rounds):
        save(folder, step, commit, attempt)
        os.write(acknowledge, f"{step}\n".encode())
        prune(folder, KEEP_LAST)


def trial(
    folder: Path, rounds: int, commit: Commit, kill_after: float | None = None, die_at_call: int | None = None
) -> tuple[int, bool]:
    """Fork `work` and kill it; (newest acknowledged step or 0, whether it was killed before its end)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            prepare = (lambda: _die_at(die_at_call)) if die_at_call is not None else (lambda: None)
            work(folder, rounds, commit, writer, prepare)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # of a process that is done but not waited for: no effect
    acknowledged = b"".join(iter(lambda: os.read(reader, 4096), b"")).split()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the saving process failed with {os.WEXITSTATUS(status)} and was not killed")
    return (int(acknowledged[-1]) if acknowledged else 0), os.WIFSIGNALED(status)


def _die_at(call: int) -> None:
    """From here on count the calls of C functions, and die by SIGKILL before the given one."""
    count = 0

    def watch(frame: object, event: str, argument: object) -> None:
        nonlocal count
        if event == "c_call":
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def broken_promises(folder: Path, acknowledged: int) -> list[str]:
    """What the folder shows that it must not. `acknowledged` is the newest step ever reported as committed."""
    found = []
    committed = protocol.list_committed(folder)
    visible = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    found += [
        f"{name} is visible without a manifest" for name in sorted(visible - {path.name for _, path in committed})
    ]
    for step, path in committed:
        problems = protocol.verify(path, mode="hash")
        found += [f"step {step}: {problem.what}" for problem in problems]
        if not problems and protocol.read_manifest(path)["step"] != step:
            found.append(f"step {step} holds another step")
    newest = committed[-1][0] if committed else 0
    if newest < acknowledged:
        found.append(f"step {acknowledged} was committed and the newest is {newest}")
    return found


def _commit_without_rename(folder: Path, tmp: Path, manifest: dict) -> Path:
    """Control: the final folder is made first and filled afterwards."""
    final = folder / f"step-{manifest['step']:08d}"
    final.mkdir()
    for path in sorted(tmp.iterdir()):
        shutil.copyfile(path, final / path.name)
    (final / protocol.MANIFEST).write_text(protocol.sealed(manifest))
    shutil.rmtree(tmp)
    return final


def _commit_manifest_first(folder: Path, tmp: Path, manifest: dict) -> Path:
    """Control: the manifest is complete and visible before the shards are."""
    final = folder / f"step-{manifest['step']:08d}"
    final.mkdir()
    (final / protocol.MANIFEST).write_text(protocol.sealed(manifest))
    for path in sorted(tmp.iterdir()):
        os.rename(path, final / path.name)
    tmp.rmdir()
    return final


def _commit_over_the_only_one(folder: Path, tmp: Path, manifest: dict) -> Path:
    """Control: the older checkpoints are deleted to make room before the new one is there."""
    for _, path in protocol.list_committed(folder):
        shutil.rmtree(path)
    return protocol.commit(folder, tmp, manifest)


BROKEN = (_commit_without_rename, _commit_manifest_first, _commit_over_the_only_one)


def every_point(folder: Path, commit: Commit) -> tuple[int, list[str]]:
    """Die before every C call of one round, up to the first broken promise; (points tried, promises broken)."""
    acknowledged, _ = trial(folder, KEEP_LAST + 1, commit)  # the round that is attacked shall also delete
    points, call, broken = 0, 0, []
    while not broken:
        call += 1
        newest, killed = trial(folder, 1, commit, die_at_call=call)
        if not killed:
            break
        points += 1
        acknowledged = max(acknowledged, newest)
        broken = [f"before call {call}: {one}" for one in broken_promises(folder, acknowledged)]
    return points, broken


def random_instants(folder: Path, kills: int, seed: int) -> tuple[int, list[str]]:
    """Kill at a random moment of endless rounds, `kills` times in one folder; (rounds committed, promises broken).

    The moments are uniform over what four undisturbed rounds took. However fast the machine is just now, every trial is
    a kill, since the process would never end by itself.
    """
    rng = random.Random(seed)
    started = time.perf_counter()
    acknowledged, _ = trial(folder, 4, protocol.commit)
    four_rounds = time.perf_counter() - started
    broken = []
    for number in range(kills):
        newest, killed = trial(folder, ENDLESS, protocol.commit, kill_after=rng.uniform(0, four_rounds))
        if not killed:
            raise RuntimeError(f"trial {number}: the process ended before it was killed")
        acknowledged = max(acknowledged, newest)
        broken += [f"trial {number}: {one}" for one in broken_promises(folder, acknowledged)]
    return acknowledged, broken


def left_behind(folder: Path) -> list[str]:
    """Names that a last undisturbed start leaves and that are no checkpoint."""
    trial(folder, 1, protocol.commit)
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


NUM_RANKS, KEPT = 1024, 3
# A Llama of 70 B parameters: name -> shape.
LARGE_MODEL = {
    "embed_tokens.weight": (128256, 8192),
    "lm_head.weight": (128256, 8192),
    "norm.weight": (8192,),
    **{
        f"blocks.{layer}.{name}.weight": shape
        for layer in range(80)
        for name, shape in {
            "attention_norm": (8192,),
            "mlp_norm": (8192,),
            "attention.q_proj": (8192, 8192),
            "attention.k_proj": (1024, 8192),
            "attention.v_proj": (1024, 8192),
            "attention.o_proj": (8192, 8192),
            "mlp.gate_proj": (28672, 8192),
            "mlp.up_proj": (28672, 8192),
            "mlp.down_proj": (8192, 28672),
        }.items()
    },
}


class _LargeEngine:
    """What the index of a manifest needs of an engine at ZeRO 1: shapes, and the ranges of every rank."""

    stage = 1

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return LARGE_MODEL


def _ranges(num_ranks: int) -> list[list[tuple[str, int, int]]]:
    """Contiguous pieces of the concatenated parameters, as DeepSpeed hands them to ranks at ZeRO 1 and 2."""
    total = sum(math.prod(shape) for shape in LARGE_MODEL.values())
    piece, owned, offset = -(-total // num_ranks), [[] for _ in range(num_ranks)], 0
    for name, shape in LARGE_MODEL.items():
        numel, start = math.prod(shape), 0
        while start < numel:
            rank = (offset + start) // piece
            take = min(numel - start, (rank + 1) * piece - offset - start)
            owned[rank].append((name, start, take))
            start += take
        offset += numel
    return owned


def many_ranks(folder: Path) -> tuple[float, int, float]:
    """Seconds of rank 0's part of a commit, bytes of the manifest, seconds of a start's look at the folder; 1,024 ranks.

    The files are small, because what rank 0 does with another rank's file is to write down what that rank told it.
    """
    from dsgpt.checkpoint.saver import _index
    from dsgpt.distributed import World

    ranges, world = _ranges(NUM_RANKS), World(size=NUM_RANKS)
    committing, size = 0.0, 0
    for step in range(1, KEPT + 1):
        tmp = protocol.begin(folder, step, "a")
        names = [f"rank-{rank:05d}.safetensors" for rank in range(NUM_RANKS)]
        for name in names:
            (tmp / name).write_bytes(name.encode())
        entries = [protocol.hash_files(tmp, [name]) for name in names]  # every rank's own part
        began = time.perf_counter()
        files = {name: entry for part in entries for name, entry in part.items()}
        manifest = {"step": step, "attempt": "a", "files": files, "parameters": _index(_LargeEngine(), world, ranges)}
        path = protocol.commit(folder, tmp, manifest)
        prune(folder, KEPT)
        committing, size = max(committing, time.perf_counter() - began), (path / protocol.MANIFEST).stat().st_size
    began = time.perf_counter()
    committed = protocol.list_committed(folder)
    attempts = [protocol.attempt_of(path) for _, path in committed]
    share = sorted(protocol.read_manifest(committed[-1][1])["files"])[::NUM_RANKS]
    problems = protocol.verify(committed[-1][1], "hash", only=share)
    scanning = time.perf_counter() - began
    if problems or attempts != ["a"] * KEPT:
        raise RuntimeError(f"the folder is not as it was written: {problems} {attempts}")
    return committing, size, scanning


def run(trials: int | None, seed: int) -> Outcome:
    """Both schedules, the controls, and 1,024 ranks. `trials` counts the kills at random instants (5,000 unless given)."""
    trials = 5000 if trials is None else trials
    with tempfile.TemporaryDirectory(prefix="dsgpt-protocol-") as name:
        root = Path(name)
        points, broken_at_points = every_point(root / "points", protocol.commit)
        rounds, broken_at_instants = random_instants(root / "instants", trials, seed)
        leftovers = [*left_behind(root / "points"), *left_behind(root / "instants")]
        committing, manifest_bytes, scanning = many_ranks(root / "many")
        caught = [bool(every_point(root / commit.__name__, commit)[1]) for commit in BROKEN]
    for line in [*broken_at_points, *broken_at_instants, *leftovers][:20]:
        print(line)
    rows = [
        Row("kills before a C call", points, at_least=50, note="every call of a save and a prune"),
        Row("promises broken at points", len(broken_at_points), at_most=0),
        Row("kills at random instants", trials, note=f"{rounds} saves committed between them"),
        Row("promises broken at instants", len(broken_at_instants), at_most=0),
        Row("left behind after a start", len(leftovers), at_most=0),
        Row("broken protocols caught", sum(caught), at_least=len(BROKEN), note="controls"),
        Row("1,024 ranks: rank 0's part of a commit", committing, at_most=2.0, note="seconds, pruning included"),
        Row("1,024 ranks: manifest", manifest_bytes / 1e6, at_most=2.0, note="MB, 70 B parameters at ZeRO 1"),
        Row("1,024 ranks: look at the folder at a start", scanning, at_most=1.0, note=f"seconds, {KEPT} checkpoints"),
    ]
    return Outcome(rows, points + trials)
