"""Export of a run's adapters alone, in peft's format, for the model that the run started from.

    dsgpt checkpoint export runs/my-run --output my-adapter --adapter
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "my-adapter")

Where that model is on this disk, the adapter is put into it by peft, and logits are compared. Adapters are always in fp32:
they are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from dsgpt.checkpoint.export import compare_logits, new_folder, open_checkpoint, write_about
from dsgpt.checkpoint.model_card import Facts
from dsgpt.checkpoint.weights import ModelLocation, load_model
from dsgpt.config import HFModelConfig, LoraSection, ModelConfig, parse_model
from dsgpt.errors import CheckpointError, ConfigError
from dsgpt.hub import locate_hf
from dsgpt.model.hf_format import layer_names
from dsgpt.model.lora import adapted_layer, is_adapter, save_adapter, with_adapter
from dsgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class AdapterReport:
    """`logit_difference` is the largest between base model and adapter, put together by peft, and the checkpoint; None
    where that was not looked at, as `unchecked` says."""

    path: Path
    base_model: str
    num_parameters: int
    logit_difference: float | None
    unchecked: str
    license: str


def export_adapter(
    location: ModelLocation, output: Path, check: bool = True, license: str | None = None
) -> AdapterReport:
    """Write `output`, which must not exist; arguments as of `export_checkpoint`.

    Raises CheckpointError where the run has no adapters, or what it computes is not the base model and its adapters;
    ConfigError where peft has no place for them.
    """
    reader = open_checkpoint(location, output)
    manifest, facts = reader.manifest, Facts.of(location.path, reader.manifest)
    names = [name for name in (*reader.parameters, *reader.frozen) if is_adapter(name)]
    others = [name for name in reader.parameters if not is_adapter(name)]
    if not names or others or facts.base is None:
        raise CheckpointError(
            "this run has more than adapters to give" if names else "this run has no adapters",
            seen=f"{location.path}: {', '.join(others[:3])} trained" if others else str(location.path),
            do="export the merged model: leave out --adapter",
        )
    config, saved = parse_model(manifest["model"]), dict(manifest["lora"])
    _require_same_vocabulary(config, facts)
    transposed = saved.pop("transposed", False) or config.export_format == "gpt2"
    layers = sorted({adapted_layer(name) for name in names})
    theirs = {one: one for one in layers} if isinstance(config, HFModelConfig) else layer_names(config, layers)
    tensors = {name: reader.tensor(name) for name in names}
    with new_folder(output) as tmp:
        save_adapter(tmp, LoraSection.model_validate(saved), tensors, theirs, facts.base.source, transposed)
        chosen = write_about(tmp, facts, Tokenizer.load(location.tokenizer), "peft", license, "fp32")
        difference, unchecked = None, "" if check else "not asked for"
        if check:
            difference, unchecked = _check(tmp, location, facts.base.place)
    number = sum(prod(tensor.shape) for tensor in tensors.values())
    return AdapterReport(output, facts.base.place, number, difference, unchecked, chosen)


def _require_same_vocabulary(config: ModelConfig, facts: Facts) -> None:
    theirs = facts.base.read("config.json").get("vocab_size", config.vocab_size) if facts.base else config.vocab_size
    if theirs != config.vocab_size:
        raise CheckpointError(
            "the run's model has another vocabulary than its base model, to which adapters cannot be added",
            seen=f"{config.vocab_size} tokens, the base model {theirs}",
            do="export the merged model: leave out --adapter",
        )


def _check(folder: Path, location: ModelLocation, base: str) -> tuple[float | None, str]:
    """The difference of logits, and why it is not known."""
    try:
        place = locate_hf(base)
        if not (place / "config.json").is_file():
            return None, f"{base} is not in Hugging Face's format; a run is brought into it by dsgpt checkpoint export"
        model = with_adapter(place, folder)
    except (ConfigError, OSError) as error:
        return None, str(error)
    return compare_logits(load_model(location), lambda ids: model(ids).logits)[0], ""
