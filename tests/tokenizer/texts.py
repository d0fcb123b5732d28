"""Texts that tokenizers get wrong, and Python sources that every machine has."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

DIFFICULT = [
    "",
    " ",
    "\n",
    "\t",
    " \n \t ",
    "hello",
    " hello",
    "  hello  world  ",
    "def f(x):\n\treturn x\n\n\nclass A:\n    pass\n",
    "\r\n\r\n",
    "a\0b",
    "\x01\x02\x1b\x7f",
    "\u00a0\u2028\ufeff",
    "é ü e\u0301 漢字 かな 한국어 עברית",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 \U0010ffff \ue000",
    "<s></s><unk> <0x41> </s>",
    "[INST] <|endoftext|> <pad>",
    "a" * 300,
    " " * 53 + "x" + "\t" * 9,
    "=" * 77 + "\n" + "-" * 78,
    "1234567890 3.14159e-10 0xdeadbeef",
]


def fuzz(count: int, seed: int) -> list[str]:
    """Short random texts over characters that merge in many ways."""
    rng = random.Random(seed)
    alphabets = (" \n\t()=:_.,'\"#aeinorst019é漢😀", " ab=-#\n", "  \n    self.x")
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 80))) for _ in range(count)]


def python_sources(count: int = 25) -> list[Path]:
    """Files of the standard library, in a fixed order."""
    names = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path for path in names if path.stat().st_size > 4000][:count]
