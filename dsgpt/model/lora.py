"""LoRA and DoRA through peft: adapters beside frozen linear layers, and what they add to a matrix.

    adapted = add_adapters(model, settings, prefix="blocks.")
    merged(weight, settings, a, b, magnitude)      # the matrix that a model without adapters needs to compute the same

peft puts a matrix under `NAME.base_layer.weight` and its adapter beside it; `plain_name` undoes that, so that checkpoints of a
run with adapters lead to the names of the model without.

Adapters are initialised by us, name by name (A as peft does, B zero), because under ZeRO-3 peft would initialise an empty
piece, and because the values must not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsgpt.config.fine_tuning import LoraSection
from dsgpt.errors import ConfigError

_ADAPTER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.default\.weight$")
_BASE = ".base_layer."


def is_adapter(name: str) -> bool:
    return _ADAPTER.search(name) is not None


def _match(name: str) -> re.Match[str]:
    found = _ADAPTER.search(name)
    assert found is not None
    return found


def adapted_layer(name: str) -> str:
    """The layer that an adapter's tensor stands in."""
    return name[: _match(name).start()]


def plain_name(name: str) -> str:
    """The name in the model without adapters."""
    return name.replace(_BASE, ".")


def adapter_names(plain: str) -> tuple[str, str, str]:
    """Names of A, B and DoRA's magnitude for the matrix NAME.weight."""
    layer = plain.removesuffix(".weight")
    return (
        f"{layer}.lora_A.default.weight",
        f"{layer}.lora_B.default.weight",
        f"{layer}.lora_magnitude_vector.default.weight",
    )


def base_name(plain: str) -> str:
    """The name that a matrix with an adapter has: NAME.base_layer.weight."""
    layer, _, kind = plain.rpartition(".")
    return f"{layer}{_BASE}{kind}"


def base_of_adapter(name: str) -> str:
    """The name of the matrix that an adapter's tensor stands beside."""
    return _ADAPTER.sub(".base_layer.weight", name)


def has_transposed(model: nn.Module) -> bool:
    """Whether the matrices beside adapters are (in, out), as GPT-2's in transformers."""
    return any(getattr(module, "fan_in_fan_out", False) for module in model.modules())


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can have an adapter."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def targets(model: nn.Module, settings: LoraSection, prefix: str) -> list[str]:
    """The layers that get one. Raises ConfigError for a pattern that fits none."""
    layers = linear_layers(model)
    if not settings.target_modules:
        return [name for name in layers if name.startswith(prefix)]
    short = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers})
    missing = [one for one in settings.target_modules if not any(_fits(name, one) for name in layers)]
    if missing:
        raise ConfigError(
            "fine_tuning.lora.target_modules fits no linear layer",
            seen=", ".join(missing),
            do=f"the linear layers here: {', '.join(short)}",
        )
    return [name for name in layers if any(_fits(name, one) for one in settings.target_modules)]


def _refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    """An adapter beside a tied head would not be in the embedding, so no matrix could hold what the model computes."""
    users = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    shared = [name for name in chosen if users[id(model.get_submodule(name).weight)] > 1]
    if shared:
        raise ConfigError(
            "an adapter beside a matrix that another layer shares cannot be merged into it",
            seen=", ".join(shared),
            do="leave the layer out of fine_tuning.lora.target_modules",
        )


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def add_adapters(model: nn.Module, settings: LoraSection, prefix: str) -> list[str]:
    """Put adapters beside the target layers of the blocks, in place; returns their names."""
    from peft import inject_adapter_in_model

    chosen = targets(model, settings, prefix)
    _refuse_shared(model, chosen)
    with _without_peft_norms():
        inject_adapter_in_model(_peft_config(settings, chosen, init_lora_weights=False), model)
    return chosen


def _peft_config(settings: LoraSection, layers: Sequence[str], **others: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(layers),
        use_dora=settings.use_dora,
        **others,
    )


def save_adapter(
    folder: Path,
    settings: LoraSection,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, str],
    base: tuple[str, str | None],
    transposed: bool,
) -> None:
    """Write peft's adapter_config.json and adapter_model.safetensors.

    `tensors` are the adapters' by name; `layers` says what each of our layers is called in the model that peft will put
    them into; `base` is the folder or hub name of that model, and its commit; `transposed`: its matrices are (in, out).
    """
    from safetensors.torch import save_file

    others = {"base_model_name_or_path": base[0], "revision": base[1], "task_type": "CAUSAL_LM", "inference_mode": True}
    _peft_config(settings, list(layers.values()), fan_in_fan_out=transposed, **others).save_pretrained(folder)
    named = {}
    for name, tensor in tensors.items():
        kind = _match(name)[1]
        end = kind if kind == "lora_magnitude_vector" else f"{kind}.weight"  # as peft names them
        named[f"base_model.model.{layers[adapted_layer(name)]}.{end}"] = tensor.contiguous()
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def with_adapter(base: Path, folder: Path) -> nn.Module:
    """A folder's model as transformers reads it, in fp32, with the adapter of another as peft puts it in.

    Raises OSError where transformers finds no model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


@contextlib.contextmanager
def _without_peft_norms() -> Iterator[None]:
    """DoRA's magnitude is 1 until `initial_adapter` gives it: peft would measure matrices that are not read yet, or of which
    ZeRO-3 has left an empty piece."""
    from peft.tuners.lora.dora import DoraLinearLayer

    def ones(layer: Any, *, base_layer: Any, **unused: Any) -> None:
        layer.weight = nn.Parameter(torch.ones(getattr(base_layer, "out_features", None) or base_layer.nf))

    original, DoraLinearLayer.update_layer = DoraLinearLayer.update_layer, ones
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = original


def weights_used_outside(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """(layer, weight of a layer in it) that DoRA computes with itself: ZeRO-3 must gather them for the outer layer too."""
    for module in model.modules():
        if getattr(module, "lora_magnitude_vector", None):
            for inner in (module.base_layer, module.lora_A["default"], module.lora_B["default"]):
                yield module, inner.weight


def initial_adapter(name: str, shape: Sequence[int], seed: int, matrix: Callable[[], Tensor]) -> Tensor:
    """The value that an adapter's tensor starts with, the same on any number of ranks.

    A is uniform in +-1/sqrt(columns) (Kaiming with a = sqrt 5, as peft), B zero, DoRA's magnitude the length of each row of
    `matrix()` (Liu et al. 2024, eq. 5), so that the model computes at first what it did without adapters.
    """
    kind = _match(name)[1]
    if kind == "lora_B":
        return torch.zeros(*shape)
    if kind == "lora_magnitude_vector":
        return torch.linalg.vector_norm(matrix().float(), dim=1)
    generator = torch.Generator().manual_seed((seed << 32 | zlib.crc32(name.encode())) % (1 << 63))
    return (torch.rand(*shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def merged(matrix: Tensor, settings: LoraSection, a: Tensor, b: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """(out, in) in fp32: W + alpha/r B A, with DoRA each row scaled to its magnitude (Liu et al. 2024, eq. 5)."""
    whole = matrix.float() + (b.float() @ a.float()) * (settings.alpha / settings.rank)
    if magnitude is None:
        return whole
    return whole * (magnitude.float() / torch.linalg.vector_norm(whole, dim=1))[:, None]
