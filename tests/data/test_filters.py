"""What is left out of a corpus: by rule, with the rule's name, and what stands in it twice."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dsgpt.data import duplicates
from dsgpt.data.filters import Filters
from dsgpt.errors import ConfigError

TEXT = "The cat sat.\nThe cat sat.\nIt was 1917.\n"


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(), ""),
        (Filters(min_chars=len(TEXT), max_chars=len(TEXT)), ""),
        (Filters(min_chars=len(TEXT) + 1), "min_chars"),
        (Filters(max_chars=len(TEXT) - 1), "max_chars"),
        (Filters(include=("dog", r"\b19\d\d\b")), ""),
        (Filters(include=("dog",)), "include"),
        (Filters(exclude=(r"(?m)^It",)), "exclude"),
        # 23 of 39 characters are letters; one of three lines stood there before.
        (Filters(min_letters=23 / 39, max_repeated_lines=1 / 3), ""),
        (Filters(min_letters=0.6), "min_letters"),
        (Filters(max_repeated_lines=0.33), "max_repeated_lines"),
        (Filters(max_line_chars=9), "max_line_chars"),
        (Filters(min_chars=1000, exclude=("cat",)), "min_chars"),
    ],
)
def test_a_document_is_left_out_by_the_first_rule_it_breaks(filters, reason):
    assert filters.reason(TEXT) == reason


def test_letters_of_any_script_count():
    assert Filters(min_letters=1.0).reason("Привет漢字") == ""
    assert Filters(min_letters=0.1).reason("1917 - 1945") == "min_letters"


def test_impossible_bounds_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Filters(min_chars=2, max_chars=1, include=("(",), min_letters=50)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("memory_bytes", [1 << 30, 4000])
def test_of_equal_documents_the_first_of_the_corpus_stays(tmp_path, memory_bytes):
    rng = random.Random(3)
    corpus = [[b"%d" % rng.randrange(400) for _ in range(rng.randrange(0, 200))] for _ in range(7)]
    for part, documents in enumerate(corpus):
        duplicates.write_hashes(tmp_path, part, b"".join(map(duplicates.hash_of, documents)))
    found = duplicates.find_duplicates(tmp_path, range(len(corpus)), memory_bytes)
    seen: set[bytes] = set()
    for part, documents in enumerate(corpus):
        expected = []
        for document in documents:
            expected.append(document in seen)
            seen.add(document)
        assert np.array_equal(duplicates.read_duplicates(tmp_path, part)[: len(documents)], expected)
    assert found == sum(map(len, corpus)) - len(seen) > 100
