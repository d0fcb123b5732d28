"""Weights and, where they are there, Adam's moments of a checkpoint that DeepSpeed itself saved, in dsgpt's own names.

    weights = deepspeed_weights(Path("out/checkpoint-10"), config, engine.parameter_shapes(), engine.state_kinds, world)

Parameters are named as in Hugging Face's formats (the table of model/hf_format.py) or as dsgpt names them. Moments go
through the same table: splitting and transposing is all it does, and that is the same for a weight and for its moments.

Growth: a rank reads its own ranges (deepspeed_state.py says which files that opens). Where a native tensor is not a range of
the one in the file (GPT-2's matrices are transposed) that one tensor is read whole, and the last one of each kind is kept:
in memory at most three of the largest such matrices in fp32. Before anything is loaded every rank opens its share of the
files (1/ranks), so that one that is cut off, or holds what is not read, is refused; checksums are not compared.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsgpt.checkpoint.deepspeed_files import DeepSpeedFolder, find_deepspeed
from dsgpt.checkpoint.deepspeed_state import MASTER, DeepSpeedState
from dsgpt.checkpoint.weights import InitialWeights, hf_weights
from dsgpt.config import ModelConfig
from dsgpt.distributed import World
from dsgpt.errors import CheckpointError, ConfigError, DsgptError
from dsgpt.model.build import model_shapes
from dsgpt.model.hf_format import Part, find_parts
from dsgpt.model.tensor_reader import PartReader, TensorReader, refuse_other_shapes

if TYPE_CHECKING:
    from dsgpt.partitioned import Fragment

_PREFIXES = ("module.", "_orig_mod.")  # of what wraps a model
_LEFT = "not carried: the position in the data, the learning rate schedule, random numbers"


@dataclass(frozen=True)
class DeepSpeedWeights(InitialWeights):
    """What was found, and in `told` and `text` what of it is carried and what is not."""

    kinds: tuple[str, ...] = (MASTER,)
    optimizer_steps: int = 0
    loss_scale: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)


def deepspeed_weights(
    place: Path,
    config: ModelConfig,
    trained: Mapping[str, tuple[int, ...]],
    kinds: tuple[str, ...],
    world: World,
    trust: bool = False,
) -> DeepSpeedWeights:
    """What a run of these trained parameters and these kinds of state can start from; a collective.

    Raises CheckpointError or ConfigError, on all ranks, before anything is loaded.
    """
    error: DsgptError | None = None
    weights = None
    try:
        folder = find_deepspeed(place)
        _refuse_cut_off(folder, world)
        weights = _from_safetensors(folder, config, trust) or _from_states(folder, config, trained, kinds, world, trust)
    except DsgptError as problem:
        error = problem
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        do = "bring back the files of one save; another DeepSpeed version: convert it with its zero_to_fp32.py"
        error = CheckpointError("the files are not laid out as DeepSpeed does it", seen=f"{place}: {problem!r}", do=do)
    world.agree(error, "reading the DeepSpeed checkpoint")
    assert weights is not None
    return weights


def _refuse_cut_off(folder: DeepSpeedFolder, world: World) -> None:
    """Look at the end of this rank's share of the files, where a zip archive has its table of contents."""
    files = [*folder.model_files.values(), *folder.optimizer_files.values()]
    for path in files[world.rank :: world.size]:
        try:
            with zipfile.ZipFile(path) as archive:
                whole = any(name.endswith("data.pkl") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                "a file of the checkpoint is cut off or not one that torch.save wrote",
                seen=f"{path}: {path.stat().st_size if path.exists() else 0} bytes, {error}",
                do="copy it again",
            ) from error
        if not whole:
            raise CheckpointError("a file of the checkpoint is not one that torch.save wrote", seen=str(path))


def _from_safetensors(folder: DeepSpeedFolder, config: ModelConfig, trust: bool) -> DeepSpeedWeights | None:
    """A Trainer's whole weights, where DeepSpeed's own files do not have them."""
    if folder.safetensors is None or (folder.tag is not None and (folder.optimizer_files or not folder.divided)):
        return None
    source = hf_weights(folder.safetensors, config, trust)
    why = "the optimizer's files are missing"
    text = f"imported {folder.safetensors}: weights from its safetensors; no moments, because {why}; {_LEFT}"
    told = {"weights": "safetensors", "moments": False, "why": why, "optimizer_steps": 0}
    return DeepSpeedWeights(source.read, source.buffers, source.bytes_read, text=text, told=told)


def _from_states(
    folder: DeepSpeedFolder,
    config: ModelConfig,
    trained: Mapping[str, tuple[int, ...]],
    kinds: tuple[str, ...],
    world: World,
    trust: bool,
) -> DeepSpeedWeights:
    state = DeepSpeedState(folder, trust)
    reader = _NativeReader(state, config)
    state.check(range(world.rank, state.ranks, world.size))
    why = state.why or _why_not(reader, trained, kinds)
    step = 0 if why else state.step
    head, where = state.head, f"{folder.tag} (DeepSpeed {state.head.get('ds_version', 'unknown')}, ZeRO {state.stage})"
    moments = f"no moments, because {why}" if why else f"Adam's moments and step {step}"
    text = f"imported {where}, of step {head.get('global_steps')}: weights from {state.weights}; {moments}"
    if state.extra and not why:
        text += f"; the optimizer's {', '.join(state.extra)} left out"
    told = {
        "source": str(folder.tag), "zero_stage": state.stage, "ranks": state.ranks, "weights": state.weights,
        "moments": not why, "why": why, "optimizer_steps": step, "global_steps": head.get("global_steps"),
        "global_samples": head.get("global_samples"), "left_out": state.extra,
    }  # fmt: skip
    found = {} if why else state.loss_scale
    buffers = {name: reader.whole(name) for name in reader.buffers}
    return DeepSpeedWeights(
        reader.read,
        buffers,
        kinds=(MASTER,) if why else kinds,
        optimizer_steps=step,
        loss_scale=found,
        text=f"{text}; {_LEFT}",
        told=told,
    )


class _Kind(TensorReader):
    """The checkpoint's masters, or one kind of moments, under their names without prefixes: `raw` gives those with."""

    def __init__(self, state: DeepSpeedState, raw: Mapping[str, str], kind: str):
        self._state, self._raw, self._kind = state, raw, kind
        self.shapes = {name: state.shapes[one] for name, one in raw.items()}

    def read(self, name: str, start: int, numel: int) -> Tensor:
        return self._state.read(self._raw[name], self._kind, start, numel)


class _NativeReader:
    """A checkpoint's tensors under dsgpt's names. Raises ConfigError naming every tensor that is not right."""

    def __init__(self, state: DeepSpeedState, config: ModelConfig):
        self.state = state
        self._raw = {_stripped(name): name for name in state.shapes}
        masters = _Kind(state, self._raw, MASTER)
        parameters, buffers = model_shapes(config)
        self.buffers, wanted = list(buffers), parameters | buffers
        if config.tie_word_embeddings:
            self._refuse_untied()
        if config.export_format == "dsgpt" or wanted.keys() <= masters.shapes.keys():
            shared = {"lm_head.weight"} if config.tie_word_embeddings else set()
            self._parts = {name: Part(name) for name in masters.shapes.keys() - shared}
        else:
            self._parts = find_parts(config, masters.shapes)
        self._readers = {MASTER: PartReader(masters, self._parts)}
        refuse_other_shapes("the checkpoint does not fit the model", self._readers[MASTER].shapes, wanted)

    def _refuse_untied(self) -> None:
        for name, raw in self._raw.items():
            if (
                name.endswith("lm_head.weight")
                and raw not in self.state.aliases
                and raw not in self.state.aliases.values()
            ):
                raise ConfigError(
                    "the checkpoint's output head is a matrix of its own, and the model shares it with the embedding",
                    seen=f"{self.state.folder.tag}: {raw}",
                    do="correct tie_word_embeddings in config.json (model.tie_word_embeddings=false where there is none)",
                )

    def trained(self, native: str) -> bool:
        """Whether the checkpoint has the optimizer's state of a parameter, and of it alone."""
        return self._raw[self._parts[native].source] in self.state.trained

    def read(self, fragment: Fragment, kind: str) -> Tensor:
        if kind not in self._readers:
            self._readers[kind] = PartReader(_Kind(self.state, self._raw, kind), self._parts)
        return self._readers[kind].read(fragment.name, fragment.start, fragment.numel)

    def whole(self, native: str) -> Tensor:
        return self.state.whole[self._raw[self._parts[native].source]]


def _stripped(name: str) -> str:
    for prefix in _PREFIXES * 2:
        name = name.removeprefix(prefix)
    return name


def _why_not(reader: _NativeReader, trained: Mapping[str, tuple[int, ...]], kinds: tuple[str, ...]) -> str:
    """Why the optimizer's state is not carried, or nothing."""
    if set(kinds) != {MASTER, *reader.state.moments}:
        return f"this run's optimizer has other state ({', '.join(kinds[1:]) or 'none'})"
    missing = [name for name in trained if not reader.trained(name)]
    if missing:
        return f"the checkpoint has none of {len(missing)} parameters that are trained here ({', '.join(missing[:3])})"
    return ""
