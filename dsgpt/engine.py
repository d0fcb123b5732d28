"""The one door to DeepSpeed: building an engine and one training step; the state behind it is in partitioned.py.

Everything here that reaches into DeepSpeed's internals is pinned to the versions in
setup.cfg and covered by tests/test_engine.py for stages 0-3, with and without offload.

Trade-off: gradients are divided by the step's number of target tokens through the loss handed to `backward` (times the
world size, because DeepSpeed averages over ranks), not by DeepSpeed's own accumulation scaling, which assumes that every
micro-batch has equally many targets.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dsgpt.distributed import World
from dsgpt.errors import DsgptError, NumericalError
from dsgpt.loss_scale import LossScale
from dsgpt.model.batch_norm import BatchNorm
from dsgpt.partitioned import MASTER, Fragment, PartitionedState


@dataclass(frozen=True)
class StepResult:
    """`gradient_norm` is the global norm before clipping; `applied` is False when the step was left out.

    Under fp16 `loss_scale` is what this step's loss was multiplied by; `overflow` says that the step was left out because
    the gradients did not fit in fp16 at that scale, and that a lower one is left to try.
    """

    gradient_norm: float
    applied: bool
    loss_scale: float | None = None
    overflow: bool = False


def prepare_process() -> None:
    """Call before any engine is built: keep DeepSpeed quiet and from compiling C++ at first use.

    Its shared-memory collectives for CPU cost over a minute of building on first use; gloo does the same work.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its Muon optimizer, imported with every engine, would import torch's compiler (85 MB on every rank) for a decorator.
    compiler = deepspeed.runtime.compiler
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    compiler.compile = compile_


def keep_partitions_out_of_recomputation() -> None:
    """Let torch's selective recomputation not see what ZeRO-3 does to gather and release parameters, once per process.

    It compares the operations of a block in the forward and the backward pass, and where parameters are prefetched, or frozen,
    these are not the same. Nothing of them has a gradient.
    """
    for name in ("fetch_sub_module", "release_sub_module"):
        method = getattr(PartitionedParameterCoordinator, name)
        if not hasattr(method, "unseen"):
            setattr(PartitionedParameterCoordinator, name, _unseen(method))


def _unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    wrapped.unseen = True  # type: ignore[attr-defined]
    return wrapped


def init_distributed(world: World) -> None:
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def construct(
    build: Callable[[], nn.Module],
    deepspeed_config: Mapping[str, Any],
    constants: Callable[[], Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Build the model; under ZeRO-3 every layer is partitioned as soon as it is constructed.

    ZeRO-3 makes buffers in 16 bits with the rest. That is exact of the zeros and ones that running statistics start with;
    `constants` gives the values of those for which it is not.
    """
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    exact: Mapping[str, Tensor] = {}
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        exact = constants() if constants is not None else {}
        context = deepspeed.zero.Init(config_dict_or_path=dict(deepspeed_config))
    with context:
        module = build()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.data = exact[name].to(buffer.device) if name in exact else buffer.data.float()
    return module


def gather_for(layer: nn.Module, parameter: nn.Parameter) -> None:
    """Under ZeRO-3 gather a parameter of another layer too whenever this one computes."""
    if hasattr(parameter, "ds_id"):
        deepspeed.zero.register_external_parameter(layer, parameter)


def give_values(module: nn.Module) -> None:
    """Values to rehearse with, for a model that was built without any: its own are read into it later."""
    for name, parameter in module.named_parameters():
        values = getattr(parameter, "ds_tensor", parameter).data
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
            values.normal_(std=0.02)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)


class DividedModel(PartitionedState):
    """A model of ZeRO-3 without an optimizer, all of it frozen: for evaluation."""

    stage = 3

    def __init__(self, model: nn.Module, config: Any, deepspeed_config: Mapping[str, Any], world: World):
        self.world, self.config = world, config
        exact = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        model.requires_grad_(False).eval()
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, config=dict(deepspeed_config), dist_init_required=False
        )
        self.module = self._engine.module
        self._parameters, self._frozen = {}, dict(self.module.named_parameters())
        for name, buffer in self.module.named_buffers():
            buffer.data = exact[name].to(buffer.device)  # DeepSpeed casts them to 16 bits with the rest

    def fill(self, source: Callable[[Fragment, str], Tensor], buffers: Mapping[str, Tensor]) -> None:
        """This rank's parts of all parameters. Raises the source's error on all ranks."""
        error: DsgptError | None = None
        try:
            for fragment in self.frozen_fragments():
                self._frozen_view(fragment).copy_(source(fragment, MASTER))
        except DsgptError as problem:
            error = problem
        self._agree_on(error)
        self.load_buffers(buffers)

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed loss of this rank's batch. All ranks must call it."""
        self._engine.eval()
        return self._engine(**batch)

    def as_one(self) -> nn.Module:
        """The model as if it were on one device, for code that all ranks run with the same input. What it returns is rank 0's
        on every rank: where a choice follows from it, all choose the same, and none waits for another."""

        def agree(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.contiguous()
            self.world.broadcast_in_place(output)
            return output

        self.module.register_forward_hook(agree)
        return self.module


class Engine(PartitionedState):
    """A model, its optimizer and DeepSpeed, with the operations a training loop needs."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_config: Mapping[str, Any], world: World
    ):
        self.world = world
        self.stage: int = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.sum_over_ranks = world.sum_in_place
        exact = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(deepspeed_config), dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        self._optimizer = self._engine.optimizer
        self._loss_scale = (
            LossScale(self._optimizer.loss_scaler) if deepspeed_config.get("fp16", {}).get("enabled") else None
        )
        # Shared (tied) parameters appear once, under their first name.
        self._parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        for name, buffer in self.module.named_buffers():
            buffer.data = exact[name].to(buffer.device)  # DeepSpeed casts them to 16 bits with the rest
        self._buffers_before = self._copy_buffers()
        self._whole_masters = {}

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
        result = self._apply()
        if self._loss_scale is not None:
            overflow = not result.applied and self._loss_scale.can_be_lowered
            result = replace(result, loss_scale=self._loss_scale.value, overflow=overflow)
            self._loss_scale.after_step(overflow=not result.applied)
        return result

    def _apply(self) -> StepResult:
        result = self._step_without_zero() if self.stage == 0 else self._step_with_zero()
        if result.applied:
            self._buffers_before = self._copy_buffers()
        else:
            self.load_buffers(self._buffers_before)
        return result

    def _step_with_zero(self) -> StepResult:
        skipped = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = self._engine.skipped_steps == skipped
        if not applied:
            self._forget_gradients()
        return StepResult(float(norm if norm is not None else "nan"), applied)

    def _forget_gradients(self) -> None:
        """Some of what DeepSpeed keeps of a step that was left out would be added to the next one, or fail its check."""
        if self.stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()
        elif self._offloaded:
            self._optimizer.averaged_gradients.clear()

    def _step_without_zero(self) -> StepResult:
        """Stage 0 has no finite check of its own: look at the (already averaged) gradients first."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self._gradients()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not math.isfinite(norm):
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            return StepResult(norm, applied=False)
        self._engine.step()
        return StepResult(norm, applied=True)

    def discard(self) -> StepResult:
        """Leave the accumulated step out on all ranks: weights, moments, the optimizer's step count and loss scale stay.

        DeepSpeed clears everything of a step whose gradients are not finite, at every stage; so they are made that. With
        the optimizer in host memory it looks at norms taken during the backward pass instead.
        """
        norms = getattr(self._optimizer, "norm_for_param_grads", {})
        for value in (*self._gradients(), *norms.values()):
            value.fill_(math.nan)
        return replace(self._apply(), gradient_norm=math.nan, loss_scale=self._loss_scale and self._loss_scale.value)

    def _gradients(self) -> list[Tensor]:
        """This rank's accumulated gradients, between the last backward of a step and `step`."""
        if self.stage == 0:
            return [p.grad for p in self._parameters.values() if p.grad is not None]
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):
            return list(self._optimizer.fp32_groups_gradient_flat_partition)
        if self._offloaded:
            return [flat.grad for flat in self._flat_partitions() if flat.grad is not None]
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
        buffers = self._copy_buffers()
        micro_steps = min(2, self.gradient_accumulation_steps)
        num_targets = float(batch["labels"].numel() * self.world.size * micro_steps)
        # At its initial value the loss scale is too high on purpose.
        with self._loss_scale.switched_off() if self._loss_scale else contextlib.nullcontext():
            for micro_step in range(micro_steps):
                self.forward_backward(batch, num_targets, last=micro_step == micro_steps - 1)
            if not self.step(learning_rate=0.0).applied:
                raise NumericalError(
                    "the trial step on random tokens has gradients that are not finite", do="report this"
                )
        self.evaluate(batch)
        self._engine.micro_steps = self._engine.global_steps = self._engine.skipped_steps = 0
        self._engine.global_samples = 0
        self.load(lambda fragment, kind: torch.zeros(()), self.state_kinds[1:], optimizer_steps=0)
        self.load_buffers(buffers)

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """DeepSpeed's numbers behind fp16's loss scale, `cur_scale` among them, to be saved; None where not fp16."""
        return None if self._loss_scale is None else self._loss_scale.numbers

    @loss_scale.setter
    def loss_scale(self, numbers: Mapping[str, float]) -> None:
        if self._loss_scale is not None:
            self._loss_scale.restore(numbers)

    def full_parameter(self, name: str) -> Tensor:
        """The whole fp32 master of a parameter on every rank (a collective; tests and small models)."""
        parameter = self._parameters[name]
        if self.stage == 0:
            return self._whole_master(name).detach().clone()
        return deepspeed.utils.safe_get_full_fp32_param(parameter)

    def peak_memory_bytes(self) -> int:
        """Largest device memory allocated so far, or on CPU the largest resident size of this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()

    def close(self) -> None:
        """Give the memory back; the engine cannot be used any more."""
        self._engine.destroy()
        del self._engine, self._optimizer, self.module
        self._parameters, self._frozen, self._buffers_before, self._whole_masters = {}, {}, {}, {}
