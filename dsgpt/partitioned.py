"""The state that DeepSpeed divides over ranks, as named ranges: what checkpoints are made of.

Floors above see parameters by name and flat ranges of fp32 values, never DeepSpeed's own structures, so a checkpoint does
not depend on the ZeRO stage. It is the lower half of `Engine`, which sets the attributes named here. Everything that reaches
into DeepSpeed's internals is pinned to the versions in setup.cfg and covered by tests/test_engine.py for stages 0-3, with
and without offload.

Growth: nothing here is larger than this rank's share, but what every rank holds whole anyway (all of stage 0, frozen
parameters below stage 3).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsgpt.distributed import World
from dsgpt.errors import DamagedError, DsgptError

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: `numel` elements of the flattened parameter from `start`."""

    name: str
    start: int
    numel: int


class PartitionedState:
    """Parameters, moments and running statistics of an engine, by name and range."""

    world: World
    stage: int
    module: nn.Module
    _optimizer: Any
    _parameters: dict[str, nn.Parameter]  # trained; shared (tied) ones once, under their first name
    _frozen: dict[str, nn.Parameter]
    _buffers_before: dict[str, Tensor]
    _whole_masters: dict[int, Tensor]

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self._optimizer, "optimizer", self._optimizer)  # stage 0 in fp32 has no optimizer around it

    def _whole_master(self, name: str) -> Tensor:
        """The fp32 master of a parameter at stage 0: itself, or in bf16 the copy that DeepSpeed keeps of each."""
        parameter = self._parameters[name]
        if not hasattr(self._optimizer, "fp32_groups"):
            return parameter
        if not self._whole_masters:
            working = [p for group in self._optimizer.fp16_groups for p in group]
            masters = [p for group in self._optimizer.fp32_groups for p in group]
            self._whole_masters = {id(p): master for p, master in zip(working, masters, strict=True)}
        return self._whole_masters[id(parameter)]

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Which fp32 tensors exist for every parameter: the master weight and the optimizer's moments."""
        if isinstance(self._torch_optimizer, torch.optim.AdamW):
            return (MASTER, "exp_avg", "exp_avg_sq")
        has_momentum = any(group.get("momentum") for group in self._torch_optimizer.param_groups)
        return (MASTER, "momentum_buffer") if has_momentum else (MASTER,)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def fragments(self) -> list[Fragment]:
        """What this rank owns, in parameter order. All ranks together own every element exactly once."""
        rank, size = self.world.rank, self.world.size
        owned = []
        for name, p in self._parameters.items():
            if self.stage in (1, 2):
                if p._hp_mapping is None:
                    continue
                address = p._hp_mapping.lp_fragment_address
                start, stop = address.start, address.start + address.numel
            else:
                numel = p.ds_numel if self.stage == 3 else p.numel()
                piece = p.ds_tensor.ds_numel if self.stage == 3 else -(-numel // size)
                start, stop = min(rank * piece, numel), min((rank + 1) * piece, numel)
            if stop > start:
                owned.append(Fragment(name, start, stop - start))
        return owned

    def read(self, fragment: Fragment, kind: str) -> Tensor:
        """This rank's fp32 values of a fragment, one-dimensional: a view, or a copy of what lies on NVMe."""
        with self._in_memory(self._place(fragment)[0]) as swapped:
            values = self._view(fragment, kind)
            return values.clone() if swapped else values

    def _place(self, fragment: Fragment) -> tuple[int, int]:
        """Which of the flat partitions holds a fragment, and from which element; at stage 0 each parameter is its own."""
        parameter = self._parameters[fragment.name]
        if self.stage == 0:
            return 0, fragment.start
        if self.stage == 3:
            group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            return group, offset
        return parameter._hp_mapping.param_group_index, parameter._hp_mapping.hp_fragment_address.start

    def _view(self, fragment: Fragment, kind: str) -> Tensor:
        """The memory of a fragment's values.

        Not DeepSpeed's get_hp_fragment(kind): with several parameter groups it links optimizer states after the first
        group's step, when the other groups have none yet, and never again.
        """
        offset, flat = self._place(fragment)[1], self._master(fragment)
        whole = flat if kind == MASTER else self._torch_optimizer.state[flat][kind]
        return whole.data.view(-1).narrow(0, offset, fragment.numel)

    def _master(self, fragment: Fragment) -> Tensor:
        """The tensor that the optimizer knows: a whole parameter at stage 0, else a flat partition of many."""
        if self.stage == 0:
            return self._whole_master(fragment.name)
        return self._flat_partitions()[self._place(fragment)[0]]

    @contextlib.contextmanager
    def _in_memory(self, group: int, write: bool = False) -> Iterator[bool]:
        """Bring one flat partition and its moments in from NVMe, where they lie there, and with `write` back again."""
        optimizer = self._optimizer
        swapped = getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield swapped
        finally:  # also where what was read is damaged: an older checkpoint may be loaded next
            if swapped:
                (optimizer._optimizer_states_and_gradient_swap_out if write else optimizer._release_swap_buffers)(group)

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's fp32 masters at stages 1-3, one flat tensor per parameter group (at stage 3 per sub-group).

        DeepSpeed has three optimizer classes for them: stage 3; stage 1 in bf16 with fp32 sums; the other cases of 1 and 2.
        """
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        return next(getattr(self._optimizer, name) for name in names if hasattr(self._optimizer, name))

    @property
    def _offloaded(self) -> bool:
        """Whether optimizer state and step are in host memory or on NVMe."""
        return any(getattr(self._optimizer, name, False) for name in ("offload_optimizer", "cpu_offload"))

    def load(
        self,
        source: Callable[[Fragment, str], Tensor],
        kinds: tuple[str, ...],
        optimizer_steps: int,
        late: Mapping[str, int] | None = None,
    ) -> None:
        """Fill this rank's fragments from `source(fragment, kind)`, then refresh the working copies on all ranks.

        Frozen parameters come with the masters. `late` says how many steps the optimizer has taken of parameters whose
        training began later, which lie in groups of their own. Must follow `rehearse`, which creates the optimizer's
        state. Raises the source's error, on all ranks where one had a DamagedError.
        """
        if self.stage == 3:
            self._optimizer._partition_all_parameters()  # before frozen ones are filled: it may write them back
        error: DsgptError | None = None
        try:
            for fragment in self.fragments() if self.stage != 0 else self._whole(self._parameters):
                with self._in_memory(self._place(fragment)[0], write=True):
                    for kind in kinds:
                        self._view(fragment, kind).copy_(source(fragment, kind))
            if MASTER in kinds:
                for fragment in self.frozen_fragments() if self.stage == 3 else self._whole(self._frozen):
                    self._frozen_view(fragment).copy_(source(fragment, MASTER))
        except DsgptError as problem:
            error = problem
        self._agree_on(error)  # before the collectives below
        for state in self._torch_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(optimizer_steps)
        for fragment in self.fragments() if late else ():
            flat = self._master(fragment)
            if fragment.name in late and torch.is_tensor(self._torch_optimizer.state[flat].get("step")):
                self._torch_optimizer.state[flat]["step"].fill_(late[fragment.name])
        self._refresh_working_copies()

    def _agree_on(self, error: DsgptError | None) -> None:
        """Raise on all ranks what one could not read; the same DamagedError everywhere, so that all can go on elsewhere."""
        problems = error.problems if isinstance(error, DamagedError) else []
        if self.world.max(float(len(problems)))[0]:
            gathered = self.world.gather_objects(problems)
            told = [one for part in gathered or () for one in part]
            raise DamagedError(problems=self.world.broadcast_object(told))
        self.world.agree(error, "reading the checkpoint")

    # ---- what is not trained: values in the model's own precision, without optimizer state ------------------------

    def frozen_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(getattr(p, "ds_shape", p.shape)), p.dtype) for name, p in self._frozen.items()}

    def frozen_fragments(self) -> list[Fragment]:
        """This rank's equal share of every frozen parameter, which only stage 3 divides in memory too."""
        rank, size, owned = self.world.rank, self.world.size, []
        for name, (shape, _) in self.frozen_shapes().items():
            numel = math.prod(shape)
            piece = -(-numel // size)
            start, stop = min(rank * piece, numel), min((rank + 1) * piece, numel)
            if stop > start:
                owned.append(Fragment(name, start, stop - start))
        return owned

    def read_frozen(self, fragment: Fragment) -> Tensor:
        return self._frozen_view(fragment)

    def _frozen_view(self, fragment: Fragment) -> Tensor:
        parameter = self._frozen[fragment.name]
        if self.stage == 3:
            return parameter.ds_tensor.data.view(-1).narrow(0, 0, fragment.numel)
        return parameter.data.view(-1).narrow(0, fragment.start, fragment.numel)

    def buffers(self) -> dict[str, Tensor]:
        """What the model carries beside its parameters (running statistics); the same on every rank.

        Not what it computes anew whenever it is built.
        """
        return {name: value for name, value in self.module.named_buffers() if name not in self._computed_buffers}

    @functools.cached_property
    def _computed_buffers(self) -> set[str]:
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.module.named_modules()
            for name in module._non_persistent_buffers_set
        }

    def _copy_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.buffers().items()}

    def load_buffers(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self.buffers().items():
            buffer.copy_(values[name])
        self._buffers_before = self._copy_buffers()

    @staticmethod
    def _whole(parameters: Mapping[str, nn.Parameter]) -> list[Fragment]:
        """Where parameters are not divided a slice of each is saved per rank, but every rank must load all of it."""
        return [Fragment(name, 0, p.numel()) for name, p in parameters.items()]

    def _refresh_working_copies(self) -> None:
        """Make the weights used in the forward pass equal to the fp32 masters, as after an optimizer step."""
        if self.stage == 0:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(self._whole_master(name))
        elif self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for sub_group in range(len(self._optimizer.fp16_groups)):
                with self._in_memory(sub_group):
                    self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
            self._optimizer.invalidate_secondary_tensor()  # the copy of the weights within a node (hpZ)
