"""Typed configuration, read from strict YAML.

``architecture.py`` and ``sections.py`` have all keys, defaults and checks; ``tasks.py`` and
``variants.py`` have those of tasks and named models. ``loading.py`` reads files and overrides
through ``yaml_core.py``.
"""

from .architecture import Architecture, ModelConfig, MoEConfig, check_moe_blocks
from .batch import micro_batch_sizes, micro_batches, share_global_batch
from .idle import idle_keys
from .loading import (
    KNOWN,
    ConfigError,
    dump_config,
    dump_plain,
    load_config,
    load_plain,
    parse_overrides,
    refuse_dense,
    unknown_model,
    validate,
    validate_architecture,
)
from .sections import (
    REFERENCE_BATCH,
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FaultsConfig,
    LogConfig,
    OpsConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)
from .tasks import TASKS, ClassificationConfig, SimMIMConfig

__all__ = [
    "KNOWN",
    "REFERENCE_BATCH",
    "TASKS",
    "Architecture",
    "AugmentConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "FaultsConfig",
    "LogConfig",
    "MoEConfig",
    "ModelConfig",
    "OpsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ScheduleConfig",
    "SimMIMConfig",
    "TrainConfig",
    "ZeroConfig",
    "check_moe_blocks",
    "dump_config",
    "dump_plain",
    "idle_keys",
    "load_config",
    "load_plain",
    "micro_batch_sizes",
    "micro_batches",
    "parse_overrides",
    "refuse_dense",
    "share_global_batch",
    "unknown_model",
    "validate",
    "validate_architecture",
]
