"""What can be asked for: frozen dataclasses of plain values, one a command, of shared parts; checked when built."""

from saap_jax.config.jobs import (
    CompareConfig,
    ExportConfig,
    FidelityConfig,
    FrontierConfig,
    PatternsConfig,
    ReportConfig,
    ScoreConfig,
    SensitivityConfig,
    SweepConfig,
)
from saap_jax.config.judge import AbConfig, EvaluateConfig, JudgedConfig, TasksConfig
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import (
    CalibrationConfig,
    EvaluationConfig,
    ModelConfig,
    TargetsConfig,
)
from saap_jax.config.plan import PlanConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.config.traced import for_factory
from saap_jax.config.use import BenchConfig, GenerateConfig

__all__ = [
    "AbConfig",
    "BenchConfig",
    "CalibrationConfig",
    "CompareConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FidelityConfig",
    "FrontierConfig",
    "GenerateConfig",
    "JudgedConfig",
    "MeshConfig",
    "MethodConfig",
    "ModelConfig",
    "PatternsConfig",
    "PlanConfig",
    "PruneConfig",
    "RecoverConfig",
    "ReportConfig",
    "ScoreConfig",
    "SensitivityConfig",
    "SweepConfig",
    "TargetsConfig",
    "TasksConfig",
    "TrainingConfig",
    "TrainingTextConfig",
    "for_factory",
]
