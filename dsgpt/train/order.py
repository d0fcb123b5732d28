"""Which sample follows which over the whole life of a run, and what of it a checkpoint keeps.

A run goes through segments: its sources and their shares from a first sample on. There is one, until sources are appended
(data.append_sources); each appending is recorded with the checkpoints from then on, so that the order of a run is always
known from its newest one. Whatever else would give other samples than the run has gone through is refused.
"""

from __future__ import annotations

import hashlib
from typing import Any

from dsgpt.data.mixture import SLOTS, Segment
from dsgpt.errors import CheckpointError
from dsgpt.train.resolve import ResolvedRun
from dsgpt.train.sources import UNKNOWN, Source

Segments = tuple[Segment, ...]


def first_segments(plan: ResolvedRun) -> Segments:
    """The order of a run that begins with the plan's sources."""
    return (Segment(0, plan.data.slots),)


def data_identity(plan: ResolvedRun, segments: Segments) -> dict[str, Any]:
    """What decides which samples a step has; saved with every checkpoint."""
    fingerprints = [source.fingerprint for source in plan.data.train]
    whole = hashlib.sha256(" ".join(fingerprints).encode()).hexdigest() if len(fingerprints) > 1 else fingerprints[0]
    return {
        "fingerprint": whole,
        "num_samples": sum(source.num_samples for source in plan.data.train),
        "sources": _sources(plan),
        "segments": [{"first_sample": one.first_sample, "slots": list(one.slots)} for one in segments],
        **_settings(plan),
    }


def continue_order(
    saved: dict[str, Any], plan: ResolvedRun, consumed_samples: int, checkpoint: str
) -> tuple[Segments, list[Source]]:
    """The order that goes on from a checkpoint's data, and the sources that are new in it.

    Raises CheckpointError where other samples would follow than those of the checkpoint's run, unless they are of sources
    appended on purpose.
    """
    different = differences(saved, plan)
    number = len(_saved_sources(saved))
    new = list(plan.data.train[number:])
    if plan.data.train[:number] and _sources(plan)[:number] == _saved_sources(saved) and new:
        if not plan.config.data.append_sources:
            raise CheckpointError(
                "data.train names sources that the checkpoint's run does not have",
                seen=f"{number} before, appended: {', '.join(str(one.path) for one in new)}",
                do="data.append_sources=true takes them in from the next step on; or leave them out",
            )
        different = _setting_differences(saved, plan)
    if different:
        raise CheckpointError(
            "the samples would not be those the checkpoint's run goes through",
            seen="; ".join(different),
            do=f"restore these, or continue on other data in another folder: model.init_from=fork:{checkpoint}"
            + ("; sources can only be added, at the end of the list: data.append_sources" if number else ""),
        )
    segments = _saved_segments(saved)
    return (*segments, Segment(consumed_samples, plan.data.slots)) if new else segments, new


def differences(saved: dict[str, Any], plan: ResolvedRun) -> list[str]:
    """What differs between a checkpoint's data and the plan's, for people; empty where the samples are the same."""
    lines = []
    before, now = _saved_sources(saved), _sources(plan)
    for number in range(max(len(before), len(now))):
        there, here = (one[number] if number < len(one) else {} for one in (before, now))
        where = "" if len(before) == len(now) == 1 else f"data.train.{number} "
        for key in ("fingerprint", "num_samples"):
            if there.get(key) != here.get(key):
                lines.append(f"{where}{key}: checkpoint {there.get(key)}, now {here.get(key)}")
    shares = _saved_segments(saved)[-1].slots
    if len(before) == len(now) and shares != plan.data.slots:
        lines.append(f"shares of the sources: checkpoint {_shares(shares)}, now {_shares(plan.data.slots)}")
    return lines + _setting_differences(saved, plan)


def appended_text(new: list[Source], segments: Segments) -> str:
    """What is told of sources that a run takes in."""
    names = ", ".join(str(one.path) for one in new)
    return f"from sample {segments[-1].first_sample} on with {names}; shares {_shares(segments[-1].slots)}"


def _shares(slots: tuple[int, ...]) -> str:
    return " / ".join(f"{100 * count / SLOTS:.4g} %" for count in slots)


def _settings(plan: ResolvedRun) -> dict[str, Any]:
    training, tokenizer = plan.config.training, plan.data.tokenizer
    return {
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else UNKNOWN,
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "document_mask": plan.config.data.document_mask,
        "seed": plan.config.run.seed,
    }


def _setting_differences(saved: dict[str, Any], plan: ResolvedRun) -> list[str]:
    pairs = {key: (saved.get(key), now) for key, now in _settings(plan).items()}
    if (
        UNKNOWN in pairs["tokenizer_sha256"]
    ):  # nothing to compare; the samples themselves are known by their fingerprint
        del pairs["tokenizer_sha256"]
    return [f"{key}: checkpoint {before}, now {now}" for key, (before, now) in pairs.items() if before != now]


def _sources(plan: ResolvedRun) -> list[dict[str, Any]]:
    return [{"fingerprint": one.fingerprint, "num_samples": one.num_samples} for one in plan.data.train]


def _saved_sources(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a checkpoint from before there were mixtures, its one dataset."""
    alone = [{"fingerprint": saved.get("fingerprint"), "num_samples": saved.get("num_samples")}]
    return list(saved.get("sources", alone))


def _saved_segments(saved: dict[str, Any]) -> Segments:
    written = saved.get("segments", [{"first_sample": 0, "slots": [SLOTS]}])
    return tuple(Segment(int(one["first_sample"]), tuple(map(int, one["slots"]))) for one in written)
