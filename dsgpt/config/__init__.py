"""A run's config: typed, layered, explained. Floor 1; imports neither torch nor numpy."""

from dsgpt.config.deepspeed import ZeroKind, check_deepspeed, fill_deepspeed, zero_kind
from dsgpt.config.fine_tuning import FineTuningSection, LoraSection
from dsgpt.config.load import LoadedConfig, flatten, load_config, split_arguments, to_yaml
from dsgpt.config.model import Dropout, HFModelConfig, ModelConfig, ModelSection, parse_model
from dsgpt.config.schema import RunConfig, json_schema
from dsgpt.config.shipped import find_config, shipped_configs, shipped_folder

__all__ = [
    "Dropout",
    "FineTuningSection",
    "HFModelConfig",
    "LoadedConfig",
    "LoraSection",
    "ModelConfig",
    "ModelSection",
    "RunConfig",
    "ZeroKind",
    "check_deepspeed",
    "fill_deepspeed",
    "find_config",
    "flatten",
    "json_schema",
    "load_config",
    "parse_model",
    "shipped_configs",
    "shipped_folder",
    "split_arguments",
    "to_yaml",
    "zero_kind",
]
