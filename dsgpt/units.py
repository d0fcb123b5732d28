"""Numbers as people write and read them: '0.5%', '1.5B', '64MB', '2 h 05 min'."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)")
_COUNT_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_BYTE_SUFFIXES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def parse_fraction(text: str | float) -> float:
    """A share between 0 and 1, written as '0.5%', '0.005' or a number. Raises ValueError outside [0, 1)."""
    raw = str(text).strip()
    value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    if not 0 <= value < 1:
        raise ValueError(f"a share lies in [0, 1), e.g. 0.5% or 0.005; got {text!r}")
    return value


def format_count(value: float) -> str:
    """1234567 -> '1.23M'."""
    for size, suffix in _COUNT_SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Bytes in binary units: 1572864 -> '1.5 MiB'."""
    for size, suffix in _BYTE_SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 05 min, 3 d 04 h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def fold_names(names: Iterable[str]) -> str:
    """Names that differ in their last number, as schedulers write them: n1, n2, n3, x -> 'n[1-3],x'."""
    runs: dict[tuple[str, str, int], list[int]] = {}
    for name in dict.fromkeys(names):
        head, digits, tail = match.groups() if (match := _LAST_NUMBER.fullmatch(name)) else (name, "", "")
        padded = len(digits) if digits.startswith("0") or not digits else 0
        width = padded or next((w for (h, t, w) in runs if (h, t) == (head, tail) and w and w == len(digits)), 0)
        runs.setdefault((head, tail, width if digits else -1), []).extend([int(digits)] if digits else [])
    return ",".join(_fold(head, tail, width, sorted(numbers)) for (head, tail, width), numbers in runs.items())


def _fold(head: str, tail: str, width: int, numbers: list[int]) -> str:
    if width < 0:
        return head + tail
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in parts]
    plain = len(texts) == 1 and parts[0][0] == parts[0][1]
    return f"{head}{texts[0]}{tail}" if plain else f"{head}[{','.join(texts)}]{tail}"
