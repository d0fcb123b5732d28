"""The one door to DeepSpeed: building an engine, one training step, and the partitioned state behind it.

Floors above see parameters by name and flat ranges of fp32 values, never DeepSpeed's own structures, so a checkpoint
does not depend on the ZeRO stage. Everything here that reaches into DeepSpeed's internals is pinned to the versions in
setup.cfg and covered by tests/test_engine.py for stages 0-3.

Trade-off: gradients are divided by the step's number of target tokens through the loss handed to `backward` (times the
world size, because DeepSpeed averages over ranks), not by DeepSpeed's own accumulation scaling, which assumes that every
micro-batch has equally many targets.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from dsgpt.distributed import World
from dsgpt.errors import ConfigError, DsgptError, NumericalError

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: `numel` elements of the flattened parameter from `start`."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class StepResult:
    """`gradient_norm` is the global norm before clipping; `applied` is False when the step was left out."""

    gradient_norm: float
    applied: bool


def prepare_process() -> None:
    """Call before any engine is built: keep DeepSpeed quiet and from compiling C++ at first use.

    Its shared-memory collectives for CPU cost over a minute of building on first use; gloo does the same work.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def init_distributed(world: World) -> None:
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def construct(build: Callable[[], nn.Module], deepspeed_config: Mapping[str, Any]) -> nn.Module:
    """Build the model; under ZeRO-3 every layer is partitioned as soon as it is constructed."""
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        context = deepspeed.zero.Init(config_dict_or_path=dict(deepspeed_config))
    with context:
        return build()


class Engine:
    """A model, its optimizer and DeepSpeed, with the operations a training loop needs."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_config: Mapping[str, Any], world: World
    ):
        self.world = world
        self.stage: int = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        half = [name for name in ("bf16", "fp16") if deepspeed_config.get(name, {}).get("enabled")]
        if self.stage == 0 and half:
            raise ConfigError(
                "ZeRO stage 0 accumulates gradients in low precision",
                seen=f"deepspeed stage 0 with {half[0]}",
                do="deepspeed=zero1 (same memory on one GPU, fp32 accumulation), or training.dtype=fp32",
            )
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(deepspeed_config), dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        self._optimizer = self._engine.optimizer
        # Shared (tied) parameters appear once, under their first name.
        self._parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    # ---- one step ------------------------------------------------------------------------------------------------

    @property
    def gradient_accumulation_steps(self) -> int:
        return self._engine.gradient_accumulation_steps()

    def forward_backward(self, batch: Mapping[str, Tensor], num_targets: float, last: bool) -> Tensor:
        """One micro-step; `last` says whether it is the step's last one, after which `step` is called.

        `num_targets` is the number of target tokens of the whole step, over all ranks and micro-steps. Returns this
        micro-batch's summed loss (a detached scalar in nats).
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum = self._engine(**batch)
        self._engine.backward(loss_sum * (self.world.size / num_targets), scale_wrt_gas=False)
        return loss_sum.detach()

    def step(self, learning_rate: float) -> StepResult:
        """Clip and apply the accumulated gradients. A step whose gradients are not finite is left out on all ranks."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
        if self.stage == 0:
            return self._step_without_zero()
        skipped = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(float(norm if norm is not None else "nan"), self._engine.skipped_steps == skipped)

    def _step_without_zero(self) -> StepResult:
        """Stage 0 has no finite check of its own: look at the (already averaged) gradients first."""
        norm = float(torch.nn.utils.get_total_norm(self._gradients()))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            return StepResult(norm, applied=False)
        self._engine.step()
        return StepResult(norm, applied=True)

    def discard(self) -> StepResult:
        """Leave the accumulated step out on all ranks: weights, moments and the optimizer's step count stay.

        DeepSpeed clears everything of a step whose gradients are not finite, at every stage; so they are made that.
        """
        for gradient in self._gradients():
            gradient.fill_(math.nan)
        return StepResult(math.nan, applied=self.step(learning_rate=0.0).applied)

    def _gradients(self) -> list[Tensor]:
        """This rank's accumulated gradients, between the last backward of a step and `step`."""
        if self.stage == 0:
            return [p.grad for p in self._parameters.values() if p.grad is not None]
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):
            return list(self._optimizer.fp32_groups_gradient_flat_partition)
        if self.stage in (1, 2) and self._optimizer.cpu_offload:
            return [flat.grad for flat in self._optimizer.single_partition_of_fp32_groups if flat.grad is not None]
        groups = [group for group in self._optimizer.averaged_gradients.values() if group is not None]
        return [gradient for group in groups for gradient in group]

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss of one batch without dropout and without gradients."""
        self._engine.eval()
        loss_sum = self._engine(**batch)
        self._engine.train()
        return loss_sum

    def rehearse(self, batch: Mapping[str, Tensor]) -> None:
        """Run the most expensive step there can be and undo it: forward, backward, accumulation, optimizer, evaluation.

        The learning rate is 0, so the weights keep their bits; the optimizer's state, which now exists, is zeroed.
        What does not fit in memory fails here, in the first minute, and the state has somewhere to be loaded into.
        """
        self._engine.train()
        micro_steps = min(2, self.gradient_accumulation_steps)
        num_targets = float(batch["labels"].numel() * self.world.size * micro_steps)
        for micro_step in range(micro_steps):
            self.forward_backward(batch, num_targets, last=micro_step == micro_steps - 1)
        if not self.step(learning_rate=0.0).applied:
            raise NumericalError("the trial step on random tokens has gradients that are not finite", do="report this")
        self.evaluate(batch)
        self._engine.micro_steps = self._engine.global_steps = self._engine.skipped_steps = 0
        self._engine.global_samples = 0
        for state in self._torch_optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    # ---- partitioned state ---------------------------------------------------------------------------------------

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer

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
        """This rank's fp32 values of a fragment, one-dimensional; a view where DeepSpeed's layout allows it."""
        parameter = self._parameters[fragment.name]
        if self.stage == 0:
            whole = parameter.data if kind == MASTER else self._optimizer.state[parameter][kind]
            return whole.flatten().narrow(0, fragment.start, fragment.numel)
        if self.stage == 3:
            local = (
                safe_get_local_fp32_param(parameter)
                if kind == MASTER
                else safe_get_local_optimizer_state(parameter, kind)
            )
            return local.flatten()[: fragment.numel]
        # Not get_hp_fragment(kind): with several parameter groups DeepSpeed links optimizer states after the first group's
        # step, when the other groups have none yet, and never again.
        mapping = parameter._hp_mapping
        flat = self._flat_partitions()[mapping.param_group_index]
        whole = flat if kind == MASTER else self._torch_optimizer.state[flat][kind]
        return whole.data.narrow(0, mapping.hp_fragment_address.start, fragment.numel)

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's fp32 masters at stages 1-2, one flat tensor per parameter group.

        With bf16, fp32 gradient accumulation and stage 1 DeepSpeed uses another optimizer class with other names.
        """
        if hasattr(self._optimizer, "fp32_groups_flat_partition"):
            return self._optimizer.fp32_groups_flat_partition
        return self._optimizer.single_partition_of_fp32_groups

    def load(self, source: Callable[[Fragment, str], Tensor], kinds: tuple[str, ...], optimizer_steps: int) -> None:
        """Fill this rank's fragments from `source(fragment, kind)`, then refresh the working copies on all ranks.

        Must follow `rehearse`, which creates the optimizer's state.
        """
        error = None
        try:
            for fragment in self.fragments() if self.stage != 0 else self._whole_parameters():
                for kind in kinds:
                    self._view(fragment, kind).copy_(source(fragment, kind))
        except DsgptError as problem:
            error = problem
        self.world.agree(error, "reading the checkpoint")  # before the collectives below
        for state in self._torch_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(optimizer_steps)
        self._refresh_working_copies()

    def _whole_parameters(self) -> list[Fragment]:
        """Stage 0 saves a slice of each parameter per rank, but every rank holds and must load all of it."""
        return [Fragment(name, 0, p.numel()) for name, p in self._parameters.items()]

    def _view(self, fragment: Fragment, kind: str) -> Tensor:
        """Writable memory behind `read`."""
        parameter = self._parameters[fragment.name]
        if self.stage == 3:
            group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            flat = self._optimizer.fp32_partitioned_groups_flat[group]
            whole = flat if kind == MASTER else self._optimizer.optimizer.state[flat][kind]
            return whole.data.narrow(0, offset, fragment.numel)
        return self.read(fragment, kind).data.view(-1)

    def _refresh_working_copies(self) -> None:
        """Make the weights used in the forward pass equal to the fp32 masters, as after an optimizer step."""
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            self._optimizer._partition_all_parameters()
            for sub_group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def full_parameter(self, name: str) -> Tensor:
        """The whole fp32 master of a parameter on every rank (a collective; tests and small models)."""
        parameter = self._parameters[name]
        if self.stage == 0:
            return parameter.detach().float().clone()
        return deepspeed.utils.safe_get_full_fp32_param(parameter)

    def peak_memory_bytes(self) -> int:
        """Largest device memory allocated so far, or on CPU the largest resident size of this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()
