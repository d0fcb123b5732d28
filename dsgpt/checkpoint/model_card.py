"""README.md of an export, in the form of the Hugging Face hub: what the model is made of, by whom it may be used, and how.

Facts come from the checkpoint's manifest, and from what lies beside it in the run: config.yaml for names and choices,
base_model/ for the model it started from. No path of this machine is written: folders are named by their last part.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from dsgpt.checkpoint import retention
from dsgpt.checkpoint.base_model import BaseModel, read_base
from dsgpt.checkpoint.locate import run_of

UNKNOWN_LICENCE = {"license": "unknown"}
_USES = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_MODEL), FOLDER)""",
    "dsgpt": """dsgpt generate FOLDER --prompt TEXT""",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint: its folder, its manifest, its run's config as written, and the base model."""

    checkpoint: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    base: BaseModel | None

    @classmethod
    def of(cls, checkpoint: Path, manifest: dict[str, Any]) -> Facts:
        run = run_of(checkpoint)
        try:
            config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        except FileNotFoundError:  # a checkpoint that was copied without its run
            config = {}
        return cls(checkpoint, manifest, config if isinstance(config, dict) else {}, read_base(run))

    def licence(self, given: str | None) -> dict[str, str]:
        """The keys of the model card. What a person says goes before what the base model says."""
        if given:
            return {"license": given}
        return (self.base.licence() if self.base else {}) or UNKNOWN_LICENCE

    def section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}


def model_card(facts: Facts, library: str, licence: Mapping[str, str], dtype: str) -> str:
    """README.md of an export that `library` reads: transformers, peft or dsgpt."""
    base = facts.base
    head: dict[str, Any] = {**licence, "library_name": library, "pipeline_tag": "text-generation", "tags": ["dsgpt"]}
    if base and base.hub_name:
        head["base_model"] = base.hub_name
    name = facts.section("run").get("name") or run_of(facts.checkpoint).name
    rows = {"base model": _origin(facts), **_training(facts), "weights": dtype, "licence": _licence_text(licence, base)}
    sources = [("source", "sequences", "fingerprint"), ("---", "---", "---"), *_sources(facts)]
    code = "sh" if library == "dsgpt" else "python"
    return "\n".join(
        (
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            f"# {_cell(name)}",
            "",
            *(_row(*cells) for cells in (("", ""), ("---", "---"), *rows.items())),
            "",
            "## Training data",
            "",
            *(_row(*cells) for cells in sources),
            "",
            "## Use",
            "",
            f"```{code}\n{_USES[library]}\n```",
            "",
        )
    )


def _origin(facts: Facts) -> str:
    if facts.base is None:
        return "none, trained from scratch" if facts.section("model").get("init_from") == "scratch" else "not recorded"
    names = [one if facts.base.hub_name == one[3:] else _without_folders(one) for one in facts.base.origins]
    if facts.base.hub_name and f"hf:{facts.base.hub_name}" not in names:
        names.insert(0, facts.base.hub_name)
    return ", then ".join(names)


def _without_folders(origin: str) -> str:
    kind, _, place = origin.partition(":")
    return f"{kind}:{Path(place).name}"


def _training(facts: Facts) -> dict[str, str]:
    manifest = facts.manifest
    trained, frozen = (
        sum(prod(entry["shape"]) for entry in manifest.get(kind, {}).values()) for kind in ("parameters", "frozen")
    )
    loss = retention.validation_loss(facts.checkpoint)
    return {
        "trained": f"{_what_was_trained(facts)}: {trained:,} of {trained + frozen:,} parameters",
        "steps": f"{manifest['step']:,}",
        "tokens": f"{manifest['counters']['consumed_tokens']:,}, in sequences of {manifest['data']['seq_length']:,}",
        "validation loss": "not measured at this step" if loss is None else f"{loss:.4f} nats per token",
        "trained in": f"{manifest['dtype']}, with "
        + ", ".join(f"{library} {version}" for library, version in manifest["versions"].items()),
    }


def _what_was_trained(facts: Facts) -> str:
    settings, lora = facts.section("fine_tuning"), facts.manifest.get("lora")
    if lora:
        kind, layers = "DoRA" if lora["use_dora"] else "LoRA", ", ".join(lora["target_modules"]) or "all of the blocks"
        return f"{kind} adapters of rank {lora['rank']}, alpha {lora['alpha']:g}, beside the linear layers: {layers}"
    texts = {
        "all": "everything",
        "last_blocks": f"the last {facts.manifest.get('num_last_blocks')} blocks, final norm and head",
        "patterns": f"parameters named {', '.join(settings.get('patterns') or ())}",
    }
    more = ", ".join(f"{blocks} from step {step}" for step, blocks in (settings.get("unfreeze_at") or {}).items())
    return texts.get(settings.get("train", ""), "not recorded") + (f"; last blocks: {more}" if more else "")


def _sources(facts: Facts) -> list[tuple[str, str, str]]:
    """The data by name, where the config says it, and by what identifies it anywhere."""
    written = facts.section("data").get("train") or []
    names = [Path(str(one.get("path"))).name for one in written if isinstance(one, dict)]
    saved = facts.manifest["data"]["sources"]
    return [
        (names[number] if len(names) == len(saved) else "", f"{one['num_samples']:,}", f"`{one['fingerprint']}`")
        for number, one in enumerate(saved)
    ]


def _licence_text(licence: Mapping[str, str], base: BaseModel | None) -> str:
    if licence == UNKNOWN_LICENCE:
        return "unknown: " + ("the base model's folder says none" if base else "nobody has said one")
    said = base.licence() if base else {}
    text = " ".join(dict.fromkeys(licence.values()))
    return text + (f"; the base model's is {' '.join(said.values())}" if said and said != dict(licence) else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """In one line, and not taken for the end of a cell."""
    return " ".join(str(text).split()).replace("|", "\\|")
