"""Hostile texts, generated: what shells, launchers and schedulers trip over. No entry itself.

    for text in hostile_texts(random.Random(seed), canary, 5000): ...

Each text mixes plain pieces with pieces that would make the file `canary` where a shell expands them, or that mean
something to ssh, pdsh, sbatch or an option parser. The first ones are the pieces themselves, so that no number of cases
leaves one out. Trade-off: texts are what a process can be given as an argument (no NUL, at most 255 bytes), and bytes that
are no UTF-8 stand in them as Python's surrogates.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 255
PLAIN = ("a", "Run1", "0", "x.y", "a/b", "über", "日本", "🚀", "run_2", "key=value")
MARKS = (
    " ", "'", '"', "\\", "\n", "\t", "\r", ";", "&", "|", "*", "?", "~", "!", "#", "%", "%j", "%n", "%h", "%%", "$", "$$",
    "${HOME}", "$(", "`", "(", ")", "{a,b}", "<", ">", "[a-z]", "-", "--", "=", ",", ":", "@", "^", "\x1b[31m", "\x7f",
    "\udcff", "\n#SBATCH --wrap=x\n", "#SBATCH --array=0-9", "{task}", "' '", "\\\n", "EOF", "%s", "\u202e", "\u00a0", "//",
    "..", "~root",
)  # fmt: skip


def canary_pieces(canary: Path) -> tuple[str, ...]:
    """Pieces that make the canary's file where they are executed or expanded; its path must be short and plain."""
    touch = f"touch {canary}"
    return (
        f"$({touch})",
        f"`{touch}`",
        f";{touch};",
        f"&& {touch} #",
        f"| {touch}",
        f"\n{touch}\n",
        f"'; {touch}; '",
        f'"; {touch}; "',
        f"> {canary}",
        f"$(>{canary})",
        f"-oProxyCommand={touch}",
        f"--wrap={touch}",
        f"${{x:-$({touch})}}",
        f"\nEOF\n{touch}\n",
        f"a[$({touch})]",
    )


def hostile_texts(rng: random.Random, canary: Path, count: int) -> Iterator[str]:
    """`count` texts, each of 0 to 255 bytes; the same ones for the same state of `rng`."""
    dangerous = canary_pieces(canary)
    fixed = ["", " ", "-", "-n", "--help", "x" * MAX_BYTES, "é" * (MAX_BYTES // 2), *dangerous, *MARKS]
    yield from fixed[:count]
    for _ in range(count - len(fixed)):
        kinds = rng.choices((PLAIN, MARKS, dangerous), (2, 3, 2), k=rng.randint(2, 6))
        yield _cut("".join(rng.choice(kind) for kind in kinds))


def _cut(text: str) -> str:
    while len(os.fsencode(text)) > MAX_BYTES:
        text = text[:-1]
    return text
