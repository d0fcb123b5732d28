"""Any causal language model of transformers, trained through the same interface as the native GPT.

    model = build_hf(config)                      # HFModelConfig; weights are not initialised, they come from a folder
    loss = model(input_ids, labels=labels, position_ids=positions)     # the sum over target tokens, as GPT gives it

The module is transformers' own, with its own parameter names; only its `forward` is ours: the hidden states of the decoder
go through a chunked cross-entropy that never builds the full logits. Documents packed in one row do not see each other: most
architectures of transformers make the mask themselves, from position ids that begin anew, with the window of each layer
that has one; the others are given one.

Trade-off: one forward for all architectures means that what an architecture does to its logits has to be known here (bias,
scale, soft cap), and which of the two masks it heeds. So `check_forward` compares with transformers' own forward, and looks
whether documents see each other, once before the first step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgpt.config.model import HFModelConfig
from dsgpt.errors import ConfigError, Problem
from dsgpt.model.functional import MAX_DIFFERENCE, chunked_cross_entropy
from dsgpt.model.gpt import attention_mask
from dsgpt.model.hf_cache import HFCache

# Constants that older releases of transformers saved.
_COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
# What architectures call the dropout after the embeddings, of attention weights, and of what a block adds.
_DROPOUTS = {
    "embedding": ("embd_pdrop", "embed_dropout", "embedding_dropout"),
    "attention": ("attention_dropout", "attn_pdrop"),
    "residual": ("resid_pdrop", "hidden_dropout", "residual_dropout", "dropout"),
}


def hf_model_config(raw: Mapping[str, Any], num_parameters: int, where: Path | str) -> HFModelConfig:
    """What transformers knows by this config.json. Raises ConfigError where it is no causal language model of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        raise ConfigError(
            "transformers has no causal language model of this kind",
            seen=f"{where}: model_type={kind!r}",
            do="another model, or a newer transformers; code that comes with a model is never run",
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
        text = config.get_text_config(decoder=True)
        sizes = {ours: _first(text, theirs) for ours, theirs in _NAMES.items()}
    except Exception as error:  # its checks have exceptions of their own
        raise ConfigError("config.json is incomplete or damaged", seen=f"{where}: {error!r}") from error
    _refuse_other_tasks(raw, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], config is text, where)
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    inner = _first(config, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 4 * hidden)
    return HFModelConfig(
        **sizes,
        num_key_value_heads=_first(config, ("num_key_value_heads",), heads),
        head_dim=_first(config, ("head_dim",), hidden // heads),
        intermediate_size=inner if isinstance(inner, int) else 4 * hidden,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        hf=dict(raw),
        num_parameters=num_parameters,
    )


def _refuse_other_tasks(raw: Mapping[str, Any], causal: str, is_plain: bool, where: Path | str) -> None:
    """Of these kinds there are causal language models, but a folder may hold more than one, or one for another task."""
    given = [str(name) for name in raw.get("architectures") or ()]
    seen = f"{where}: model_type={raw['model_type']!r}, architectures={given}"
    if not is_plain:
        raise ConfigError(
            "a model of several parts (an encoder, images or sounds beside text), of which one alone is a language model",
            seen=seen,
            do="save its language model alone: a folder whose config.json is that of the text model",
        )
    # The bare decoder, without its head, is saved under the name ...Model.
    if given and causal not in given and not all(name.endswith("Model") for name in given):
        raise ConfigError(
            "a model for another task than predicting the next token", seen=seen, do=f"a folder that holds a {causal}"
        )


def _first(config: Any, names: tuple[str, ...], default: Any = None) -> Any:
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    if default is None:
        raise KeyError(names[0])
    return default


def transformers_config(config: HFModelConfig) -> Any:
    """The object that transformers builds from, with the vocabulary and the dropout of `config`.

    Raises ConfigError for a dropout that the architecture does not have.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = CONFIG_MAPPING[config.hf["model_type"]].from_dict({**config.hf, "vocab_size": config.vocab_size})
    text, problems = found.get_text_config(decoder=True), []
    for place, names in _DROPOUTS.items():
        value, there = getattr(config.dropout, place), [name for name in names if hasattr(text, name)]
        for name in there:
            setattr(text, name, value)
        if value and not there:
            problems.append(Problem("this architecture has no such dropout", seen=f"model.dropout.{place}={value:g}"))
    if problems:
        raise ConfigError(problems=problems)
    if hasattr(text, "layerdrop"):
        text.layerdrop = 0.0  # whole blocks left out at random: each rank would gather other ones
    return found


def import_architecture(config: HFModelConfig) -> None:
    """Its module of transformers, which else is imported when the model is built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers_config(config))]  # looking it up imports it


def build_hf(config: HFModelConfig) -> nn.Module:
    """The module, in torch's default precision; under a context that partitions parameters too.

    Nothing is initialised: what a folder does not hold would be left at random, so readers check that it holds everything.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.set_verbosity_error()
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(transformers_config(config))
    model.tie_weights()  # part of the initialisation that is left out
    head = model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    head.forward = partial(_head, head, scale, softcap)
    model.transformers_forward = model.forward
    model.forward = types.MethodType(_forward, model)
    for name in ("max_position_embeddings", "vocab_size"):  # some architectures have other names for them
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, getattr(config, name))
    model.gives_mask = False
    model.cache_checked = False
    arguments = inspect.signature(model.transformers_forward).parameters
    model.keeps_logits = "logits_to_keep" in arguments
    model.cache_argument = "cache" if "cache" in arguments else "past_key_values"  # as releases before 5.20 call it
    model.new_cache = HFCache
    return model


def choose_attention(model: Any, name: str) -> None:
    """Let it attend in another way that transformers has for it. Raises ConfigError where that is not here.

    The package flash_attn has to be installed: without it transformers would look for a compiled kernel on the hub.
    """
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        do = "install it, on a machine with GPUs; or model.attention=sdpa"
        raise ConfigError(f"model.attention={name} needs the package {package}", do=do)
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        do = "model.attention=auto"
        raise ConfigError(
            f"this model cannot attend by {name}", seen=f"{type(model).__name__}: {error}", do=do
        ) from error


def _head(head: nn.Linear, scale: float, softcap: float, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits as the plain layer gives them, or the summed loss. Inside the layer, because ZeRO-3 gathers its weight there."""
    if labels is None:
        return F.linear(hidden, head.weight, head.bias)
    return chunked_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), head.bias, scale, softcap)


def _forward(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cache: HFCache | None = None,
    last_only: bool = False,
) -> Tensor:
    """As `GPT.forward`: logits (B, T, V) or (B, 1, V), or with `labels` (B, T), already shifted, the summed cross-entropy."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": cache is not None}
    if cache is not None:
        inputs[model.cache_argument] = cache.past
        if (starts := cache.first_columns(input_ids.device)) is not None:
            columns = torch.arange(cache.length + input_ids.shape[1], device=input_ids.device)
            inputs |= {"position_ids": cache.positions(input_ids), "attention_mask": columns >= starts[:, None]}
    if model.gives_mask and document_ids is not None:
        inputs["attention_mask"] = attention_mask(input_ids, next(model.parameters()).dtype, document_ids)
    if labels is None:
        if last_only and model.keeps_logits:
            inputs["logits_to_keep"] = 1
        logits = model.transformers_forward(**inputs).logits
        return logits[:, -1:] if last_only else logits
    return model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state, labels)


@torch.no_grad()
def check_forward(model: Any, vocab_size: int, device: torch.device, documents: bool = True) -> None:
    """Compare our forward with transformers' own, and choose the mask that keeps `documents` apart. All ranks must call it.

    Raises ConfigError where the architecture does something to its logits that is not known here, where tokens see later
    ones, and where documents in one row see each other either way; not the last where rows have one document each, and
    `documents` is False.
    """
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    try:
        ids = torch.randint(vocab_size, (2, 13), generator=torch.Generator().manual_seed(0)).to(device)
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        ours, logits = float(model(inputs, labels=labels)), model(inputs).float()
        theirs = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        if not abs(ours - theirs) <= MAX_DIFFERENCE[dtype] * max(1.0, abs(theirs)):
            raise ConfigError(
                "this architecture computes its logits in a way that is not known here",
                seen=f"{type(model).__name__}: loss {ours:.6f}, from transformers' logits {theirs:.6f}",
                do="please report the architecture",
            )
        if (seen := _seen_across(model, inputs, ahead=True)) > MAX_DIFFERENCE[dtype]:
            raise ConfigError(
                "this is no causal language model: tokens see those that follow",
                seen=f"{type(model).__name__}: logits change by {seen:.2g} of their spread",
                do="another model",
            )
        if not documents:
            return
        seen = _seen_across(model, inputs)
        windows = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
        if seen > MAX_DIFFERENCE[dtype] and not windows:
            model.gives_mask = True
            seen = _seen_across(model, inputs)
        if seen > MAX_DIFFERENCE[dtype]:
            raise ConfigError(
                "documents that are packed in one row see each other in this architecture",
                seen=f"{type(model).__name__}: logits change by {seen:.2g} of their spread",
                do="please report the architecture; data.document_mask=false trains without keeping them apart",
            )
    finally:
        model.train(was_training)


def _seen_across(model: Any, ids: Tensor, ahead: bool = False) -> float:
    """How much the logits of a row's second document change when the first one is replaced, relative to their spread; or,
    `ahead`, those of a document's first half when its second one is."""
    half = ids.shape[1] // 2
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    documents = torch.zeros_like(ids, dtype=torch.int32)
    if not ahead:
        documents = (positions >= half).int()
        positions = positions - half * documents
    kept, other = (slice(None, half), slice(half, None)) if ahead else (slice(half, None), slice(None, half))
    changed = ids.clone()
    changed[:, other] = ids.flip(0)[:, other]
    one, two = (model(rows, position_ids=positions, document_ids=documents)[:, kept].float() for rows in (ids, changed))
    return float((one - two).abs().max() / one.std())


def names_in_folder(config: HFModelConfig, given: Collection[str]) -> dict[str, str]:
    """The model's name of every tensor it needs -> its name among the `given` ones, as transformers renames them.

    Raises ConfigError with all that is missing, and all that has no place in the model.
    """
    model = skeleton(config)
    renamings, converters = _renamings(model)
    theirs = {_renamed(renamings, name): name for name in given}
    converted = sorted(name for name in theirs if any(one.rename_source_key(name)[1] is not None for one in converters))
    if converted:
        raise ConfigError(
            "transformers computes tensors of this architecture from several in the files, which is not implemented",
            seen=f"{type(model).__name__}: {', '.join(converted[:3])}",
            do="save the model once with a transformers that keeps them apart, or take another architecture",
        )
    base, found, problems = f"{model.base_model_prefix}.", {}, []
    for name in _needed(model):
        for candidate in (name, name.removeprefix(base), f"{base}{name}"):
            if candidate in theirs:
                found[name] = theirs[candidate]
                break
        else:
            problems.append(Problem("tensor missing from the folder", seen=name))
    left = theirs.keys() - {_renamed(renamings, one) for one in found.values()} - set(model.all_tied_weights_keys)
    problems += [
        Problem("tensor the model has no place for", seen=name) for name in sorted(left) if not name.endswith(_COMPUTED)
    ]
    if problems:
        raise ConfigError(problems=problems)
    return found


def names_to_save(config: HFModelConfig) -> dict[str, str]:
    """The model's name of every tensor -> the name that it has in a folder of transformers."""
    model = skeleton(config)
    back = [one.reverse_transform() for one in reversed(_renamings(model)[0])]
    return {name: _renamed(back, name) for name in _needed(model)}


def _renamings(model: Any) -> tuple[list[Any], list[Any]]:
    """How transformers renames tensors of files as it reads them, and how it computes them from several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    rules = [one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)]
    converters = [one for one in rules if isinstance(one, WeightConverter)]
    return [one for one in rules if one not in converters], converters


def _renamed(renamings: Iterable[Any], name: str) -> str:
    for one in renamings:
        name = one.rename_source_key(name)[0]
    return name


def _needed(model: nn.Module) -> list[str]:
    saved = model.state_dict()
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in saved]


def skeleton(config: HFModelConfig) -> Any:
    """The model with real buffers and parameters without memory."""
    with parameters_on_meta():
        return build_hf(config)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have real buffers, and parameters without memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one must stay the same one
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def constants(config: HFModelConfig) -> dict[str, Tensor]:
    """The buffers that are computed, not saved (rotary frequencies), exact in fp32, for a model that was built in 16 bits."""
    return dict(skeleton(config).named_buffers())
