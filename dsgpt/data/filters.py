"""Which documents are left out, and why: length, patterns, and counts that no language needs explaining for.

    filters = Filters(min_chars=200, exclude=(r"lorem ipsum",), max_repeated_lines=0.3)
    filters.reason(text)        "" where the document stays, else the name of the first rule it breaks

The rules are those of Gopher (Rae et al. 2021, appendix A.1.1) that read no words: length, share of letters, repeated lines.
Trade-off: one rule is named per document, the first in the order below, so that counts add up to what was left out.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dsgpt.errors import ConfigError, Problem


@dataclass(frozen=True)
class Filters:
    """Bounds a document must keep. None is no bound.

    min_chars, max_chars    length in characters
    include, exclude        regular expressions, searched anywhere: at least one of `include`, none of `exclude`
    min_letters             lowest share of characters that are letters of any script, in [0, 1]
    max_repeated_lines      highest share of non-blank lines that stood in the document before, in [0, 1]
    max_line_chars          highest mean length of its lines: above, it is most often data and not text
    """

    min_chars: int | None = None
    max_chars: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_letters: float | None = None
    max_repeated_lines: float | None = None
    max_line_chars: int | None = None
    _include: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False, default=())
    _exclude: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        for name in ("include", "exclude"):
            compiled = []
            for pattern in getattr(self, name):
                try:
                    compiled.append(re.compile(pattern))
                except re.error as error:
                    problems.append(Problem(f"--{name} is not a regular expression", f"{pattern!r}: {error}"))
            object.__setattr__(self, f"_{name}", tuple(compiled))
        for name in ("min_letters", "max_repeated_lines"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                problems.append(Problem(f"{name} is a share between 0 and 1", seen=str(value)))
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            problems.append(Problem("no document can keep both lengths", f"{self.min_chars} to {self.max_chars}"))
        if problems:
            raise ConfigError(problems=problems)

    def settings(self) -> dict[str, Any]:
        """The bounds that are set, for dataset.json."""
        fields = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if value not in (None, ())
        }

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Filters:
        """From what `settings` gives, also after a way through JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})

    def reason(self, text: str, num_chars: int | None = None) -> str:
        """The name of the first bound the text breaks, "" where it keeps all.

        Of a text too long to be looked at whole, `text` is the beginning and `num_chars` the length.
        """
        num_chars = len(text) if num_chars is None else num_chars
        if self.min_chars is not None and num_chars < self.min_chars:
            return "min_chars"
        if self.max_chars is not None and num_chars > self.max_chars:
            return "max_chars"
        if self._include and not any(pattern.search(text) for pattern in self._include):
            return "include"
        if any(pattern.search(text) for pattern in self._exclude):
            return "exclude"
        if self.min_letters is not None and _share_of_letters(text) < self.min_letters:
            return "min_letters"
        if self.max_repeated_lines is not None and _share_of_repeated_lines(text) > self.max_repeated_lines:
            return "max_repeated_lines"
        if self.max_line_chars is not None and len(text) > self.max_line_chars * (text.count("\n") + 1):
            return "max_line_chars"
        return ""


def _share_of_letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(1, len(text))


def _share_of_repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(count - 1 for count in Counter(lines).values()) / max(1, len(lines))
