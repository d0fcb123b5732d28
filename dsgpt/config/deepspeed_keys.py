"""The keys of a DeepSpeed 0.19 config that a dsgpt run can use, and what kind of value each takes.

A table instead of DeepSpeed's own classes because reading those imports torch, and because DeepSpeed ignores a
mistyped key at the top level. A test compares this table with the installed DeepSpeed.
"""

from __future__ import annotations

from typing import TypeAlias

Kind: TypeAlias = "str | dict[str, Kind]"  # "bool", "int", "number", "text", "list", or a section's own table

_OFFLOAD_OPTIMIZER: dict[str, Kind] = {
    "device": "text",
    "nvme_path": "text",
    "buffer_count": "int",
    "pin_memory": "bool",
    "pipeline_read": "bool",
    "pipeline_write": "bool",
    "fast_init": "bool",
}

_OFFLOAD_PARAM: dict[str, Kind] = {
    "device": "text",
    "nvme_path": "text",
    "buffer_count": "int",
    "buffer_size": "int",
    "max_in_cpu": "int",
    "pin_memory": "bool",
}

ZERO: dict[str, Kind] = {
    "stage": "int",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "int",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "int",
    "overlap_comm": "bool",
    "load_from_fp32_weights": "bool",
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "sub_group_size": "int",
    "stage3_prefetch_bucket_size": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_module_granularity_threshold": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
    "ignore_unused_parameters": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "int",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
}

BF16: dict[str, Kind] = {
    "enabled": "bool",
    "immediate_grad_update": "bool",
}

FP16: dict[str, Kind] = {
    "enabled": "bool",
    "auto_cast": "bool",
    "loss_scale": "number",
    "initial_scale_power": "int",
    "loss_scale_window": "int",
    "hysteresis": "int",
    "consecutive_hysteresis": "bool",
    "min_loss_scale": "int",
}

TOP_LEVEL: dict[str, Kind] = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "gradient_clipping": "number",
    "bf16": BF16,
    "fp16": FP16,
    "data_types": {"grad_accum_dtype": "text"},
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "communication_data_type": "text",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "disable_allgather": "bool",
    "steps_per_print": "int",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "log_level": "text",
    "timers": {"throughput": {"enabled": "bool", "synchronized": "bool"}},
    "comms_logger": {"enabled": "bool", "verbose": "bool", "prof_all": "bool", "debug": "bool", "prof_ops": "list"},
    "aio": {
        "block_size": "int",
        "queue_depth": "int",
        "intra_op_parallelism": "int",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
}

# What DeepSpeed would accept but a run says elsewhere, or does not do: key -> remedy.
_FP32_STATE = "remove it: weights and moments are kept in fp32, also in checkpoints"
_WHOLE_OFFLOAD = "remove it: the whole optimizer is offloaded, and torch's AdamW runs it"
OWNED_BY_THE_RUN = {
    "bf16.check_grad_overflow": "remove it: a step whose gradients are not finite is always left out",
    "bf16.bf16_master_weights_and_grads": _FP32_STATE,
    "bf16.bf16_optimizer_states": _FP32_STATE,
    "fp16.fp16_master_weights_and_grads": _FP32_STATE,
    "zero_optimization.offload_optimizer.ratio": _WHOLE_OFFLOAD,
    "zero_optimization.offload_optimizer.super_offload": _WHOLE_OFFLOAD,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _WHOLE_OFFLOAD,
    "optimizer": "remove it: the run's `optimizer` section says this, and torch's own optimizer is used",
    "scheduler": "remove it: the run's `optimizer.lr_schedule` says this",
    "activation_checkpointing": "remove it: set `training.activation_checkpointing`",
    "checkpoint": "remove it: the run's `checkpoint` section says this",
    "torch_autocast": "remove it: set `training.dtype`",
    "amp": "remove it: set `training.dtype`",
    "data_efficiency": "remove it: it would change the order of the data",
    "tensorboard": "remove it: metrics are written to metrics.jsonl",
    "wandb": "remove it: metrics are written to metrics.jsonl",
    "csv_monitor": "remove it: metrics are written to metrics.jsonl",
    "comet": "remove it: metrics are written to metrics.jsonl",
}

CHOICES = {
    "zero_optimization.stage": (0, 1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "data_types.grad_accum_dtype": ("fp32", "fp16", "bf16"),
    "communication_data_type": ("fp32", "fp16", "bf16"),
}
