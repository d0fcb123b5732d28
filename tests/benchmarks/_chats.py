"""Conversations of the data that lies beside the clone (../shared/data), as records of two chat formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[3] / "shared" / "data"


def tool_dialogues() -> list[dict[str, Any]]:
    """With calls of functions, as ShareGPT has them."""
    found: list[dict[str, Any]] = _json("instruct", "glaive_toolcall_en_demo.json")
    return found


def support_dialogues() -> list[dict[str, Any]]:
    """Of two schemas, as ShareGPT has them; what an agent says before the customer does is left out."""
    spoken = [
        [(turn["speaker"] == "SYSTEM", turn["utterance"]) for turn in dialogue["turns"]]
        for dialogue in _json("support", "sgd_train_dialogues_001.json")
    ]
    for dialogue in _json("support", "abcd_sample.json"):
        spoken.append([(who == "agent", text) for who, text in dialogue["original"] if who in ("agent", "customer")])
    found = []
    for turns in spoken:
        said: list[dict[str, str]] = []
        for is_agent, text in turns:
            who = "gpt" if is_agent else "human"
            if said and said[-1]["from"] == who:
                said[-1]["value"] += "\n" + text
            elif said or not is_agent:
                said.append({"from": who, "value": text})
        if len(said) > 1:
            found.append({"conversations": said})
    return found


def summaries() -> list[dict[str, str]]:
    """Articles and their summaries, as prompt and completion."""
    found = []
    for name in ("cnn_dm_200.jsonl", "xsum_200.jsonl"):
        rows = [json.loads(line) for line in (SHARED / "news" / name).read_text("utf-8").splitlines()]
        found += [
            {"prompt": row["prompt"], "completion": row[next(key for key in row if key != "prompt")]} for row in rows
        ]
    return found


def questions() -> list[dict[str, str]]:
    """Frequent questions and their answers, as prompt and completion."""
    docs = [
        doc
        for domain in _json("support", "dstc9_faq_knowledge.json").values()
        for entity in domain.values()
        for doc in entity["docs"].values()
    ]
    return [{"prompt": doc["title"], "completion": doc["body"]} for doc in docs]


def _json(folder: str, name: str) -> Any:
    return json.loads((SHARED / folder / name).read_text("utf-8"))
