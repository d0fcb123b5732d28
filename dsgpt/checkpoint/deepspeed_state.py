"""The state in DeepSpeed's files as named ranges: weights and Adam's moments of any parameter, whichever rank saved them.

    state = DeepSpeedState(find_deepspeed(folder), trust=False)
    state.read("model.norm.weight", "exp_avg", start=0, numel=32)

Where a parameter lies is computed from the order that DeepSpeed recorded: at stages 1 and 2 all parameters of a group in one
vector, cut into equal partitions; at stage 3 each parameter cut over all ranks. Each file's own record of what it holds is
compared with that when the file is opened. Files are mapped, not read: only the pages of a range are.

Growth: every rank unpickles the model's file of rank 0, one optimizer file, its share (1/ranks) of all in `check`, and those
that hold its ranges: of 1,024 files of a ZeRO-3 checkpoint (world before)/(world now) + 1 neighbours where the run is ZeRO-3
too. Between stage 3 and stages 1/2 partitions lie across each other, and a rank opens up to all files; so does every rank of
a stage 0 run, which holds everything. An unpickled file costs its names: kilobytes at stage 3, at stages 1/2 an entry for
each parameter in it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsgpt.checkpoint.deepspeed_files import DeepSpeedFolder
from dsgpt.checkpoint.deepspeed_pickle import load_pickled
from dsgpt.checkpoint.ranges import overlaps
from dsgpt.errors import CheckpointError

MASTER, FROZEN = "master", "frozen"
MOMENTS = ("exp_avg", "exp_avg_sq")
_COMPARED = 64  # elements of each parameter by which its order in a file without names is checked


class Place(NamedTuple):
    """Where a parameter lies in flat tensors, one a rank: element i is element `base + i` of a vector that is cut into
    pieces of `piece`; each rank's piece begins at element `shift` of its tensor of that group."""

    group: int | str
    shape: tuple[int, ...]
    base: int
    piece: int
    shift: int = 0


class DeepSpeedState:
    """Names, shapes and values of a checkpoint. `moments` is empty where they are not there; `why` then says why."""

    def __init__(self, folder: DeepSpeedFolder, trust: bool):
        self.folder, self.trust = folder, trust
        self._files: dict[Path, Any] = {}
        self.head = self._open(folder.model_files[0])
        self.trained: dict[str, Place] = {}
        self.frozen: dict[str, Place] = {}
        self.whole: dict[str, Tensor] = {}  # the module's own tensors, of what is not in flat tensors
        self.aliases: dict[str, str] = {}  # a shared parameter's other names
        self.weights, self.moments, self.why = "", (), ""
        self.step, self.extra, self.loss_scale = 0, [], {}
        self.stage, self.ranks, self._lean, self._paddings = 0, 1, False, []
        self._sizes: list[int] = []  # of a rank's flat partitions, padding included
        self._checked: set[int] = set()  # ranks whose file was compared
        self._flats: dict[str, Sequence[Tensor]] = {}  # stage 0's: one file has them all
        self._check_head()
        optimizer = self.head.get("optimizer")
        if folder.optimizer_files:
            self._find_partitioned()
        elif folder.divided:
            raise CheckpointError(
                "the optimizer's files are missing, and at stage 3 only they hold the weights",
                seen=f"{folder.tag}: no *_optim_states.pt",
                do="bring them back, or set stage3_gather_16bit_weights_on_model_save for weights of their own",
            )
        else:
            self._take_module(self.head.get("shared_params"))
            if optimizer is None:
                self.why = "the optimizer's files are missing"
            else:
                self._find_whole(optimizer)

    # ---- reading --------------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All names that a model may ask for; a shared parameter under each of its names."""
        shapes = {name: place.shape for name, place in (self.frozen | self.trained).items()}
        shapes |= {name: tuple(value.shape) for name, value in self.whole.items()}
        return shapes | {name: shapes[one] for name, one in self.aliases.items() if one in shapes}

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """fp32 values of elements [start, start + numel) of a parameter: a copy, or a view of the mapped file."""
        name = self.aliases.get(name, name)
        place = self.trained.get(name)
        if place is None and kind == MASTER:
            place, kind = self.frozen.get(name), FROZEN
        if place is None:
            return self.whole[name].flatten()[start:][:numel].float()
        pieces = []
        for rank, low, high, begins in overlaps(
            {"shape": (sys.maxsize,), "piece": place.piece}, place.base + start, numel
        ):
            flat = self._flat(rank, kind, place.group)
            pieces.append(flat[low - begins + place.shift :][: high - low])
        if sum(len(one) for one in pieces) != numel:
            raise CheckpointError("a parameter is cut off in its file", seen=f"{self.folder.tag}: {name}")
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).float()

    def _flat(self, rank: int, kind: str, group: int | str) -> Tensor:
        if kind == FROZEN:
            return self._open(self.folder.model_files[rank])["frozen_param_fragments"][group].flatten()
        if self._flats:
            return self._flats[kind][int(group)].flatten()
        saved = self._partition(rank)
        return (saved[self._masters][group] if kind == MASTER else _states(saved[self._inner])[group][kind]).flatten()

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            content = load_pickled(path, self.trust)
            if not isinstance(content, Mapping):
                raise CheckpointError("not a file that DeepSpeed saved", seen=str(path))
            self._files[path] = content
        return self._files[path]

    # ---- what is where --------------------------------------------------------------------------------------------

    def _check_head(self) -> None:
        path = self.folder.model_files[0]
        if not isinstance(self.head.get("module"), Mapping) or "buffer_names" not in self.head:
            raise CheckpointError("not a file of DeepSpeed's model state", seen=str(path))
        parallel = {
            "mp_world_size": self.head.get("mp_world_size", 1),
            **self.head.get("checkpoint_parallel_dimensions", {}),
        }
        if any(isinstance(size, int) and size > 1 for size in parallel.values()):
            raise CheckpointError(
                "the model is divided by tensor or pipeline parallelism, which is not read",
                seen=f"{path}: {parallel}",
                do="convert it to Hugging Face format and use hf:<folder>",
            )
        if self.head.get("ds_autoep_layers") or self.head.get("autoep_layers"):
            raise CheckpointError("the model's experts are divided over ranks, which is not read", seen=str(path))

    def _take_module(self, shared: Mapping[str, str] | None) -> None:
        """The module's own tensors, which below stage 3 are whole; shared ones under their first name."""
        module = {name: value for name, value in self.head["module"].items() if isinstance(value, Tensor)}
        self.aliases = dict(shared or {})
        seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
        for name, value in module.items():
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape))
            if value.numel() and shared is None and seen.setdefault(key, name) != name:
                self.aliases[name] = seen[key]
        self.whole = {name: value for name, value in module.items() if name not in self.aliases}
        self.weights = f"the module ({_precision(self.whole.values())})"

    def _find_partitioned(self) -> None:
        """Stages 1 to 3: everything that is trained lies in the partitions of the optimizer's files."""
        files = self.folder.optimizer_files
        if 0 not in files:
            self._refuse_missing([0])
        first = self._open(files[0])["optimizer_state_dict"]
        self.stage = int(first.get("zero_stage", 1))  # bf16's own optimizer, of stage 1, does not say
        self._lean = "zero_stage" in first  # and leaves the padding at the end in place, which the others take off
        counts = first["partition_count"]
        self.ranks = max(counts) if isinstance(counts, (list, tuple)) else int(counts)
        self._refuse_missing([rank for rank in range(self.ranks) if rank not in files])
        extra = sorted(set(files) - set(range(self.ranks)))
        if (
            extra
            or (isinstance(counts, (list, tuple)) and set(counts) != {self.ranks})
            or "ds_zero_partition_groups" in first
        ):
            raise CheckpointError(
                "the optimizer's files are not of one group of ranks",
                seen=f"{self.folder.tag}: {len(files)} files, partition_count {counts}",
                do="remove what is left of another save; experts and partitions within nodes (MiCS) are not read",
            )
        self._masters = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        self._inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        sizes = [flat.numel() for flat in first[self._masters]]
        groups = self.head["param_shapes"]
        self.aliases = dict(self.head.get("shared_params") or {})
        if self.stage == 3:
            self._place_divided(groups, sizes)
            self._sizes = sizes
        else:
            self._paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
            pieces = [n + (p if self._lean else 0) for n, p in zip(sizes, first["group_paddings"], strict=True)]
            self._place_joined(groups, pieces)
            self._sizes = pieces
            self._take_module(self.aliases)
            self.whole = {name: value for name, value in self.whole.items() if name not in self.trained}
            self.whole |= self.head.get("frozen_param_fragments") or {}
        self.weights = f"ZeRO {self.stage}'s masters ({_precision(first[self._masters])})"
        self._find_moments(first[self._inner], len(sizes))
        self.loss_scale = _numbers(vars(first["loss_scaler"])) if hasattr(first.get("loss_scaler"), "__dict__") else {}

    def _refuse_missing(self, missing: Sequence[int]) -> None:
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise CheckpointError(
                f"files of {len(missing)} of {self.ranks} ranks are missing"
                if 0 not in missing
                else "rank 0's file is missing",
                seen=f"{self.folder.tag}: no optimizer's or model's file of rank {named}",
                do="bring them back; without any optimizer's files the weights of stages 0-2 are read from the model's",
            )

    def _place_divided(self, groups: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> None:
        """Stage 3: each parameter in equal pieces, one after another in each rank's sub-groups."""
        group, shift = 0, 0
        for name, shape in ((name, shape) for one in groups for name, shape in one.items()):
            piece = -(-math.prod(shape) // self.ranks)
            while group < len(sizes) and shift == sizes[group]:
                group, shift = group + 1, 0
            if group == len(sizes) or shift + piece > sizes[group]:
                self._refuse_sizes(f"{name} does not fit in sub-group {group} of {sizes}")
            self.trained[name] = Place(group, tuple(shape), 0, piece, shift)
            shift += piece
        if (group, shift) != (len(sizes) - 1, sizes[-1]):
            self._refuse_sizes(f"{sizes} elements a rank, {shift} of sub-group {group} are accounted for")
        frozen = self.head.get("frozen_param_shapes") or {}
        if frozen:
            self._refuse_missing([rank for rank in range(self.ranks) if rank not in self.folder.model_files])
        for name, shape in frozen.items():
            self.frozen[name] = Place(name, tuple(shape), 0, max(1, -(-math.prod(shape) // self.ranks)))
        module = self.head["module"]
        self.whole = {name: module[name] for name in self.head["buffer_names"] if name in module}

    def _place_joined(self, groups: Sequence[Mapping[str, Any]], pieces: Sequence[int]) -> None:
        """Stages 1 and 2: the parameters of a group in one vector, padded to a multiple of twice the ranks."""
        if len(groups) != len(pieces) or list(map(len, groups)) != list(map(len, self._paddings)):
            self._refuse_sizes(f"{len(pieces)} flat partitions for {len(groups)} groups of parameters")
        for group, (shapes, piece, paddings) in enumerate(zip(groups, pieces, self._paddings, strict=True)):
            base = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                self.trained[name] = Place(group, tuple(shape), base, piece)
                base += math.prod(shape) + padding
            if -(-base // (2 * self.ranks)) * 2 * self.ranks != piece * self.ranks:
                self._refuse_sizes(f"group {group}: {base} elements, {self.ranks} partitions of {piece}")

    def _refuse_sizes(self, seen: str) -> None:
        raise CheckpointError(
            "the optimizer's and the model's files do not fit together",
            seen=f"{self.folder.tag}: {seen}",
            do="bring back the files of one save; a layout of another DeepSpeed version: convert it with its zero_to_fp32.py",
        )

    def _partition(self, rank: int) -> Mapping[str, Any]:
        """What a rank saved of the optimizer; compared, when it is opened first, with what rank 0's files say."""
        content = self._open(self.folder.optimizer_files[rank])
        saved = content["optimizer_state_dict"]
        if rank in self._checked:
            return saved
        self._checked.add(rank)
        name, flats, states = self.folder.optimizer_files[rank].name, saved[self._masters], _states(saved[self._inner])
        paddings = saved["group_paddings"] if self._lean and self.stage < 3 else [0] * len(flats)
        if [len(flat) + padding for flat, padding in zip(flats, paddings, strict=True)] != self._sizes:
            self._refuse_sizes(f"{name} has partitions of other sizes than rank 0's")
        for group, flat in enumerate(flats):
            if any(states[group][kind].numel() < len(flat) for kind in self.moments):
                self._refuse_sizes(f"{name} has moments of fewer elements than weights")
        other = _steps(saved[self._inner], len(flats)) - {None, self.step}
        if self.moments and other:  # a save over an earlier one that was cut off leaves files of both
            self._refuse_sizes(f"{name} is of other steps of the optimizer than rank 0's: {sorted(other)}, {self.step}")
        # With round_robin_gradients (DeepSpeed 0.19.8) that record is of another order than the partitions have.
        shuffled = content.get("ds_config", {}).get("zero_optimization", {}).get("round_robin_gradients")
        recorded = [] if shuffled else saved.get("param_slice_mappings") or []
        for parameter, place in self.trained.items():
            address = recorded[int(place.group)].get(parameter) if recorded else None
            if address is not None:
                begins = max(place.base, rank * place.piece)
                numel = min(place.base + math.prod(place.shape), (rank + 1) * place.piece) - begins
                if (address.start, address.numel) != (begins - rank * place.piece, numel):
                    self._refuse_sizes(f"{name} has {parameter} elsewhere than computed")
        return saved

    def check(self, ranks: Sequence[int]) -> None:
        """Open what these ranks saved. Raises CheckpointError where that is not read or not where it should be."""
        for rank in ranks:
            if self.folder.optimizer_files:
                self._partition(rank)
            if self.frozen:
                self._open(self.folder.model_files[rank])

    def _find_moments(self, optimizer: Any, count: int) -> None:
        """Whether Adam's state is there for all flat tensors, at one step."""
        states, steps, extra, missing = _states(optimizer), _steps(optimizer, count), set(), set()
        for index in range(count):
            state = states[index] if index in states or isinstance(states, list) else {}
            missing |= {kind for kind in MOMENTS if not isinstance(state.get(kind), Tensor)}
            extra |= {key for key in state if key not in (*MOMENTS, "step")}
        if missing:
            held = ", ".join(sorted(extra)) or "nothing"
            self.why = f"the optimizer's state is not Adam's in plain tensors (it holds {held})"
        elif len(steps) != 1 or None in steps:
            told = sorted(map(str, steps))
            self.why = f"the optimizer's steps are not known or not the same for all parameters ({told})"
        else:
            self.moments, self.step, self.extra = MOMENTS, steps.pop() or 0, sorted(extra)

    # ---- stage 0 --------------------------------------------------------------------------------------------------

    def _find_whole(self, optimizer: Mapping[str, Any]) -> None:
        """Stage 0: the optimizer's state goes by number, so its order has to be found, and is checked where it can be."""
        inner = optimizer.get("optimizer_state_dict", optimizer)  # what wraps it in 16 bits nests torch's own
        self.loss_scale = _numbers(optimizer)
        buffers = set(self.head["buffer_names"])
        shapes = {name: tuple(value.shape) for name, value in self.whole.items() if name not in buffers}
        joined = optimizer.get("fp32_groups_flat")  # the moments of a whole group in one tensor
        names = _order(inner["param_groups"], shapes, joined)
        if names is None:
            self.why = "stage 0 does not record which parameter a moment is of, and the model's order does not fit it"
            return
        masters: Sequence[Tensor] = [self.whole[name] for group in names for name in group]
        places = {}
        for group, members in enumerate(names):
            base = 0
            for name in members:
                size = math.prod(shapes[name])
                places[name] = Place(group if joined else len(places), shapes[name], base if joined else 0, sys.maxsize)
                base += size
        if joined:
            masters = joined
        elif "fp32_groups" in optimizer:
            masters = [one for group in optimizer["fp32_groups"] for one in group]
        states = _states(inner)
        self._find_moments(inner, len(masters))
        flats = {MASTER: masters, **{kind: [states[i][kind] for i in range(len(masters))] for kind in self.moments}}
        wrong = self._unlike(places, flats)
        if wrong:
            self.moments = ()
            self.why = f"stage 0's order of parameters cannot be told: {wrong} is not where it should be"
            return
        self._flats, self.trained = flats, places
        self.whole = {name: value for name, value in self.whole.items() if name not in places}
        self.weights = f"stage 0's masters ({_precision(masters)})"

    def _unlike(self, places: Mapping[str, Place], flats: Mapping[str, Sequence[Tensor]]) -> str:
        """The first parameter whose master does not round to the module's values, or whose state has another size."""
        for name, place in places.items():
            end = place.base + math.prod(place.shape)
            ours = self.whole[name].flatten()[:_COMPARED]
            for kind, flat in flats.items():
                there = flat[int(place.group)].flatten()
                if len(there) < end or (
                    place.base == 0 and flat[int(place.group)].dim() > 1 and flat[int(place.group)].shape != place.shape
                ):
                    return name
                values = there[place.base : end][:_COMPARED]
                if kind == MASTER and not torch.equal(values.to(ours.dtype), ours):
                    return name
        return ""


def _order(
    groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], joined: Any
) -> list[list[str]] | None:
    """The names behind the numbers of an optimizer's state, by group: as it recorded them, else the model's order, whole
    or with matrices and vectors apart, whichever has the groups' sizes."""
    names = list(shapes)
    recorded = [list(group.get("param_names") or []) for group in groups]
    matrices = [name for name in names if len(shapes[name]) >= 2]
    vectors = [name for name in names if len(shapes[name]) < 2]
    for candidate in (recorded, [names], [matrices, vectors], [vectors, matrices]):
        if len(candidate) != len(groups) or not set().union(*candidate) <= shapes.keys():
            continue
        if joined is not None:
            sizes = [sum(math.prod(shapes[name]) for name in members) for members in candidate]
            if sizes == [flat.numel() for flat in joined]:
                return candidate
        elif [len(members) for members in candidate] == [len(group["params"]) for group in groups]:
            return candidate
    return None


def _states(saved: Any) -> Any:
    """torch's optimizer state by number; DeepSpeed's elastic checkpoints have it as a list."""
    return saved["state"] if isinstance(saved, Mapping) else saved


def _steps(saved: Any, count: int) -> set[int | None]:
    """The steps that so many flat tensors' state is of: recorded for each, or for all; None where neither is."""
    states, groups = _states(saved), saved.get("param_groups", []) if isinstance(saved, Mapping) else []
    of_all = next((group["step"] for group in groups if "step" in group), None)
    known = (states[i] if i in states or isinstance(states, list) else {} for i in range(count))
    steps = [state.get("step", of_all) for state in known]
    return {None if step is None else int(step) for step in steps}


def _numbers(fields: Mapping[str, Any]) -> dict[str, float]:
    """fp16's dynamic loss scale, where these fields are of one."""
    dynamic = fields.get("dynamic", fields.get("dynamic_loss_scale"))
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: fields[name] for name in names if name in fields} if dynamic else {}


def _precision(tensors: Any) -> str:
    return ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()}))
